"""One image, from its path to uint8 pixels. Free of torch."""
