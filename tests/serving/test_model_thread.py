"""The computing thread: answers in order, gathering, errors, and its end."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from extractor.errors import UsageError
from extractor.serving.model_thread import Calls, GatherOptions, ModelThread


def pictures(*values: int) -> tuple[np.ndarray]:
    return (np.array(values, np.uint8).reshape(-1, 1, 1, 1),)


class Doubling:
    """A model that doubles its only pixel, and notes the size of every pass."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.may_compute = threading.Event()
        self.may_compute.set()

    def __call__(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        self.may_compute.wait(10)
        self.sizes.append(len(arrays[0]))
        if (arrays[0] == 255).any():
            raise ValueError("pixel 255")
        return arrays[0].reshape(-1, 1).astype(np.float32) * 2


def start(model: Any, calls: Calls | None = None, **options: Any) -> ModelThread:
    options = {"max_images": 4} | options
    return ModelThread(model, None, GatherOptions(**options), calls or Calls())


def test_each_request_gets_its_own_rows() -> None:
    thread = start(Doubling())
    futures = [thread.submit(pictures(i, i + 1)) for i in range(5)]
    rows = [future.result(10).ravel().tolist() for future in futures]
    assert rows == [[2 * i, 2 * i + 2] for i in range(5)]
    thread.close()


def test_requests_are_computed_alone_without_a_window() -> None:
    model = Doubling()
    model.may_compute.clear()
    thread = start(model)
    futures = [thread.submit(pictures(i)) for i in range(4)]
    model.may_compute.set()
    assert [future.result(10).item() for future in futures] == [0, 2, 4, 6]
    assert model.sizes == [1, 1, 1, 1]


def test_waiting_requests_share_passes_up_to_the_batch_size() -> None:
    model = Doubling()
    model.may_compute.clear()
    thread = start(model, window_seconds=0.0)
    futures = [thread.submit(pictures(0))]
    time.sleep(0.05)  # the thread has taken the first one
    futures += [thread.submit(pictures(*values)) for values in ([1], [2, 3], [4, 5], [6])]
    model.may_compute.set()
    assert [future.result(10).ravel().tolist() for future in futures] == [
        [0], [2], [4, 6], [8, 10], [12],
    ]  # fmt: skip
    assert model.sizes == [1, 3, 3]


def test_lone_call_does_not_wait_for_the_window() -> None:
    thread = start(Doubling(), window_seconds=30.0)
    assert thread.submit(pictures(1)).result(10).item() == 2


def test_window_waits_for_calls_in_progress() -> None:
    model, calls = Doubling(), Calls()
    thread = start(model, calls, window_seconds=30.0)
    calls.enter()
    first = thread.submit(pictures(1))
    time.sleep(0.05)
    assert not first.done()
    calls.leave()
    second = thread.submit(pictures(2))
    assert (first.result(10).item(), second.result(10).item()) == (2, 4)
    assert model.sizes == [2]


def test_window_ends_although_a_call_stays_in_progress() -> None:
    calls = Calls()
    calls.enter()
    thread = start(Doubling(), calls, window_seconds=0.01)
    assert thread.submit(pictures(3)).result(10).item() == 6


def test_error_of_a_pass_reaches_its_requests_and_no_other() -> None:
    thread = start(Doubling())
    bad, good = thread.submit(pictures(255)), thread.submit(pictures(7))
    with pytest.raises(ValueError, match="pixel 255"):
        bad.result(10)
    assert good.result(10).item() == 14


def test_cancelled_request_is_not_computed() -> None:
    model = Doubling()
    model.may_compute.clear()
    thread = start(model)
    first, second = thread.submit(pictures(1)), thread.submit(pictures(2))
    assert second.cancel()
    model.may_compute.set()
    third = thread.submit(pictures(3))
    assert (first.result(10).item(), third.result(10).item()) == (2, 6)
    assert model.sizes == [1, 1]


def test_rows_of_gathered_requests_share_no_memory() -> None:
    model = Doubling()
    model.may_compute.clear()
    thread = start(model, window_seconds=0.0)
    thread.submit(pictures(0))
    time.sleep(0.05)
    a, b = thread.submit(pictures(1)), thread.submit(pictures(2))
    model.may_compute.set()
    assert a.result(10).base is None
    assert b.result(10).base is None


def test_close_answers_what_was_submitted_and_refuses_the_rest() -> None:
    model = Doubling()
    model.may_compute.clear()
    thread = start(model, window_seconds=5.0)
    futures = [thread.submit(pictures(i)) for i in range(3)]
    thread.close()
    model.may_compute.set()
    assert [future.result(10).item() for future in futures] == [0, 2, 4]
    with pytest.raises(UsageError, match="closed"):
        thread.submit(pictures(1))


def test_thread_count_is_that_of_the_model_thread_alone() -> None:
    counts: list[int] = []

    def count(arrays: Sequence[np.ndarray]) -> np.ndarray:
        counts.append(torch.get_num_threads())
        return np.zeros((1, 1), np.float32)

    here = torch.get_num_threads()
    thread = ModelThread(count, here + 1, GatherOptions(1), Calls())
    thread.submit(pictures(1)).result(10)
    thread.submit(pictures(1)).result(10)
    elsewhere: list[int] = []
    other = threading.Thread(target=lambda: elsewhere.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert counts == [here + 1, here + 1]
    assert (torch.get_num_threads(), elsewhere) == (here, [here])
