"""One run: images to finished stores, stage by stage."""
