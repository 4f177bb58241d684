"""What driver and workers exchange: a lease of a shard, and the receipt for it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["ATTEMPTS", "Lease", "Receipt"]

ATTEMPTS = 3  # a shard that fails this often does not fail by chance


@dataclass(frozen=True)
class Lease:
    """Right and duty of one worker to compute one shard.

    Attributes:
        shard: Index among all shards of the run's plan, from 0.
        attempt: 1, and one more for each worker that failed on the shard.
        is_copy: Whether another worker computes the shard, too. The first receipt wins.
        suspects: Full paths of images that may crash a decoder. They are decoded in a process of
            their own.
    """

    shard: int
    attempt: int = 1
    is_copy: bool = False
    suspects: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        if self.shard < 0 or self.attempt < 1:
            raise ValueError(
                f"got shard {self.shard} and attempt {self.attempt}, expected a shard from 0 "
                "and an attempt from 1"
            )


@dataclass(frozen=True)
class Receipt:
    """Report of a worker that a shard is written.

    Attributes:
        shard: Index of the shard, as in its lease.
        images: Number of images that this lease computed, without those of an earlier attempt.
        failed: How many of them have no row.
        seconds: Seconds per kind of work, see :data:`extractor.system.timing.KINDS`.
        wall_seconds: Seconds from the start of the shard to its end.
        readers: Number of threads that read files ahead.
        worker: Number of the worker. The driver sets it.
    """

    shard: int
    images: int
    failed: int
    seconds: Mapping[str, float]
    wall_seconds: float
    readers: int = 0
    worker: int = 0

    def __post_init__(self) -> None:
        if self.shard < 0 or not 0 <= self.failed <= self.images:
            raise ValueError(
                f"got shard {self.shard} with {self.failed} failures of {self.images} images, "
                "expected no more failures than images"
            )
