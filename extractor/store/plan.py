"""Compare images with existing rows: which rows count, and which images to compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from extractor.store.failures import FailureRecord
from extractor.store.index import Images

__all__ = ["Plan", "Snapshot", "StoredImages", "count_unchanged", "plan_run"]

# Failures of the machine. They may not happen again, even with the same file.
TRANSIENT = frozenset({"out-of-memory"})
# Failures to open a file. Their cause can go away while size and mtime stay the same.
UNOPENED = frozenset({"unreadable", "not-a-file"})
# Failures for want of a decoder, which may be installed meanwhile. Before there were decoders of
# more formats than Pillow's, their files were recorded as no images.
UNDECODABLE = frozenset({"no-decoder", "not-an-image"})


@dataclass(frozen=True)
class Snapshot:
    """The requested images as they are now.

    Attributes:
        paths: paths relative to the root, strictly ascending.
        sizes: ``(images,)`` int64, bytes; -1 if a file has no status.
        mtimes: ``(images,)`` int64, nanoseconds; -1 if a file has no status.
        is_readable: returns whether the image at an index can be opened.
        digests: returns the SHA-256 of the files at several indices, empty for an unreadable one.
            None compares sizes and times only.
        has_decoder: returns whether the decoder that the image at an index needs beside Pillow is
            installed.
    """

    paths: Sequence[bytes]
    sizes: npt.NDArray[np.int64]
    mtimes: npt.NDArray[np.int64]
    is_readable: Callable[[int], bool]
    digests: Callable[[Sequence[int]], Sequence[bytes]] | None = None
    has_decoder: Callable[[int], bool] = lambda index: False


@dataclass(frozen=True)
class StoredImages:
    """Images with rows and failures of a store, published or staged.

    Attributes:
        shards: images of the rows of each shard, by shard number.
        live: by shard number ``(rows,)``, the rows that counted so far; new shards are left out.
        failures: images without a row in the published store.
        new_failures: failures that were found since then; they are not retried.
    """

    shards: Mapping[int, Images] = field(default_factory=dict)
    live: Mapping[int, npt.NDArray[np.bool_]] = field(default_factory=dict)
    failures: Sequence[FailureRecord] = ()
    new_failures: Sequence[FailureRecord] = ()


@dataclass(frozen=True)
class Plan:
    """Steps after which a store holds each requested image once.

    Attributes:
        todo: indices of the images to compute, ascending.
        live: by shard number ``(rows,)``, the rows that count from now on.
        failures: failures that remain, in the order of their paths.
        missing: paths whose rows are kept although their images are not requested, in order.
        gone: number of rows that are retired because their images are not requested.
        changed: number of rows that are retired because their images changed.
    """

    todo: Sequence[int]
    live: Mapping[int, npt.NDArray[np.bool_]]
    failures: Sequence[FailureRecord]
    missing: Sequence[bytes]
    gone: int
    changed: int

    def changes(self, stored: StoredImages) -> bool:
        """Return whether rows or failures differ from those of a published store."""
        same = all(np.array_equal(live, stored.live[shard]) for shard, live in self.live.items())
        return not same or list(self.failures) != list(stored.failures)

    @property
    def rows(self) -> int:
        """Number of rows that count before any image is computed."""
        return sum(int(np.count_nonzero(live)) for live in self.live.values())


def plan_run(
    snapshot: Snapshot, stored: StoredImages, *, keep_missing: bool = False, retry: bool = False
) -> Plan:
    """Compare the requested images with those that have rows.

    A row counts if its image has the same size and modification time as when it was read. With
    digests, it counts if its image has the same content. The latest of several such rows counts,
    so an image that disappears and comes back unchanged gets its row back.

    Args:
        snapshot: the requested images.
        stored: the images of the store.
        keep_missing: keep rows that counted so far although their images are not requested.
        retry: retry all failures, not only those whose file or cause may have changed.
    """
    index = {path: i for i, path in enumerate(snapshot.paths)}
    has_row = np.zeros(len(snapshot.paths), bool)
    missing: set[bytes] = set()
    live: dict[int, npt.NDArray[np.bool_]] = {}
    gone = changed = 0
    for shard, images in sorted(stored.shards.items(), reverse=True):
        counted = stored.live.get(shard, np.ones(len(images), bool))
        indices = np.fromiter((index.get(path, -1) for path in images.paths), np.int64, len(images))
        requested = indices >= 0
        counts = requested & _are_same(snapshot, images, indices)
        counts[requested] &= ~has_row[indices[requested]]
        has_row[indices[counts]] = True
        for row in np.flatnonzero(~requested & counted).tolist():
            path = images.paths[row]
            if keep_missing and path not in missing:
                missing.add(path)
                counts[row] = True
        gone += int(np.count_nonzero(counted & ~requested & ~counts))
        changed += int(np.count_nonzero(counted & requested & ~counts))
        live[shard] = counts
    failed = _remaining_failures(snapshot, stored, index, has_row, retry=retry)
    return Plan(
        todo=[int(i) for i in np.flatnonzero(~has_row) if int(i) not in failed],
        live=live,
        failures=[failure for _, failure in sorted(failed.items())],
        missing=sorted(missing),
        gone=gone,
        changed=changed,
    )


def count_unchanged(snapshot: Snapshot, stored: StoredImages) -> tuple[int, int]:
    """Return how many rows that counted so far have an unchanged image, and how many counted.

    Args:
        snapshot: the requested images.
        stored: the images of the store.
    """
    index = {path: i for i, path in enumerate(snapshot.paths)}
    unchanged = total = 0
    for shard, images in stored.shards.items():
        counted = stored.live.get(shard, np.ones(len(images), bool))
        indices = np.fromiter((index.get(path, -1) for path in images.paths), np.int64, len(images))
        same = counted & (indices >= 0) & _are_same(snapshot, images, indices)
        unchanged += int(np.count_nonzero(same))
        total += int(np.count_nonzero(counted))
    return unchanged, total


def _remaining_failures(
    snapshot: Snapshot,
    stored: StoredImages,
    index: Mapping[bytes, int],
    has_row: npt.NDArray[np.bool_],
    *,
    retry: bool,
) -> dict[int, FailureRecord]:
    """Return the failures that are not retried, by the index of their image."""
    remaining: dict[int, FailureRecord] = {}
    for failures, are_new in ((stored.failures, False), (stored.new_failures, True)):
        for failure in failures:
            i = index.get(failure.path)
            if i is None or has_row[i] or not _is_same_file(failure, snapshot, i):
                continue
            if are_new or not (retry or _may_be_over(failure, snapshot, i)):
                remaining[i] = failure
    return remaining


def _are_same(
    snapshot: Snapshot, images: Images, indices: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Return ``(rows,)``, whether each image is still the one its row was computed from."""
    if not len(snapshot.paths):
        return np.zeros(len(images), bool)
    if snapshot.digests is None:
        same: npt.NDArray[np.bool_] = (snapshot.sizes[indices] == images.sizes) & (
            snapshot.mtimes[indices] == images.mtimes
        )
        return same
    rows = np.flatnonzero(indices >= 0)
    digests = snapshot.digests([int(i) for i in indices[rows]])
    same = np.zeros(len(images), bool)
    for row, digest in zip(rows.tolist(), digests, strict=True):
        same[row] = digest != b"" and digest == images.digests[row]
    return same


def _is_same_file(failure: FailureRecord, snapshot: Snapshot, i: int) -> bool:
    return (int(snapshot.sizes[i]), int(snapshot.mtimes[i])) == (failure.size, failure.mtime_ns)


def _may_be_over(failure: FailureRecord, snapshot: Snapshot, i: int) -> bool:
    if failure.reason in UNOPENED:
        return snapshot.is_readable(i)
    if failure.reason in UNDECODABLE:
        return snapshot.has_decoder(i)
    return failure.reason in TRANSIENT
