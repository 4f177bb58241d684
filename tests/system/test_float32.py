"""Devices do not round float32, and the switches of the program around come back."""

from __future__ import annotations

import contextlib
import operator
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from extractor.errors import DeviceError
from extractor.system import float32
from extractor.system.float32 import full_float32

HAS_SWITCHES = hasattr(torch.backends.cudnn, "conv")  # torch 2.9 and later
needs_switches = pytest.mark.skipif(not HAS_SWITCHES, reason="this torch has older switches only")

PARENTS = ("fp32_precision", "cudnn.fp32_precision", "mkldnn.fp32_precision")
backends: Any = torch.backends


def state() -> dict[str, Any]:
    """Return what each switch of torch says; the error's type where it refuses to be read."""
    readers: dict[str, Callable[[], Any]] = {
        "allow_tf32": lambda: backends.cudnn.allow_tf32,
        "matmul.allow_tf32": lambda: backends.cuda.matmul.allow_tf32,
        "matmul": torch.get_float32_matmul_precision,
    }
    if HAS_SWITCHES:
        for name in (*PARENTS, *(f"{name}.fp32_precision" for name in float32.PARENTS)):
            readers[name] = lambda name=name: operator.attrgetter(name)(backends)
    found = {}
    for name, read in readers.items():
        try:
            found[name] = read()
        except RuntimeError as error:
            found[name] = type(error)
    return found


@pytest.fixture(autouse=True)
def default_switches() -> Iterator[None]:
    """Put all switches back to torch's defaults."""
    yield
    if HAS_SWITCHES:
        backends.fp32_precision = "none"
        for name in ("cuda.matmul", "mkldnn.conv", "mkldnn.matmul"):
            operator.attrgetter(name)(backends).fp32_precision = "none"
    backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")


def global_tf32() -> None:
    backends.fp32_precision = "tf32"


def only_convolutions() -> None:
    backends.cudnn.conv.fp32_precision = "ieee"


def products() -> None:
    backends.cuda.matmul.fp32_precision = "tf32"


def mixture() -> None:
    backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("medium")
    backends.fp32_precision = "tf32"
    backends.cudnn.conv.fp32_precision = "tf32"


PROGRAMS = [
    lambda: None,
    lambda: torch.set_float32_matmul_precision("medium"),
    lambda: torch.set_float32_matmul_precision("high"),
    lambda: setattr(backends.cudnn, "allow_tf32", False),
    lambda: setattr(backends.cuda.matmul, "allow_tf32", True),
]
NEWER_PROGRAMS = [
    pytest.param(program, marks=needs_switches)
    for program in (global_tf32, only_convolutions, products, mixture)
]


@pytest.mark.parametrize("program", [*PROGRAMS, *NEWER_PROGRAMS])
def test_no_float32_is_rounded_and_all_switches_come_back(program: Callable[[], object]) -> None:
    program()
    before = state()
    with full_float32():
        inside = state()
        with full_float32():  # another thread, or a retry
            pass
        assert state() == inside
    assert inside["allow_tf32"] is False
    assert inside["matmul.allow_tf32"] is False
    assert inside["matmul"] == "highest"
    if HAS_SWITCHES:
        assert {inside[f"{name}.fp32_precision"] for name in float32.PARENTS} == {"ieee"}
    assert state() == before


@needs_switches
def test_inherited_switches_still_follow_the_global_one() -> None:
    backends.fp32_precision = "tf32"
    with full_float32():
        pass
    backends.fp32_precision = "ieee"
    assert backends.cuda.matmul.fp32_precision == "ieee"
    assert backends.mkldnn.matmul.fp32_precision == "ieee"


def test_last_thread_switches_rounding_on_again() -> None:
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with full_float32():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    with full_float32():
        assert entered.wait(10)
    assert backends.cudnn.allow_tf32 is False
    leave.set()
    thread.join()
    assert backends.cudnn.allow_tf32 is True


def test_torch_without_the_newer_switches_uses_the_older_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(float32, "_read", lambda _: None)
    torch.set_float32_matmul_precision("high")
    with full_float32():
        assert backends.cudnn.allow_tf32 is False
        assert torch.get_float32_matmul_precision() == "highest"
    assert backends.cudnn.allow_tf32 is True
    assert torch.get_float32_matmul_precision() == "high"


def test_deprecated_switches_cause_no_warning(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    setter = torch.set_float32_matmul_precision
    warned: list[str] = []

    def warn_once(value: str) -> None:
        if not warned:
            warned.append(value)
            warnings.warn(f"{float32.DEPRECATED} behavior, such as", UserWarning, stacklevel=1)
        setter(value)

    monkeypatch.setattr(torch, "set_float32_matmul_precision", warn_once)
    context = float32._FullFloat32()
    for _ in range(2):
        with context:
            assert torch.backends.cudnn.allow_tf32 is False
    assert warned == ["highest"]
    assert not recwarn.list
    assert torch.backends.cudnn.allow_tf32 is True


@needs_switches
def test_switch_without_effect_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    before = state()
    write = float32._write

    def stuck(name: str, value: str) -> None:
        write(name, "tf32" if name == "cudnn.conv" else value)

    with monkeypatch.context() as patch:
        patch.setattr(float32, "_write", stuck)
        with pytest.raises(DeviceError, match=r"rounds float32 .* \(cudnn\.conv tf32\)"):
            full_float32().__enter__()
    assert state() == before
    with contextlib.ExitStack() as stack:  # nothing is counted as inside
        stack.enter_context(full_float32())
        assert backends.cudnn.allow_tf32 is False
    assert state() == before
