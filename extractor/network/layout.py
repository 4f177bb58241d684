"""Axes of a layer's output: which are positions, which are channels; and pooling over positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from extractor.options import Pooling

__all__ = ["Layout", "find_layout", "has_class_token", "pool"]

# Smallest value that the generalized mean uses: roots of negative numbers are NaN.
GEM_FLOOR = 1e-6

# Parameter names of both libraries for tokens that precede those of the image.
CLASS_TOKENS = ("cls_token", "class_token")
PREFIX_TOKENS = (*CLASS_TOKENS, "dist_token", "reg_token", "register_tokens")


@dataclass(frozen=True)
class Layout:
    """Meaning of the axes of a layer's output.

    Attributes:
        kind: ``vector`` for ``(B, channels)``, ``map`` for ``(B, channels, height, width)``,
            ``tokens`` for ``(B, tokens, channels)``.
        channels_last: Whether the channels are the last axis.
        prefix_tokens: Number of tokens that precede those of the image.
    """

    kind: str
    channels_last: bool = True
    prefix_tokens: int = 0

    def positions(self, x: torch.Tensor) -> torch.Tensor:
        """Return a map or tokens as ``(B, positions, channels)``, without prefix tokens."""
        if self.kind == "map":
            return x.flatten(1, 2) if self.channels_last else x.flatten(2).mT
        return (x if self.channels_last else x.mT)[:, self.prefix_tokens :]

    def in_stored_order(self, x: torch.Tensor) -> torch.Tensor:
        """Return a map as ``(B, channels, height, width)``, tokens as ``(B, tokens, channels)``."""
        if self.kind == "map":
            return x.permute(0, 3, 1, 2) if self.channels_last else x
        return x if self.kind == "vector" or self.channels_last else x.mT


def find_layout(
    network: nn.Module, layer: nn.Module, shape: tuple[int, ...], size: tuple[int, int]
) -> Layout | None:
    """Return what the axes of a layer's output mean; None if they fit no layout.

    A map has two axes with the aspect ratio of the image. If two readings fit, the type of the
    layer decides, then what the network declares.

    Args:
        network: The network that holds the layer.
        layer: The module whose output it is.
        shape: Shape of the output, without the batch axis.
        size: (height, width) of the image.
    """
    if len(shape) == 1:
        return Layout("vector")
    if len(shape) == 3:
        first, last = _is_grid(shape[1:], size), _is_grid(shape[:2], size)
        if first or last:
            both = first and last  # as many channels as rows and columns
            return Layout("map", channels_last=_is_channels_last(network, layer) if both else last)
    if len(shape) == 2:
        most = _prefix_tokens(network)
        patches = _patches(network, size)
        if patches > 1 and 0 <= shape[0] - patches <= most:
            return Layout("tokens", prefix_tokens=shape[0] - patches)
        for count, channels_last in ((shape[0], True), (shape[1], False)):
            for prefix in (0, most, *range(1, most)):
                if _has_grid(count - prefix, size):
                    return Layout("tokens", channels_last, prefix if channels_last else 0)
        return Layout("tokens", prefix_tokens=min(most, shape[0] - 1))
    return None


def _is_channels_last(network: nn.Module, layer: nn.Module) -> bool:
    """Guess from its submodules whether a layer keeps the channels of a map last."""
    types = [type(module).__name__ for module in layer.modules()]
    convolves = any(isinstance(module, nn.Conv2d) for module in layer.modules())
    if not convolves and any(isinstance(module, nn.Linear) for module in layer.modules()):
        return True  # a linear layer works on the last axis
    if types[-1].endswith("LayerNorm"):  # LayerNorm2d, of both libraries, works on the second one
        return True
    return not convolves and getattr(network, "output_fmt", "") == "NHWC"


def _patches(network: nn.Module, size: tuple[int, int]) -> int:
    """Return the number of patches of an image in a vision transformer; 1 in other networks."""
    embed = getattr(network, "patch_embed", network)
    patch = getattr(embed, "patch_size", None)
    if isinstance(patch, int):
        patch = (patch, patch)
    if not (isinstance(patch, (tuple, list)) and len(patch) == 2):
        return 1
    return (size[0] // int(patch[0])) * (size[1] // int(patch[1]))


def _is_grid(axes: tuple[int, ...], size: tuple[int, int]) -> bool:
    """Return whether (rows, columns) have the aspect ratio of an image, up to rounding."""
    (rows, columns), (height, width) = axes, size
    return rows <= height and columns <= width and abs(rows * width - columns * height) < max(size)


def _has_grid(count: int, size: tuple[int, int]) -> bool:
    return any(
        count % rows == 0 and _is_grid((rows, count // rows), size)
        for rows in range(1, min(count, size[0]) + 1)
    )


def _prefix_tokens(network: nn.Module) -> int:
    """Return the largest number of tokens that may precede those of the image."""
    declared = getattr(network, "num_prefix_tokens", None)
    if isinstance(declared, int):
        return declared
    named = ((name.rpartition(".")[2], value) for name, value in network.named_parameters())
    return sum(value.shape[-2] for name, value in named if name in PREFIX_TOKENS and value.ndim > 1)


def has_class_token(network: nn.Module) -> bool:
    """Return whether a network has a parameter that the libraries name as a class token."""
    return any(name.rpartition(".")[2] in CLASS_TOKENS for name, _ in network.named_parameters())


def pool(x: torch.Tensor, layout: Layout, pooling: Pooling) -> torch.Tensor:
    """Pool a layer's output to one vector per image; ``none`` keeps a map or tokens.

    Args:
        x: Output of the layer, ``(B, ...)``.
        layout: Meaning of its axes.
        pooling: How positions become one vector.

    Returns:
        A new tensor, ``(B, dim)``, or ``x`` in the order in which a store keeps it.
    """
    if pooling.kind == "none" or layout.kind == "vector":
        # A copy: the next layer may work in place.
        return layout.in_stored_order(x).clone(memory_format=torch.contiguous_format)
    if pooling.kind == "cls":
        return x[:, 0].clone()
    positions = layout.positions(x).float()
    if pooling.kind == "max":
        return positions.amax(1)
    if pooling.kind == "gem":
        powers = positions.clamp_min(GEM_FLOOR).pow(pooling.power)
        return powers.mean(1).pow(1 / pooling.power)
    if pooling.kind == "avg+max":
        return torch.cat([positions.mean(1), positions.amax(1)], 1)
    return positions.mean(1)
