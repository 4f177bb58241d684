"""A finished store in the formats of other tools; no torch, no Pillow."""
