"""Which images have their rows already, and which are to be computed; arithmetic only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from extractor.store.index import Images
from extractor.store.journal import FailureRecord

__all__ = ["Current", "Held", "Plan", "plan"]

# Of failures that need not last although their files do: the machine was at fault.
PASSING = frozenset({"out-of-memory"})
# Of failures that may have ended without a trace in the size and the time of the file.
CLOSED = frozenset({"unreadable", "not-a-file"})


@dataclass(frozen=True)
class Current:
    """The images that are asked for, as they are now.

    Attributes:
        paths: strictly ascending.
        sizes, mtimes: ``(images,)`` int64; -1 where a file cannot be looked at.
        is_readable: whether image i can be opened.
        digests: SHA-256 of the files at several places, empty where one cannot be read; None
            where sizes and times are all that is compared.
    """

    paths: Sequence[bytes]
    sizes: npt.NDArray[np.int64]
    mtimes: npt.NDArray[np.int64]
    is_readable: Callable[[int], bool]
    digests: Callable[[Sequence[int]], Sequence[bytes]] | None = None


@dataclass(frozen=True)
class Held:
    """What a store holds, published or staged.

    Attributes:
        shards: images of each shard's rows, the later shards behind.
        live: by shard ``(rows,)``, which rows counted so far; a shard that is not in it is new.
        failures: images without a row, of the published store.
        new_failures: those that were found since, and are not tried again.
    """

    shards: Mapping[int, Images] = field(default_factory=dict)
    live: Mapping[int, npt.NDArray[np.bool_]] = field(default_factory=dict)
    failures: Sequence[FailureRecord] = ()
    new_failures: Sequence[FailureRecord] = ()


@dataclass(frozen=True)
class Plan:
    """What is to be done so that a store holds the images of a folder, each once.

    Attributes:
        todo: places of the images to compute.
        live: by shard ``(rows,)``, which rows count from now on.
        failures: that stand, in the order of their paths.
        missing: paths that have a row although their images are not asked for, in order.
        gone: rows that count no longer since their images are not asked for.
        changed: rows that count no longer since their images are others now.
    """

    todo: Sequence[int]
    live: Mapping[int, npt.NDArray[np.bool_]]
    failures: Sequence[FailureRecord]
    missing: Sequence[bytes]
    gone: int
    changed: int

    def changes(self, held: Held) -> bool:
        """Whether other rows count, or other failures stand, than in a published store."""
        same = all(np.array_equal(live, held.live[shard]) for shard, live in self.live.items())
        return not same or list(self.failures) != list(held.failures)

    @property
    def rows(self) -> int:
        """How many rows count, before any is computed."""
        return sum(int(np.count_nonzero(live)) for live in self.live.values())


def plan(current: Current, held: Held, *, keep_missing: bool = False, retry: bool = False) -> Plan:
    """Compare the images that are asked for with those that have rows.

    A row counts whose image has the same size and time of modification as when it was read, or the
    same content where digests are compared; of several the latest. So an image that went and
    came back unchanged has its row again.

    Args:
        keep_missing: rows that counted go on doing so when their images are not asked for.
        retry: try again all that failed, and not only where file or reason may be gone.
    """
    place = {path: i for i, path in enumerate(current.paths)}
    has_row = np.zeros(len(current.paths), bool)
    missing: set[bytes] = set()
    live: dict[int, npt.NDArray[np.bool_]] = {}
    gone = changed = 0
    for shard, images in sorted(held.shards.items(), reverse=True):
        counted = held.live.get(shard, np.ones(len(images), bool))
        places = np.fromiter((place.get(path, -1) for path in images.paths), np.int64, len(images))
        asked = places >= 0
        count = asked & _is_same(current, images, places)
        count[asked] &= ~has_row[places[asked]]
        has_row[places[count]] = True
        for row in np.flatnonzero(~asked & counted).tolist():
            path = images.paths[row]
            if keep_missing and path not in missing:
                missing.add(path)
                count[row] = True
        gone += int(np.count_nonzero(counted & ~asked & ~count))
        changed += int(np.count_nonzero(counted & asked & ~count))
        live[shard] = count
    failed: dict[int, FailureRecord] = {}
    for known, fresh in ((held.failures, False), (held.new_failures, True)):
        for failure in known:
            i = place.get(failure.path)
            if i is None or has_row[i] or not _is_same_file(failure, current, i):
                continue
            if fresh or not (retry or _may_be_gone(failure, current, i)):
                failed[i] = failure
    return Plan(
        todo=[int(i) for i in np.flatnonzero(~has_row) if int(i) not in failed],
        live=live,
        failures=[failure for _, failure in sorted(failed.items())],
        missing=sorted(missing),
        gone=gone,
        changed=changed,
    )


def _is_same(
    current: Current, images: Images, places: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """``(rows,)``, which images are what they were when their rows were computed."""
    if not len(current.paths):
        return np.zeros(len(images), bool)
    if current.digests is None:
        same: npt.NDArray[np.bool_] = (current.sizes[places] == images.sizes) & (
            current.mtimes[places] == images.mtimes
        )
        return same
    rows = np.flatnonzero(places >= 0)
    now = current.digests([int(place) for place in places[rows]])
    same = np.zeros(len(images), bool)
    for row, digest in zip(rows.tolist(), now, strict=True):
        same[row] = digest != b"" and digest == images.digests[row]
    return same


def _is_same_file(failure: FailureRecord, current: Current, i: int) -> bool:
    now = (int(current.sizes[i]), int(current.mtimes[i]))
    return now == (failure.size, failure.mtime_ns)


def _may_be_gone(failure: FailureRecord, current: Current, i: int) -> bool:
    if failure.reason in CLOSED:
        return current.is_readable(i)
    return failure.reason in PASSING
