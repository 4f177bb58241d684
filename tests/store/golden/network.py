"""A network whose embedding of a one-color image can be worked out by hand."""

from __future__ import annotations

import torch
from torch import nn


class MeanColor(nn.Module):
    """Mean of each channel, scaled by 1, 2 and 4."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 4.0]))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return ``(B, 3)`` for pixels ``(B, 3, H, W)``."""
        means: torch.Tensor = pixels.mean((2, 3))
        return means * self.scale


def mean_color() -> nn.Module:
    """Return the network."""
    return MeanColor()
