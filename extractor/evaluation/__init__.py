"""How well the rows of a store tell classes apart; no torch, no Pillow."""
