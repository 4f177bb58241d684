"""Convolutions on a CPU that keep their weights in oneDNN's layout and compute an activation too.

By default torch brings the weights of a convolution into another layout in every pass, and each
activation reads and writes the whole feature map once more. The operations here are those that
``torch.compile`` generates for a network, without the time that compiling takes.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeAlias, TypeGuard, cast

import torch
from torch import nn
from torch.autograd import forward_ad

from extractor.network.fusion.trace import Embed, find_chains
from extractor.system.cpu import has_avx2
from extractor.text import first_line

__all__ = [
    "FusedActivation",
    "PackedConv2d",
    "can_pack",
    "is_packable",
    "pack_convolutions",
    "without_packing",
]

# oneDNN's name of an activation, with its scalars and its variant. Its ReLU turns a NaN into zero.
PostOp: TypeAlias = "tuple[str, list[float], str]"
ACTIVATIONS: dict[type[nn.Module], Callable[[Any], PostOp]] = {
    nn.ReLU: lambda _: ("relu", [], ""),
    nn.ReLU6: lambda _: ("hardtanh", [0.0, 6.0], ""),
    nn.LeakyReLU: lambda module: ("leaky_relu", [module.negative_slope], ""),
    nn.SiLU: lambda _: ("swish", [], ""),
    nn.Hardswish: lambda _: ("hardswish", [], ""),
    nn.GELU: lambda module: ("gelu", [], module.approximate),
    nn.Sigmoid: lambda _: ("sigmoid", [], ""),
}
NO_ACTIVATION: PostOp = ("none", [], "")

MAX_PACKED_BYTES = 2**30  # of weights: packing keeps them twice

log = logging.getLogger(__name__)


def can_pack(device: torch.device) -> bool:
    """Return whether packed convolutions are known to be faster on a device: x86 with AVX2."""
    return (
        device.type == "cpu"
        and has_avx2()
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")
    )


def is_packable(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Return whether a module is a zero-padded convolution that uses its weights as they are."""
    return (
        type(module) is nn.Conv2d
        and "weight" in module._parameters
        and "forward" not in vars(module)
        and "_conv_forward" not in vars(module)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def pack_convolutions(
    network: nn.Module, embed: Embed, pixels: torch.Tensor, is_same: Callable[[], bool]
) -> list[str] | None:
    """Pack the weights of convolutions, and fuse the activations behind them; in place.

    Args:
        network: The network to change.
        embed: Runs the network.
        pixels: ``(B, 3, H, W)`` float input of ``embed``.
        is_same: Whether the network still computes the same embeddings.

    Returns:
        Dotted names of the fused activations; None if nothing was packed.
    """
    convolutions = [module for module in network.modules() if is_packable(module)]
    weight_bytes = sum(convolution.weight.nbytes for convolution in convolutions)
    if not can_pack(pixels.device) or weight_bytes > MAX_PACKED_BYTES:
        return None
    with ExitStack() as undo:
        try:
            _, chains = find_chains(network, embed, pixels, is_packable, _is_fusible)
            activations = {chain.convolution: chain.follower for chain in chains}
            for convolution in convolutions:
                undo.callback(_pack(convolution, activations.get(convolution)))
            for chain in chains:
                undo.callback(chain.replace_follower(network, FusedActivation(chain.follower)))
            if is_same():
                undo.pop_all()
                return [chain.name for chain in chains]
            log.warning(
                "%s: convolutions are not packed, as its embeddings would change",
                type(network).__name__,
            )
        except Exception as error:  # a version of torch may lack an operation
            log.info("convolutions are not packed: %s", first_line(error))
    return None


def _is_fusible(module: nn.Module) -> bool:
    return type(module) in ACTIVATIONS


def _pack(convolution: nn.Conv2d, activation: nn.Module | None) -> Callable[[], None]:
    """Turn a convolution into a packed one; return a function that undoes it."""
    # The same object with another class: whoever holds it keeps holding the right module.
    convolution.__class__ = PackedConv2d
    # Not setattr, which would make the activation a submodule.
    vars(convolution).update(activation=activation, _cache=None)
    return functools.partial(_unpack, convolution)


def _unpack(convolution: nn.Conv2d) -> None:
    for name in ("activation", "_cache"):
        delattr(convolution, name)
    convolution.__class__ = nn.Conv2d


def without_packing(network: nn.Module) -> nn.Module:
    """Return a copy with plain convolutions and activations, for a compiler that fuses them itself.

    Returns the network itself if nothing in it is packed.
    """
    if not any(isinstance(module, PackedConv2d) for module in network.modules()):
        return network
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        if isinstance(module, PackedConv2d):
            _unpack(module)
        for name, child in list(module.named_children()):
            if isinstance(child, FusedActivation):
                setattr(module, name, child.activation)
    return network


@functools.cache
def _has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _PackedWeight(NamedTuple):
    """A packed weight, and the state of the weight it was made of.

    It holds the storage of that weight, so no other weight can get the same address meanwhile.
    """

    storage: torch.UntypedStorage
    state: tuple[object, ...]
    packed: torch.Tensor


class PackedConv2d(nn.Conv2d):
    """A convolution with packed weights that also computes the activation behind it.

    The first pass packs the weights for its input shape. Other shapes give the same result, but may
    be slower. New weights are packed again, and so are weights that an operation changed in place.
    Changes through ``weight.data`` go unnoticed.
    """

    activation: nn.Module | None
    _cache: _PackedWeight | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the convolution of ``x`` with the activation applied, ``(B, C, H, W)``."""
        if not self._can_compute(x):
            output = self._conv_forward(x, self.weight, self.bias)
            return (
                output if self.activation is None else cast(torch.Tensor, self.activation(output))
            )
        post_op = NO_ACTIVATION
        if self.activation is not None:
            post_op = ACTIVATIONS[type(self.activation)](self.activation)
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        packed = self._packed_weight(x, geometry)
        computed: torch.Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, packed, self.bias, *geometry, *post_op
        )
        return computed

    def _can_compute(self, x: torch.Tensor) -> bool:
        """Return whether oneDNN's operations take this input: they have no gradient."""
        # A compiler packs by itself.
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
            return False
        if forward_ad._current_level >= 0:
            return False
        dtype, with_gradient = x.dtype, torch.is_grad_enabled()
        for tensor in (x, self.weight, self.bias):
            if tensor is None:
                continue
            if not tensor.is_cpu or tensor.dtype != dtype:
                return False
            if with_gradient and tensor.requires_grad:
                return False
        is_supported = dtype == torch.float32 or (dtype == torch.bfloat16 and _has_bfloat16())
        return is_supported and x.ndim == 4

    def _packed_weight(self, x: torch.Tensor, geometry: tuple[Any, ...]) -> torch.Tensor:
        """Return the packed weight; pack it anew if the weight changed."""
        weight, cache = self.weight, self._cache
        version = 0 if weight.is_inference() else weight._version
        state = (weight.data_ptr(), weight.dtype, weight.shape, weight.stride(), version)
        if cache is None or cache.state != state:
            packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, [*x.shape])
            self._cache = cache = _PackedWeight(weight.untyped_storage(), state, packed)
        return cache.packed

    def __getstate__(self) -> dict[str, Any]:
        # A copy has weights of its own, and packed tensors cannot be pickled.
        return {**vars(self), "_cache": None}


class FusedActivation(nn.Identity):
    """An identity in place of an activation that the convolutions before it compute."""

    activation: nn.Module

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        vars(self)["activation"] = activation  # not a submodule
