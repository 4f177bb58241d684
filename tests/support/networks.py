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


def assert_same_gradients(network: nn.Module, other: nn.Module, pixels: torch.Tensor) -> None:
    """Assert that two networks learn the same."""
    for trained in (network, other):
        trained.requires_grad_(True)
        trained(pixels).square().sum().backward()
    for actual, expected in zip(network.parameters(), other.parameters(), strict=True):
        assert actual.grad is not None
        torch.testing.assert_close(actual.grad, expected.grad, atol=1e-5, rtol=1e-5)
    network.requires_grad_(False)
