"""Find the rows of a store that are nearest to a vector or an image."""
