"""In which numbers a network computes: float32, half precision, or both."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import nn

__all__ = [
    "TYPES",
    "candidates",
    "convert",
    "has_matrix_units",
    "input_type",
    "resolve_precision",
]

# That a network's weights have, but for the sensitive ones of `mixed`.
TYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "mixed": torch.bfloat16,
}

CPU_FLAGS = Path("/proc/cpuinfo")
MATRIX_FLAG = "amx_bf16"
BFLOAT16_FLAGS = {"avx512_bf16", MATRIX_FLAG}  # without them bfloat16 is slower than float32
HALF_SINCE, BFLOAT16_SINCE = (7, 0), (8, 0)  # compute capability: tensor cores that take them


def resolve_precision(name: str) -> str:
    """What a backbone that is loaded alone computes in; ``auto`` is float32 there."""
    return "float32" if name == "auto" else name


def input_type(precision: str) -> torch.dtype:
    """Of the pixels that a network takes; ``mixed`` begins in float32."""
    return torch.float32 if precision == "mixed" else TYPES[precision]


def candidates(device: torch.device) -> tuple[str, ...]:
    """What may be faster than float32 on a device, the fastest first."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        known = (("float16", HALF_SINCE), ("bfloat16", BFLOAT16_SINCE))
        return tuple(name for name, since in known if capability >= since)
    if device.type == "cpu" and _cpu_flags() & BFLOAT16_FLAGS:
        return ("bfloat16", "mixed")
    return ()


def has_matrix_units() -> bool:
    """Whether the processor multiplies whole matrices of bfloat16 (Intel's AMX)."""
    return MATRIX_FLAG in _cpu_flags()


def _cpu_flags() -> set[str]:
    try:
        lines = CPU_FLAGS.read_text("ascii", "replace").splitlines()
    except OSError:  # no Linux
        return set()
    return {flag for line in lines if line.startswith("flags") for flag in line.split()}


def convert(module: nn.Module, precision: str) -> None:
    """Change the numbers of a float32 network in place.

    In ``mixed`` the first module with weights, depthwise convolutions and normalisations stay in
    float32: rounding hurts there most, and they are a small part of the work.
    """
    if precision != "mixed":
        module.to(TYPES[precision])
        return
    half = TYPES[precision]
    first = next((one for one in module.modules() if _is_leaf(one) and _own(one)), None)
    for part in module.modules():
        if part is first or _is_sensitive(part):
            part.register_forward_pre_hook(functools.partial(_take, half, torch.float32))
            part.register_forward_hook(functools.partial(_give, half))
        elif tensors := _own(part):
            part.register_forward_pre_hook(functools.partial(_take, torch.float32, half))
            for tensor in tensors:
                tensor.data = tensor.data.to(half)


def _own(module: nn.Module) -> list[torch.Tensor]:
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _is_sensitive(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == module.in_channels > 1
    return "norm" in type(module).__name__.lower() and bool(_own(module))


def _take(
    wrong: torch.dtype, right: torch.dtype, _: nn.Module, given: tuple[object, ...]
) -> tuple[object, ...]:
    """What a module is given, in the numbers of its weights."""
    return tuple(
        one.to(right) if isinstance(one, torch.Tensor) and one.dtype == wrong else one
        for one in given
    )


def _give(half: torch.dtype, _: nn.Module, __: object, output: object) -> object:
    return output.to(half) if isinstance(output, torch.Tensor) else output
