"""Read a finished store: rows as an array, the index, and what belongs to them."""
