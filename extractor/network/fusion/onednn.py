"""Convolutions on a CPU whose weights are kept as oneDNN takes them, and that do what follows.

By default torch brings the weights of a convolution into another layout in every pass, and each
activation and addition behind it reads and writes the whole map once more. Both can be left out:
the same operations that ``torch.compile`` makes of a network, without the time that compiling
takes.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeAlias, TypeGuard, cast

import torch
from torch import nn
from torch.autograd import forward_ad

from extractor.network.fusion.trace import Chain, Embed, find_chains
from extractor.system.cpu import has_avx2
from extractor.text import first_line

__all__ = [
    "FusedActivation",
    "PackedConv2d",
    "can_pack",
    "is_packable",
    "overwriting",
    "pack_convolutions",
    "without_packing",
]

# As oneDNN names them, with their numbers and their variant. Its ReLU makes a zero of a NaN.
Named: TypeAlias = "tuple[str, list[float], str]"
ACTIVATIONS: dict[type[nn.Module], Callable[[Any], Named]] = {
    nn.ReLU: lambda _: ("relu", [], ""),
    nn.ReLU6: lambda _: ("hardtanh", [0.0, 6.0], ""),
    nn.LeakyReLU: lambda one: ("leaky_relu", [one.negative_slope], ""),
    nn.SiLU: lambda _: ("swish", [], ""),
    nn.Hardswish: lambda _: ("hardswish", [], ""),
    nn.GELU: lambda one: ("gelu", [], one.approximate),
    nn.Sigmoid: lambda _: ("sigmoid", [], ""),
}
NOTHING: Named = ("none", [], "")

MAX_PACKED_BYTES = 2**30  # of weights: packing keeps them twice

log = logging.getLogger(__name__)

_passes = threading.local()


def can_pack(device: torch.device) -> bool:
    """Whether convolutions on a device gain by it, as far as that is known: on x86 with AVX2."""
    return (
        device.type == "cpu"
        and has_avx2()
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")
    )


def is_packable(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether it is a convolution that computes with its weights as they are, edges of zeros."""
    return (
        type(module) is nn.Conv2d
        and "weight" in module._parameters
        and "forward" not in vars(module)
        and "_conv_forward" not in vars(module)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def _is_fusible(module: nn.Module, behind_an_addition: bool) -> bool:
    """Whether a module is an activation that a convolution can do, also with an addition before."""
    return type(module) in ((nn.ReLU,) if behind_an_addition else ACTIVATIONS)


def pack_convolutions(
    network: nn.Module, embed: Embed, pixels: torch.Tensor, is_same: Callable[[], bool]
) -> list[str] | None:
    """Pack the weights of convolutions, and fuse the activations behind them; in place.

    Args:
        network: the network to change.
        embed: runs the network.
        pixels: ``(B, 3, H, W)`` float input of ``embed``.
        is_same: whether the network still computes the same embeddings.

    Returns:
        Dotted names of the fused activations; None if nothing was packed.
    """
    convolutions = [module for module in network.modules() if is_packable(module)]
    weight_bytes = sum(convolution.weight.nbytes for convolution in convolutions)
    if not can_pack(pixels.device) or weight_bytes > MAX_PACKED_BYTES:
        return None
    for sums in (True, False):  # a network may ask what only a tensor can answer
        with ExitStack() as undo:
            try:
                _, found = find_chains(network, embed, pixels, is_packable, _is_fusible, sums=sums)
                chains = {chain.convolution: chain for chain in found}
                for convolution in convolutions:
                    chain = chains.get(convolution, Chain(convolution, None, ""))
                    undo.callback(_pack(chain))
                    if chain.follower is not None:
                        fused = FusedActivation(chain.follower)
                        undo.callback(chain.replace_follower(network, fused))
                if is_same():
                    undo.pop_all()
                    return [chain.name for chain in chains.values() if chain.name]
            except Exception as error:  # a version of torch may lack an operation
                what = "with additions" if sums else "at all"
                log.info("convolutions are not packed %s: %s", what, first_line(error))
    return None


def _pack(chain: Chain) -> Callable[[], None]:
    """Let a convolution keep its weights packed, and do what follows it; the answer undoes it.

    Where that is an addition, the convolution gives something that only takes ``+``; the sum may
    come to lie where the other was, see :func:`overwriting`.
    """
    convolution = chain.convolution
    # Not another module in its place: whoever holds this one goes on to hold the right one.
    convolution.__class__ = PackedConv2d
    vars(convolution).update(
        activation=chain.follower,  # and no part of the network
        is_summed=chain.is_sum,
        may_overwrite=chain.may_overwrite,
        _kept=None,
    )
    return functools.partial(_make_plain, convolution)


@contextlib.contextmanager
def overwriting(allowed: bool) -> Iterator[None]:
    """Let convolutions of this thread overwrite what is added to them, where that may be done.

    Args:
        allowed: the pixels are of the size and the layout for which that was found out.
    """
    before = getattr(_passes, "are_known", False)
    _passes.are_known = allowed
    try:
        yield
    finally:
        _passes.are_known = before


def without_packing(network: nn.Module) -> nn.Module:
    """A copy without all this, for a compiler, that does the same; itself if nothing is packed."""
    if not any(isinstance(module, PackedConv2d) for module in network.modules()):
        return network
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        if isinstance(module, PackedConv2d):
            _make_plain(module)
        for name, child in list(module.named_children()):
            if isinstance(child, FusedActivation):
                setattr(module, name, child.activation)
    return network


def _make_plain(convolution: nn.Conv2d) -> None:
    for name in ("activation", "is_summed", "may_overwrite", "_kept"):
        delattr(convolution, name)
    convolution.__class__ = nn.Conv2d


@functools.cache
def _has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _Kept(NamedTuple):
    """Packed weights, and of which; holding these keeps others from coming to lie there."""

    storage: torch.UntypedStorage
    state: tuple[object, ...]
    packed: torch.Tensor


class PackedConv2d(nn.Conv2d):
    """A convolution with what follows it, see :func:`pack`.

    The weights are packed in the first pass, for the shape that it has: others are right as well,
    but may be slower. They are packed again when they are others, or were changed by an operation
    that torch counts; what is done to their ``data`` in place is not seen.
    """

    activation: nn.Module | None
    is_summed: bool
    may_overwrite: bool
    _kept: _Kept | None

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """``(B, channels, height, width)`` as of ``nn.Conv2d``, with the activation applied.

        Where something is added to that, no tensor but what :meth:`plus` is called by.
        """
        if self.is_summed:
            return cast(torch.Tensor, _Summand(self, given))
        if not self._can_pack(given):
            return self._activated(self._conv_forward(given, self.weight, self.bias))
        named = ACTIVATIONS[type(self.activation)](self.activation) if self.activation else NOTHING
        where, packed, bias = self._packed(given)
        computed: torch.Tensor = torch.ops.mkldnn._convolution_pointwise(
            given, packed, bias, *where, *named
        )
        return computed

    def plus(self, given: torch.Tensor, other: Any) -> torch.Tensor:
        """As :meth:`forward`, with something added before the activation."""
        if not (self._can_pack(given) and self._can_add(given, other)):
            return self._activated(self._conv_forward(given, self.weight, self.bias) + other)
        where, packed, bias = self._packed(given)
        after: tuple[Any, ...] = (*where, "add", None, "relu" if self.activation else None, [], "")
        ops = torch.ops.mkldnn
        computed: torch.Tensor
        if self._can_overwrite(other):
            computed = ops._convolution_pointwise_.binary(other, given, packed, bias, *after)
        elif self.groups == 1 and given.is_contiguous(memory_format=torch.channels_last):
            computed = ops._convolution_pointwise.binary(given, other, packed, bias, *after)
        else:  # which that operation does in two steps, and not in bfloat16
            computed = ops._convolution_pointwise(given, packed, bias, *where, *NOTHING)
            computed = self._activated(computed.add_(other))
        return computed

    def _activated(self, output: torch.Tensor) -> torch.Tensor:
        return output if self.activation is None else cast(torch.Tensor, self.activation(output))

    def _can_pack(self, given: torch.Tensor) -> bool:
        # A compiler packs by itself, and no operation here has a gradient.
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
            return False
        if forward_ad._current_level >= 0:
            return False
        dtype, with_gradient = given.dtype, torch.is_grad_enabled()
        for one in (given, self.weight, self.bias):
            if one is None:
                continue
            if not one.is_cpu or one.dtype != dtype or (with_gradient and one.requires_grad):
                return False
        known = dtype == torch.float32 or (dtype == torch.bfloat16 and _has_bfloat16())
        return known and given.ndim == 4

    def _can_add(self, given: torch.Tensor, other: object) -> bool:
        """Whether it is a tensor of the output's shape and type, without a gradient."""
        if not isinstance(other, torch.Tensor) or other.dtype != given.dtype:
            return False
        if other.device != given.device or (torch.is_grad_enabled() and other.requires_grad):
            return False
        size = [
            (length + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for length, kernel, stride, padding, dilation in zip(
                given.shape[2:],
                self.kernel_size,
                self.stride,
                cast("tuple[int, ...]", self.padding),
                self.dilation,
                strict=True,
            )
        ]
        return other.shape == (len(given), self.out_channels, *size)

    def _can_overwrite(self, other: torch.Tensor) -> bool:
        # What lies otherwise may be a view of less; and torch cannot add to all in bfloat16.
        layout = torch.channels_last
        return (
            self.may_overwrite
            and getattr(_passes, "are_known", False)
            and other.is_contiguous(memory_format=layout)
        )

    def _packed(
        self, given: torch.Tensor
    ) -> tuple[tuple[Any, ...], torch.Tensor, torch.Tensor | None]:
        """How it convolves, as the operations take it, and the weights and the bias for that."""
        where = (self.padding, self.stride, self.dilation, self.groups)
        weight, bias, kept = self.weight, self.bias, self._kept
        version = 0 if weight.is_inference() else weight._version
        state = (weight.data_ptr(), weight.dtype, weight.shape, weight.stride(), version)
        if kept is None or kept.state != state:
            packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *where, [*given.shape])
            self._kept = kept = _Kept(weight.untyped_storage(), state, packed)
        return where, kept.packed, bias

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_kept": None}  # a copy has other weights, and none can be pickled


class FusedActivation(nn.Identity):
    """In the place of an activation that the convolutions before it do."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        vars(self)["activation"] = activation  # no part of the network

    activation: nn.Module


class _Summand:
    """What a convolution will give, once it is known what is added to that."""

    __slots__ = ("_convolution", "_given")

    def __init__(self, convolution: PackedConv2d, given: torch.Tensor) -> None:
        self._convolution, self._given = convolution, given

    def __add__(self, other: Any) -> torch.Tensor:
        return self._convolution.plus(self._given, other)

    __radd__ = __iadd__ = __add__
