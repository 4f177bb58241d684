"""Images and batches leave the queue in the order of the plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from support.loading import PREPROCESS, RecordingOwner

from extractor.images.types import ImageInfo, ImageSource
from extractor.loading.buffers import MAX_BUFFERS, BufferPool
from extractor.loading.options import LoaderOptions
from extractor.loading.task import Task
from extractor.loading.task_queue import TaskQueue

INFO = ImageInfo(-1, -1, 5, 5)


class Queue(TaskQueue):
    """Queue over batches of gray images, which counts calls at the end of its plan."""

    def __init__(self, sizes: Sequence[int], batch_size: int = 3) -> None:
        self.ends = 0
        self.opened = 0
        self.pool = BufferPool([PREPROCESS], LoaderOptions(batch_size, 1))
        super().__init__(self.plan(sizes), batch_size, self.pool, RecordingOwner(), self.end)

    def plan(self, sizes: Sequence[int]) -> Iterator[list[ImageSource]]:
        level = 0
        for size in sizes:
            self.opened += 1
            yield [np.full((5, 5), level + i, np.uint8) for i in range(size)]
            level += size

    def end(self) -> None:
        self.ends += 1

    def claim_all(self) -> list[Task]:
        tasks = []
        while self.prepare_next():
            tasks.append(self.claim())
        return tasks


def test_tasks_come_in_the_order_of_the_plan() -> None:
    tasks = Queue([3, 1, 2]).claim_all()
    assert [int(task.origin[0, 0]) for task in tasks] == list(range(6))  # type: ignore[index,call-overload]
    assert [task.index for task in tasks] == [0, 1, 2, 0, 0, 1]


def test_plan_is_read_as_far_as_buffers_go() -> None:
    queue = Queue([1] * 100)
    assert len(queue.claim_all()) == queue.opened == MAX_BUFFERS
    assert not queue.is_exhausted
    queue.pool.give_back(queue.pool.allocate())
    assert len(queue.claim_all()) == 1


def test_end_of_the_plan_is_reported_once() -> None:
    queue = Queue([2])
    queue.claim_all()
    assert not queue.prepare_next()
    assert queue.is_exhausted
    assert queue.ends == 1


def test_first_batch_is_decided_when_it_is_complete() -> None:
    queue = Queue([1, 1])
    first, second = queue.claim_all()
    second.settle(INFO)
    assert not queue.is_first_decided
    first.settle(INFO)
    assert queue.is_first_decided
    assert queue.pop_first() is first.batch
    assert queue.pop_first() is second.batch
    assert queue.pop_first() is None


def test_empty_plan_is_decided_once_it_was_read() -> None:
    queue = Queue([])
    assert not queue.is_first_decided
    assert queue.claim_all() == []
    assert queue.is_first_decided


@pytest.mark.parametrize("size", [0, 4])
def test_batches_of_the_wrong_size_are_an_error(size: int) -> None:
    with pytest.raises(ValueError, match=f"a batch of {size} images, expected 1 to 3"):
        Queue([size]).prepare_next()


def test_plan_that_raised_is_not_exhausted() -> None:
    class Failing(Queue):
        def plan(self, sizes: Sequence[int]) -> Iterator[list[ImageSource]]:
            yield from super().plan(sizes)
            raise OSError("the disk is gone")

    queue = Failing([1])
    with pytest.raises(OSError, match="the disk is gone"):
        queue.claim_all()
    assert not queue.prepare_next()  # asked by another thread, before the error is known
    assert not queue.is_exhausted
    assert queue.ends == 0
