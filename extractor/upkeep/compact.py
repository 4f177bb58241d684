"""Rewrite a store without retired rows, in the order of a new one."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from extractor.errors import StoreDamagedError, StoreError
from extractor.reading.reader import FeatureStore
from extractor.store.claim import ClaimedFolder
from extractor.store.failures import FailureRecord, read_failures
from extractor.store.format import JOB, STAGING, Manifest
from extractor.store.index import ImageRecord
from extractor.store.job import MAX_SHARD_IMAGES, SHARD_STEP, Job, shard_images_for
from extractor.store.lock import Lock
from extractor.store.publish import finish_publishing
from extractor.store.writer import StoreRun, rewrite
from extractor.upkeep.verify import verify

__all__ = ["compact"]

# Rows copied at a time. A shard needs memory for these and for its index.
BLOCK_ROWS = 1024

# Path of an image, and its row, or -1 - i for failure i.
Entry = tuple[bytes, int]


def compact(
    out: Path,
    *,
    lock: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Manifest, Manifest]:
    """Rewrite a store: sort its rows by path and cut them into shards as a new run would.

    A new run over the same images with the same batches gets the same layout. The old store stays
    until the new one is complete, so the disk must have room for both.

    Args:
        out: folder of the store.
        lock: fail if the file system does not support locks.
        progress: called with the phase (``reading``, or ``writing``), the number of rows that are
            done, and how many there are.

    Returns:
        The manifests before and after; the same one twice if the store is compact already.

    Raises:
        StoreNotFoundError: no finished store.
        StoreDamagedError: a damaged store.
        StoreBusyError: a run is writing to the store.
        StoreError: the store has an interrupted run.
    """
    finish_publishing(out, lock=lock)
    store = FeatureStore.open(out)
    before = store.manifest
    Lock(out / STAGING / "lock", required=False).check()  # its run may be alive
    if (out / STAGING / JOB).exists():
        raise StoreError(
            f"{out} holds an interrupted run; resume it first, or discard it: rm -r {out / STAGING}"
        )
    # Rewriting would give damaged bytes a valid checksum, and verify could not find them any more.
    problems = list(itertools.islice(verify(out, progress), 1))
    if problems:
        raise StoreDamagedError(f"{out} is damaged ({problems[0]}); see extract verify {out}")
    records = _records(store)
    failures = read_failures(out / before.failures.name)
    order = sorted(
        [(record.path, row) for row, record in enumerate(records)]
        + [(failure.path, -1 - i) for i, failure in enumerate(failures)]
    )
    own, size = before.description.shard_images, _shard_images(before, len(order))
    is_small = own < size  # the files would be fewer
    if not before.retired and not is_small and _is_compact(before, _cut(order, own)):
        return before, before
    shards = _cut(order, size)
    description = replace(before.description, shard_images=size)
    job = Job(description, len(order), before.listing)
    with ClaimedFolder(out, overwrite=True, lock=lock) as claim:
        run = rewrite(claim, job, vanished=before.vanished, same_rows=before)
        done = 0
        for number, entries in enumerate(shards):
            _copy_shard(run, number, entries, store, records, failures)
            done += len(entries)
            if progress is not None:
                progress("writing", done, len(order))
        return before, run.publish(listed=_listed(store, records))


def _listed(store: FeatureStore, records: Sequence[ImageRecord]) -> Iterator[bytes] | None:
    """Return the path of each line of the list whose order the store keeps; else None.

    A line without a row has an empty path.
    """
    if store.manifest.list_rows is None:
        return None
    return (records[row].path if row >= 0 else b"" for row in store.list_rows.tolist())


def _copy_shard(
    run: StoreRun,
    number: int,
    entries: Sequence[Entry],
    store: FeatureStore,
    records: Sequence[ImageRecord],
    failures: Sequence[FailureRecord],
) -> None:
    with run.shard(number) as shard:
        for start in range(0, len(entries), BLOCK_ROWS):
            block = entries[start : start + BLOCK_ROWS]
            rows = [row for _, row in block if row >= 0]
            shard.append(
                np.asarray(store.features[rows]),
                [records[row] for row in rows],
                [failures[-1 - row] for _, row in block if row < 0],
            )
        shard.finish(store.ids[[row for _, row in entries if row >= 0]])


def _cut(order: Sequence[Entry], size: int) -> list[Sequence[Entry]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def _shard_images(manifest: Manifest, images: int) -> int:
    """Return the size of the shards from now on: that of a new store, unless somebody chose it."""
    size = manifest.description.shard_images
    if size % SHARD_STEP or size > MAX_SHARD_IMAGES:
        return size
    batch_size = manifest.description.computation.get("batch_size")
    return shard_images_for(images, batch_size if isinstance(batch_size, int) else 1)


def _is_compact(manifest: Manifest, shards: Sequence[Sequence[Entry]]) -> bool:
    """Return whether the rows already have this order and these shards."""
    rows = [row for shard in shards for _, row in shard if row >= 0]
    counts = [(k, sum(row >= 0 for _, row in shard)) for k, shard in enumerate(shards)]
    current = [(shard.shard, shard.rows) for shard in manifest.shards]
    return rows == list(range(len(rows))) and current == [(k, n) for k, n in counts if n]


def _records(store: FeatureStore) -> list[ImageRecord]:
    names = ("path", "size", "mtime_ns", "width", "height", "sha256")
    columns = [store.column(name) for name in names]
    return [
        ImageRecord(os.fsencode(path), size, mtime, width, height, sha256 or b"")
        for path, size, mtime, width, height, sha256 in zip(*columns, strict=True)
    ]
