"""``nn.Module`` surgery: heads, layers, precision."""
