"""The store: format, writer and reader (``docs/store-format.md``). Free of torch and Pillow."""
