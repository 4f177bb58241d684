"""A page in the browser: images of a store, their neighbors, maps and lists."""
