"""Rewrite a store without retired rows, in the order of a new one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from extractor.errors import StoreDamagedError, StoreError
from extractor.reading.reader import FeatureStore
from extractor.store.claim import ClaimedFolder
from extractor.store.failures import FailureRecord, read_failures
from extractor.store.format import Manifest
from extractor.store.index import DIGEST_BYTES, ImageRecord, read_table
from extractor.store.job import MAX_SHARD_IMAGES, SHARD_STEP, Job, shard_images_for
from extractor.store.publish import finish_publishing
from extractor.store.writer import StoreRun, rewrite
from extractor.upkeep.verify import verify

__all__ = ["compact"]

# Rows copied at a time. A shard needs memory for these and for its index.
BLOCK_ROWS = 1024

# ``(images,)``: row of each image, or -1 - i for failure i.
Entries: TypeAlias = npt.NDArray[np.int64]


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
    FeatureStore.open(out)  # otherwise there is no folder to claim
    # Claimed before anything is read: what a run adds meanwhile would be lost.
    with ClaimedFolder(out, overwrite=True, lock=lock) as claim:
        if claim.staged_job() is not None:
            raise StoreError(
                f"{out} holds an interrupted run; resume it first, or discard it: "
                f"rm -r {claim.staging}"
            )
        return _rewrite(claim, FeatureStore.open(out), progress)


def _rewrite(
    claim: ClaimedFolder, store: FeatureStore, progress: Callable[[str, int, int], None] | None
) -> tuple[Manifest, Manifest]:
    out, before = claim.out, store.manifest
    # Rewriting would give damaged bytes a valid checksum, and verify could not find them any more.
    problems = list(itertools.islice(verify(out, progress), 1))
    if problems:
        raise StoreDamagedError(f"{out} is damaged ({problems[0]}); see extract verify {out}")
    index = _Index(store)
    failures = read_failures(out / before.failures.name)
    order = index.order_with(failures)
    own, size = before.description.shard_images, _shard_images(before, len(order))
    is_small = own < size  # the files would be fewer
    if not before.retired and not is_small and _is_compact(before, _cut(order, own)):
        return before, before
    description = replace(before.description, shard_images=size)
    job = Job(description, len(order), before.listing)
    run = rewrite(claim, job, vanished=before.vanished, same_rows=before)
    done = 0
    for number, entries in enumerate(_cut(order, size)):
        _copy_shard(run, number, entries, store, index, failures)
        done += len(entries)
        if progress is not None:
            progress("writing", done, len(order))
    return before, run.publish(listed=_listed(store, index))


class _Index:
    """Index of the rows of a store that count, as columns of Arrow: records take five times more.

    Args:
        store: The store.
    """

    def __init__(self, store: FeatureStore) -> None:
        import pyarrow as pa

        types = {
            "path": pa.large_binary(),  # all paths together may exceed 2 GiB
            "size": pa.int64(),
            "mtime_ns": pa.int64(),
            "width": pa.int32(),
            "height": pa.int32(),
            "sha256": pa.binary(DIGEST_BYTES),
        }
        # One column after the other, since its parts and the whole are in memory at once.
        self._columns = {name: _column(store, name, kind) for name, kind in types.items()}

    def order_with(self, failures: Sequence[FailureRecord]) -> Entries:
        """Return all rows and failures, sorted by the bytes of their paths."""
        import pyarrow as pa
        import pyarrow.compute as pc

        paths = self._columns["path"]
        failed = pa.array([failure.path for failure in failures], paths.type)
        order: Entries = np.array(pc.sort_indices(pa.chunked_array([paths, failed])), np.int64)
        is_failed = order >= len(paths)
        order[is_failed] = len(paths) - 1 - order[is_failed]
        return order

    def records(self, rows: Entries) -> list[ImageRecord]:
        """Return the records of some rows."""
        columns = [column.take(rows).to_pylist() for column in self._columns.values()]
        return [
            ImageRecord(path, size, mtime, width, height, sha256 or b"")
            for path, size, mtime, width, height, sha256 in zip(*columns, strict=True)
        ]

    def paths(self, rows: Entries) -> list[bytes]:
        """Return the paths of some rows; empty ones for negative numbers."""
        import pyarrow as pa

        taken = self._columns["path"].take(pa.array(rows, mask=rows < 0))
        return [path or b"" for path in taken.to_pylist()]


def _column(store: FeatureStore, name: str, kind: Any) -> Any:
    """Return one column of the index as one array, without retired rows."""
    import pyarrow as pa

    parts: list[Any] = []
    for shard in store.manifest.shards:
        column = read_table(store.path / shard.index.name, [name]).column(name)
        parts += column.filter(pa.array(shard.live_mask())).cast(kind).chunks
    return pa.concat_arrays([pa.array([], kind), *parts])


def _listed(store: FeatureStore, index: _Index) -> Iterator[bytes] | None:
    """Return the path of each line of the list whose order the store keeps; else None.

    A line without a row has an empty path.
    """
    if store.manifest.list_rows is None:
        return None
    rows = store.list_rows
    blocks = (rows[start : start + BLOCK_ROWS] for start in range(0, len(rows), BLOCK_ROWS))
    return itertools.chain.from_iterable(map(index.paths, blocks))


def _copy_shard(
    run: StoreRun,
    number: int,
    entries: Entries,
    store: FeatureStore,
    index: _Index,
    failures: Sequence[FailureRecord],
) -> None:
    with run.shard(number) as shard:
        for start in range(0, len(entries), BLOCK_ROWS):
            block = entries[start : start + BLOCK_ROWS]
            rows = block[block >= 0]
            shard.append(
                np.asarray(store.features[rows]),
                index.records(rows),
                [failures[-1 - entry] for entry in block[block < 0].tolist()],
            )
        shard.finish(store.ids[entries[entries >= 0]])


def _cut(order: Entries, size: int) -> list[Entries]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def _shard_images(manifest: Manifest, images: int) -> int:
    """Return the size of the shards from now on: that of a new store, unless somebody chose it."""
    size = manifest.description.shard_images
    if size % SHARD_STEP or size > MAX_SHARD_IMAGES:
        return size
    batch_size = manifest.description.computation.get("batch_size")
    return shard_images_for(images, batch_size if isinstance(batch_size, int) else 1)


def _is_compact(manifest: Manifest, shards: Sequence[Entries]) -> bool:
    """Return whether the rows already have this order and these shards."""
    rows = [shard[shard >= 0] for shard in shards]
    counts = [(k, len(own)) for k, own in enumerate(rows) if len(own)]
    if counts != [(shard.shard, shard.rows) for shard in manifest.shards]:
        return False
    return np.array_equal(np.concatenate([*rows, []]), np.arange(manifest.rows))
