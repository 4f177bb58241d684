"""The number of buffers is bounded, and each has the shape of one batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.loading import PREPROCESS

from extractor.loading import buffers
from extractor.loading.buffers import MAX_BUFFERS, MIN_BUFFERS, BufferPool
from extractor.loading.options import LoaderOptions
from extractor.preprocess import Preprocess

BATCH_BYTES = 2 * 8 * 6 * 3


@pytest.mark.parametrize(
    ("memory", "count"), [(10**9, MAX_BUFFERS), (6 * BATCH_BYTES, 6), (1, MIN_BUFFERS)]
)
def test_count_follows_the_memory_limit(
    monkeypatch: pytest.MonkeyPatch, memory: int, count: int
) -> None:
    monkeypatch.setattr(buffers, "MAX_BUFFERS_BYTES", memory)
    assert len(BufferPool([PREPROCESS], LoaderOptions(2, 1))) == count


def test_each_preprocessing_has_its_own_shape() -> None:
    other = Preprocess.standard(16)
    pool = BufferPool([PREPROCESS, other], LoaderOptions(2, 1))
    assert [tuple(picture.shape) for picture in pool.take()] == [(2, 8, 6, 3), (2, 16, 16, 3)]


def test_taken_buffers_come_back() -> None:
    pool = BufferPool([PREPROCESS], LoaderOptions(2, 1))
    taken = [pool.take() for _ in range(len(pool))]
    assert len(pool) == 0
    pool.give_back(taken[0])
    assert pool.take() is taken[0]


@pytest.mark.parametrize(
    ("message", "is_enough"), [("CUDA error: out of memory", True), ("CUDA error: unknown", False)]
)
def test_memory_that_cannot_be_locked_is_taken_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    message: str,
    is_enough: bool,
) -> None:
    empty, locked = torch.empty, 0

    def limited(shape: Any, *, pin_memory: bool, **options: Any) -> torch.Tensor:
        nonlocal locked
        if pin_memory and locked == 2:
            raise RuntimeError(message)
        locked += pin_memory
        return empty(shape, **options)

    monkeypatch.setattr(torch, "empty", limited)
    options = LoaderOptions(2, 1, pin=True)
    if not is_enough:
        with pytest.raises(RuntimeError, match=message):
            BufferPool([PREPROCESS], options)
        return
    pool = BufferPool([PREPROCESS], options)
    assert (len(pool), locked) == (MIN_BUFFERS, 2)
    (warning,) = caplog.messages
    assert warning.startswith("no more memory can be page-locked (CUDA error: out of memory)")
