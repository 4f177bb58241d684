"""Maps: coordinates, where they are kept, pictures and tables of them."""
