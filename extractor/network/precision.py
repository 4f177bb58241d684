"""Precision of a network's weights and activations: float32, half precision, or mixed."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import nn

__all__ = [
    "WEIGHT_DTYPES",
    "convert",
    "faster_precisions",
    "has_matrix_units",
    "input_dtype",
    "resolve_precision",
]

# Type of a network's weights; with `mixed`, of all but the sensitive ones.
WEIGHT_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "mixed": torch.bfloat16,
}

CPU_FLAGS = Path("/proc/cpuinfo")
MATRIX_FLAG = "amx_bf16"
BFLOAT16_FLAGS = {"avx512_bf16", MATRIX_FLAG}  # without them bfloat16 is slower than float32
# Smallest compute capability with tensor cores for this type.
FLOAT16_CAPABILITY, BFLOAT16_CAPABILITY = (7, 0), (8, 0)


def resolve_precision(name: str) -> str:
    """Return the precision in which a backbone is loaded: float32 for ``auto``, else ``name``."""
    return "float32" if name == "auto" else name


def input_dtype(precision: str) -> torch.dtype:
    """Return the type of a network's input pixels; ``mixed`` starts in float32."""
    return torch.float32 if precision == "mixed" else WEIGHT_DTYPES[precision]


def faster_precisions(device: torch.device) -> tuple[str, ...]:
    """Return the precisions that may be faster than float32 on a device, fastest first."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        required = (("float16", FLOAT16_CAPABILITY), ("bfloat16", BFLOAT16_CAPABILITY))
        return tuple(name for name, least in required if capability >= least)
    if device.type == "cpu" and _cpu_flags() & BFLOAT16_FLAGS:
        return ("bfloat16", "mixed")
    return ()


def has_matrix_units() -> bool:
    """Return whether the processor multiplies matrices of bfloat16 in hardware (Intel AMX)."""
    return MATRIX_FLAG in _cpu_flags()


def _cpu_flags() -> set[str]:
    try:
        lines = CPU_FLAGS.read_text("ascii", "replace").splitlines()
    except OSError:  # not Linux
        return set()
    return {flag for line in lines if line.startswith("flags") for flag in line.split()}


def convert(network: nn.Module, precision: str) -> None:
    """Convert a float32 network to another precision, in place.

    ``mixed`` leaves the first module with weights, depthwise convolutions and normalizations in
    float32: they suffer most from rounding and are a small part of the computation.

    Args:
        network: A network in float32.
        precision: ``float32``, ``bfloat16``, ``float16`` or ``mixed``.
    """
    if precision != "mixed":
        network.to(WEIGHT_DTYPES[precision])
        return
    half = WEIGHT_DTYPES[precision]
    leaves = (module for module in network.modules() if _is_leaf(module))
    first = next((module for module in leaves if _own_tensors(module)), None)
    for module in network.modules():
        if module is first or _is_sensitive(module):
            module.register_forward_pre_hook(functools.partial(_cast_args, half, torch.float32))
            module.register_forward_hook(functools.partial(_cast_output, half))
        elif tensors := _own_tensors(module):
            module.register_forward_pre_hook(functools.partial(_cast_args, torch.float32, half))
            for tensor in tensors:
                tensor.data = tensor.data.to(half)


def _own_tensors(module: nn.Module) -> list[torch.Tensor]:
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _is_sensitive(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == module.in_channels > 1
    return "norm" in type(module).__name__.lower() and bool(_own_tensors(module))


def _cast_args(
    source: torch.dtype, target: torch.dtype, _: nn.Module, args: tuple[object, ...]
) -> tuple[object, ...]:
    """Forward pre-hook: cast the arguments of type ``source`` to ``target``."""
    return tuple(
        arg.to(target) if isinstance(arg, torch.Tensor) and arg.dtype == source else arg
        for arg in args
    )


def _cast_output(target: torch.dtype, _: nn.Module, __: object, output: object) -> object:
    """Forward hook: cast a tensor to ``target``."""
    return output.to(target) if isinstance(output, torch.Tensor) else output
