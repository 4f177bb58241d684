"""Small networks whose embeddings can be worked out by hand."""

from __future__ import annotations

import torch
from torch import nn

from extractor.models.backbone import Backbone, Provenance
from extractor.network.taps import Output
from extractor.preprocess import Preprocess

MEAN = (0.5, 0.25, 0.125)
STD = (0.5, 0.25, 0.5)


class MeanPixel(nn.Module):
    """The mean of each channel: the embedding of a one-coloured image is its normalised colour."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean((2, 3))


def mean_pixel(device: str = "cpu", size: tuple[int, int] = (24, 32)) -> Backbone:
    preprocess = Preprocess(size, "squash", size, "bilinear", MEAN, STD)
    provenance = Provenance("test:mean", "test", "1", "random", "", "0" * 64, seed=0)
    backbone = Backbone(MeanPixel(), (Output((3,)),), ("fc",), preprocess, provenance)
    return backbone.to(torch.device(device))


def normalised(colour: tuple[int, int, int]) -> list[float]:
    return [(level / 255 - m) / s for level, m, s in zip(colour, MEAN, STD, strict=True)]


def assert_same_gradients(network: nn.Module, other: nn.Module, pixels: torch.Tensor) -> None:
    """Two networks learn the same."""
    for one in (network, other):
        one.requires_grad_(True)
        one(pixels).square().sum().backward()
    for mine, its in zip(network.parameters(), other.parameters(), strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, its.grad, atol=1e-5, rtol=1e-5)
    network.requires_grad_(False)
