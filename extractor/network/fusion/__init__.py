"""Batch normalizations and activations fused into convolutions."""
