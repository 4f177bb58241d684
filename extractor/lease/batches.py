"""Plan of a run: images to shards to batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["BatchPlan", "plan_batches"]


class BatchPlan(NamedTuple):
    """One batch: images ``start`` to ``stop`` of a list, all of one shard."""

    shard: int
    start: int
    stop: int


def plan_batches(images: int, *, shard_images: int, batch_size: int) -> Iterator[BatchPlan]:
    """Cut a list of images into shards, and each shard into batches.

    No batch spans two shards. So a shard can be computed alone, and an image has the same position
    in its batch wherever the work starts.

    >>> list(plan_batches(5, shard_images=3, batch_size=2))
    [BatchPlan(shard=0, start=0, stop=2), BatchPlan(shard=0, start=2, stop=3), \
BatchPlan(shard=1, start=3, stop=5)]
    """
    for shard, first in enumerate(range(0, images, shard_images)):
        last = min(first + shard_images, images)
        for start in range(first, last, batch_size):
            yield BatchPlan(shard, start, min(start + batch_size, last))
