"""What a run computes: passes over its images, each cut into shards. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from extractor.store.format import Description

__all__ = ["PassPlan", "PlannedShard", "RunPlan", "StoreTarget"]


@dataclass(frozen=True)
class StoreTarget:
    """Where the shards of one store go, and how its rows are made.

    Attributes:
        staging: Staging folder of the store.
        description: Description of its rows.
        first: Number of the first shard that the run adds to it.
        spec: Index of its embedding among those of the run.
        lock: Fail if the file system does not support locks.
    """

    staging: Path
    description: Description
    first: int
    spec: int
    lock: bool = True

    def path_in_store(self, path: bytes) -> bytes:
        """Return an absolute path of an image as the index of the store has it."""
        return path[len(os.fsencode(self.description.root).rstrip(b"/")) + 1 :]


@dataclass(frozen=True)
class PassPlan:
    """One pass over images: their rows go to one or more stores.

    Attributes:
        stores: Stores that lack the same images.
        images: Number of these images.
        shard_images: Number of images in one shard.
    """

    stores: Sequence[StoreTarget]
    images: int
    shard_images: int

    def __post_init__(self) -> None:
        if not self.stores or self.images < 1 or self.shard_images < 1:
            raise ValueError(f"{self}: expected a store and an image at least")

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.images // self.shard_images)


class PlannedShard(NamedTuple):
    """One shard of a run.

    Attributes:
        pass_index: Index of its pass.
        in_pass: Index among the shards of the pass.
        images: Indices of its images among those of the pass.
    """

    pass_index: int
    in_pass: int
    images: range


@dataclass(frozen=True)
class RunPlan:
    """All shards of a run, numbered through its passes.

    >>> plan = RunPlan([PassPlan([target], images=5, shard_images=2)])  # doctest: +SKIP
    >>> len(plan), plan[2].images  # doctest: +SKIP
    (3, range(4, 5))

    Attributes:
        passes: Passes over the images.
    """

    passes: Sequence[PassPlan]

    def __len__(self) -> int:
        """Return the number of shards."""
        return sum(each.shards for each in self.passes)

    def __iter__(self) -> Iterator[PlannedShard]:
        """Yield the shards in order."""
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, shard: int) -> PlannedShard:
        """Return a shard.

        Raises:
            IndexError: There is no such shard.
        """
        index = shard
        for number, each in enumerate(self.passes):
            if 0 <= index < each.shards:
                start = index * each.shard_images
                images = range(start, min(start + each.shard_images, each.images))
                return PlannedShard(number, index, images)
            index -= each.shards
        raise IndexError(f"shard {shard} of {len(self)}")
