"""Small networks whose embeddings follow from arithmetic."""

from __future__ import annotations

import torch
from torch import nn

from extractor.models.backbone import Backbone
from extractor.models.provenance import Provenance
from extractor.network.taps import Output
from extractor.preprocess import Preprocess

MEAN = (0.5, 0.25, 0.125)
STD = (0.5, 0.25, 0.5)


class MeanPixel(nn.Module):
    """Mean of each channel. The embedding of a one-color image is its normalized color."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean((2, 3))


def mean_pixel(device: str = "cpu", size: tuple[int, int] = (24, 32)) -> Backbone:
    """Return a backbone whose embedding is the mean of the normalized pixels."""
    preprocess = Preprocess(size, "squash", size, "bilinear", MEAN, STD)
    provenance = Provenance("test:mean", "test", "1", "random", "", "0" * 64, seed=0)
    backbone = Backbone(MeanPixel(), (Output((3,)),), ("fc",), preprocess, provenance)
    return backbone.to(torch.device(device))


def normalized(color: tuple[int, int, int]) -> list[float]:
    """Return the embedding that ``mean_pixel`` computes for a color."""
    return [(level / 255 - m) / s for level, m, s in zip(color, MEAN, STD, strict=True)]


def pixels(edge: int = 64) -> torch.Tensor:
    """Return ``(2, 3, edge, edge)``, the same numbers each time."""
    return torch.randn(2, 3, edge, edge, generator=torch.Generator().manual_seed(1))


def pre_logits(of: nn.Module, edge: int = 64) -> torch.Tensor:
    """Return what a network of timm computes before its classifier."""
    with torch.inference_mode():
        return of.forward_head(of.forward_features(pixels(edge)), pre_logits=True)


def assert_close(got: torch.Tensor, expected: torch.Tensor, *, limit: float = 1e-5) -> None:
    """Assert that embeddings differ by rounding only, and are not all the same."""
    assert got.shape == expected.shape
    assert expected.std() > 0
    assert (got - expected).abs().max() / expected.abs().max() < limit


def assert_same_gradients(network: nn.Module, other: nn.Module, pixels: torch.Tensor) -> None:
    """Assert that two networks learn the same."""
    for trained in (network, other):
        trained.requires_grad_(True)
        trained(pixels).square().sum().backward()
    for actual, expected in zip(network.parameters(), other.parameters(), strict=True):
        assert actual.grad is not None
        torch.testing.assert_close(actual.grad, expected.grad, atol=1e-5, rtol=1e-5)
    network.requires_grad_(False)
