"""Image files to ordered uint8 batches, decoded by threads."""
