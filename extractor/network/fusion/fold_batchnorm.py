"""Fold batch normalizations into the convolutions before them.

After a trained convolution a batch normalization is one multiplication and one addition per channel
(Ioffe and Szegedy 2015), which the convolution's own weights and bias can do.
"""

from __future__ import annotations

from collections.abc import Callable

from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from extractor.network.fusion.trace import Chain

__all__ = ["NORMS", "fold_chain", "is_affine", "is_foldable"]

# Exact types: subclasses may scale their weights first, or choose among several.
CONVOLUTIONS = (nn.Conv2d, Conv2dSame)
NORMS = (nn.BatchNorm2d, BatchNormAct2d)


def is_foldable(module: nn.Module) -> bool:
    """Return whether a module is a convolution that computes with its weights as they are."""
    return type(module) in CONVOLUTIONS


def is_affine(norm: nn.Module) -> bool:
    """Return whether a module only multiplies and adds per channel, with an activation at most."""
    is_norm = type(norm) in NORMS and not norm.training and norm.running_mean is not None
    return is_norm and isinstance(getattr(norm, "drop", None), (nn.Identity, type(None)))


def fold_chain(network: nn.Module, chain: Chain) -> Callable[[], None]:
    """Fold the normalization of a chain into its convolution; return a function that undoes it.

    Args:
        network: The network of the chain; changed in place.
        chain: A convolution and its only follower, a normalization.
    """
    convolution, norm = chain.convolution, chain.follower
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight, bias = convolution.weight, convolution.bias
    convolution.weight, convolution.bias = fuse_conv_bn_weights(
        weight,
        bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    activation = norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity()
    put_back = chain.replace_follower(network, activation)

    def undo() -> None:
        put_back()
        convolution.weight, convolution.bias = weight, bias

    return undo
