"""Keep float32 computations from rounding their inputs to TF32 or bfloat16."""

from __future__ import annotations

import contextlib
import functools
import operator
import threading
import warnings
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from extractor.errors import DeviceError

__all__ = ["full_float32", "without_autocast"]

# Switches of torch 2.9 and later below torch.backends, and what each inherits where it is "none".
# https://docs.pytorch.org/docs/stable/notes/cuda.html, "TensorFloat-32 (TF32) on Ampere"
PARENTS = {
    "cudnn.conv": "cudnn",
    "cudnn.rnn": "cudnn",
    "cuda.matmul": "cudnn",
    "mkldnn.conv": "mkldnn",
    "mkldnn.matmul": "mkldnn",
}
EXACT, INHERITED = "ieee", "none"

DEPRECATED = "Please use the new API settings to control TF32"


class _Saved(NamedTuple):
    """State of all switches.

    Attributes:
        convolutions: Older switch of convolutions on a GPU; None if torch refuses to tell.
        products: Older switch of matrix products; None if torch refuses to tell.
        switches: Value of each newer switch, by its name.
    """

    convolutions: bool | None
    products: str | None
    switches: dict[str, str]


class _FullFloat32:
    """Switches rounding off for the whole process until the last thread leaves."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._saved = _Saved(None, None, {})
        self._is_first = True

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside and self._is_first:
                # From 2.9 on, torch warns once of each of its older switches.
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", DEPRECATED)
                    self._begin()
                self._is_first = False
            elif not self._inside:
                self._begin()
            self._inside += 1

    def _begin(self) -> None:
        self._saved = _save()
        try:
            _switch_off(self._saved)
        except BaseException:
            _restore(self._saved)
            raise

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                _restore(self._saved)


_full_float32 = _FullFloat32()


def full_float32() -> AbstractContextManager[None]:
    """Return a context in which devices take float32 inputs as they are.

    A program may have allowed TF32 or bfloat16 by any of torch's switches. They are as before once
    the last thread has left.

    Raises:
        DeviceError: On entering, if torch rounds nevertheless.
    """
    return _full_float32


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which a program's :class:`torch.autocast` has no effect on a device.

    The precision of a network is that of its weights, wherever it is called.
    """
    if device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _save() -> _Saved:
    convolutions = products = None
    with contextlib.suppress(RuntimeError):  # the program has used the newer switches
        convolutions = torch.backends.cudnn.allow_tf32
    with contextlib.suppress(RuntimeError):
        products = torch.get_float32_matmul_precision()
    switches = {}
    inherited = {parent: _read(parent) for parent in set(PARENTS.values())}
    for name, parent in PARENTS.items():
        value = _read(name)
        if value is not None:
            switches[name] = INHERITED if value == inherited[parent] else value
    return _Saved(convolutions, products, switches)


def _switch_off(saved: _Saved) -> None:
    # The older switches are set, too: torch refuses to read them while both kinds disagree.
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    for name in saved.switches:
        _write(name, EXACT)
    effective = {name: _read(name) for name in saved.switches}
    rounding = [f"{name} {value}" for name, value in effective.items() if value != EXACT]
    if not saved.switches and torch.backends.cudnn.allow_tf32:
        rounding.append("cudnn.allow_tf32")
    if rounding:
        raise DeviceError(
            f"this torch ({torch.__version__}) rounds float32 whatever its switches say "
            f"({', '.join(rounding)}); try another version of torch"
        )


def _restore(saved: _Saved) -> None:
    if saved.convolutions is not None:
        torch.backends.cudnn.allow_tf32 = saved.convolutions
    if saved.products is not None:
        torch.set_float32_matmul_precision(saved.products)
    for name, value in saved.switches.items():
        _write(name, value)


def _read(name: str) -> str | None:
    """Return the effective precision of an operation or a backend; None before torch 2.9."""
    value: str | None = getattr(_switch(name), "fp32_precision", None)
    return value


def _write(name: str, value: str) -> None:
    _switch(name).fp32_precision = value


@functools.cache
def _switch(name: str) -> Any:
    """Return the object of an operation or a backend; None if torch has none."""
    try:
        return operator.attrgetter(name)(torch.backends)
    except AttributeError:
        return None
