"""Parts of a loader without threads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch

from extractor.images.types import EncodedJpeg, ImageSource, ReadFile, StoredLayout
from extractor.loading.batch import Batch
from extractor.loading.task import Task
from extractor.loading.watchdog import Watchdog
from extractor.preprocess import Preprocess
from extractor.system.running_clock import running_seconds

SIZE = (8, 6)
PREPROCESS = Preprocess(SIZE, "squash", SIZE, "bilinear", (0, 0, 0), (1, 1, 1))


class RecordingOwner:
    """Owner that records what its batches call."""

    def __init__(self) -> None:
        self.released: list[Batch] = []
        self.resting_cores: list[int] = []
        self.is_decoding_on_host = False

    def release(self, batch: Batch) -> None:
        self.released.append(batch)

    @contextlib.contextmanager
    def resting(self, cores: int) -> Iterator[None]:
        self.resting_cores.append(cores)
        yield
        self.resting_cores.pop()

    def decode_on_host(self) -> None:
        self.is_decoding_on_host = True


def buffers(batch_size: int, level: int = 201) -> tuple[torch.Tensor, ...]:
    """Return the memory of one batch, with a level in every byte."""
    return (torch.full((batch_size, *SIZE, 3), level, dtype=torch.uint8),)


def make_batch(images: int = 2, batch_size: int = 4, owner: RecordingOwner | None = None) -> Batch:
    """Return a batch of gray images."""
    sources: Sequence[ImageSource] = [np.full((5, 5), level, np.uint8) for level in range(images)]
    return Batch(buffers(batch_size), sources, owner or RecordingOwner())


def only_hanging_images_are_late(
    monkeypatch: pytest.MonkeyPatch, hangs: Callable[[ImageSource], bool]
) -> None:
    """Give all images but some the time that they need, however busy this machine is."""
    abandon_late = Watchdog.abandon_late

    def abandon_hanging(watchdog: Watchdog) -> Iterator[Task]:
        now = running_seconds()
        for task in watchdog._running:
            if not hangs(task.origin):
                task.started = max(task.started, now)  # infinite while it waits
        return abandon_late(watchdog)

    monkeypatch.setattr(Watchdog, "abandon_late", abandon_hanging)


def read_file_of(size: int) -> ReadFile:
    """Return a file of so many bytes that was read."""
    return ReadFile(b"a.jpg", bytes(size), size, 1)


def encoded_jpeg(size: int) -> EncodedJpeg:
    """Return a JPEG of so many bytes that is left encoded."""
    return EncodedJpeg(read_file_of(size), StoredLayout(6, 8, 1))
