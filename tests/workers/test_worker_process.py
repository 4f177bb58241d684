"""The child process of a worker: how it ends."""

from __future__ import annotations

import threading
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from extractor.errors import DeviceError
from extractor.workers import worker_process
from extractor.workers.worker_process import Failed


class Driver:
    """The driver's end: it sends a setup, and hears what the worker says."""

    def __init__(self, descriptor: int) -> None:
        self.heard: list[object] = []
        self._setups = [SimpleNamespace()]

    def send(self, message: object) -> None:
        self.heard.append(message)

    def recv(self) -> Any:
        if self._setups:
            return self._setups.pop()
        threading.Event().wait()  # in a daemon thread
        raise EOFError


class Tensor:
    """Memory of a device that may not be freed."""

    def __init__(self, freed: list[object]) -> None:
        self._freed = freed

    def __del__(self) -> None:
        self._freed.append(self)


class EndedError(BaseException):
    """Raised where the process would end."""


def test_a_worker_ends_before_a_broken_device_is_asked_to_free_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drivers: list[Driver] = []
    freed: list[object] = []
    freed_before: list[int] = []

    def connect(descriptor: int) -> Driver:
        drivers.append(Driver(descriptor))
        return drivers[-1]

    def work(*_: object, **__: object) -> None:
        tensor = Tensor(freed)
        raise DeviceError(f"cuda:0 does not work: {type(tensor).__name__}")

    def end(code: int) -> None:
        freed_before.append(len(freed))
        raise EndedError("at once")

    monkeypatch.setattr(worker_process, "Connection", connect)
    monkeypatch.setattr(worker_process, "work", work)
    monkeypatch.setattr("os._exit", end)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("ctypes.CDLL", lambda _: SimpleNamespace())
    for name in ("keep_freed_memory", "spin_briefly"):
        monkeypatch.setattr(worker_process, name, lambda: None)
    logger = SimpleNamespace(addHandler=lambda _: None)
    logging = SimpleNamespace(getLogger=lambda _: logger, NullHandler=object)
    monkeypatch.setattr(worker_process, "logging", logging)
    with warnings.catch_warnings(), pytest.raises(EndedError, match="at once"):
        worker_process.main(0)
    assert drivers[0].heard == [Failed("DeviceError", "cuda:0 does not work: Tensor")]
    assert freed_before == [0]
