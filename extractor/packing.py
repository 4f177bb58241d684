"""Convolutions on a CPU with their weights kept as oneDNN computes with them, and activations with.

By default torch brings the weights of a convolution into another layout in every pass, and what
follows reads and writes the whole map once more. Both can be left out: the same operations that
``torch.compile`` makes of a network, without the time that compiling takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import nn
from torch.nn import functional

from extractor.devices import has_avx2

__all__ = ["can_pack", "is_packable", "pack", "takes_activation"]

# As oneDNN names them, with their numbers and their variant.
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
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def takes_activation(module: nn.Module) -> bool:
    """Whether a module is an activation that a convolution can do."""
    return type(module) in ACTIVATIONS


def pack(convolution: nn.Conv2d, activation: nn.Module | None = None) -> Callable[[], None]:
    """Let a convolution keep its weights packed, and do what follows it; the answer undoes it."""
    convolution._conv_forward = _Packed(convolution, activation)  # type: ignore[assignment]

    def undo() -> None:
        del convolution._conv_forward

    return undo


_State: TypeAlias = tuple[int, torch.dtype, int]


class _Packed:
    """What a convolution computes, in the place of its ``_conv_forward``.

    The weights are packed in the first pass of each type of numbers, for the shape that it has:
    others are right as well, but may be slower.
    """

    def __init__(self, convolution: nn.Conv2d, activation: nn.Module | None) -> None:
        self._stride = convolution.stride
        self._padding: Any = convolution.padding  # numbers; is_packable saw to that
        self._dilation = convolution.dilation
        self._groups = convolution.groups
        self._activation = activation
        self._named = ACTIVATIONS[type(activation)](activation) if activation else NOTHING
        self._kept: tuple[_State, torch.Tensor] | None = None

    def __call__(
        self, given: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        # A compiler packs by itself, and does not see through this.
        if torch.compiler.is_compiling() or not _can_compute(given, weight):
            output = functional.conv2d(
                given, weight, bias, self._stride, self._padding, self._dilation, self._groups
            )
            return output if self._activation is None else self._activation(output)
        where = (self._padding, self._stride, self._dilation, self._groups)
        kept, state = self._kept, _state(weight)
        if kept is None or kept[0] != state:
            reorder = torch.ops.mkldnn._reorder_convolution_weight
            self._kept = kept = (state, reorder(weight, *where, list(given.shape)))
        computed: torch.Tensor = torch.ops.mkldnn._convolution_pointwise(
            given, kept[1], bias, *where, *self._named
        )
        return computed

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_kept": None}  # a copy has other weights, and none can be pickled


def _state(weight: torch.Tensor) -> _State:
    """Changes when a weight does, but for what is done to its ``data`` in place."""
    version = 0 if weight.is_inference() else weight._version
    return weight.data_ptr(), weight.dtype, version


def _can_compute(given: torch.Tensor, weight: torch.Tensor) -> bool:
    if given.device.type != "cpu" or given.dtype != weight.dtype or given.ndim != 4:
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
