"""Rewrites a store without the rows that no longer count, in the order of a fresh one."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from extractor.errors import StoreError
from extractor.store.format import JOB, STAGING, Manifest
from extractor.store.journal import ImageRecord
from extractor.store.publish import finish_publishing
from extractor.store.reader import FeatureStore
from extractor.store.verify import verify
from extractor.store.writer import Job, StoreWriter, read_failures

__all__ = ["compact"]

# Rows that are copied at a time; what a shard needs in memory is these and its index.
BLOCK = 1024


def compact(out: Path, *, lock: bool = True) -> tuple[Manifest, Manifest]:
    """Rewrite a store: its rows sorted by path, cut into shards as a run over all of them does.

    What is computed anew of the same images with the same batches comes to the same layout. The
    old store stands until the new one is complete, so that there must be room for both.

    Args:
        lock: refuse where files cannot be locked.

    Returns:
        The manifest before and the one after; the same one twice where there is nothing to do.

    Raises:
        StoreError: no finished store, one that is damaged or being written, or an interrupted run
            that is to go on first.
    """
    finish_publishing(out, lock=lock)
    store = FeatureStore.open(out)
    before = store.manifest
    if (out / STAGING / JOB).exists():
        raise StoreError(
            f"{out} holds an interrupted run; let it come to its end first, or give it up: "
            f"rm -r {out / STAGING}"
        )
    # What is damaged would get a checksum that fits, and be found no more.
    problems = list(itertools.islice(verify(out), 1))
    if problems:
        raise StoreError(f"{out} is damaged ({problems[0]}); see extract verify {out}")
    records = _records(store)
    failures = read_failures(out / before.failures.name)
    order = sorted(
        [(record.path, row) for row, record in enumerate(records)]
        + [(failure.path, -1 - place) for place, failure in enumerate(failures)]
    )
    size = before.description.shard_images
    shards = [order[start : start + size] for start in range(0, len(order), size)]
    if not before.retired and _is_laid_out(before, shards):
        return before, before
    job = Job(before.description, len(order), before.listing)
    with StoreWriter(out, overwrite=True, lock=lock) as writer:
        for number, content in enumerate(shards):
            with writer.shard(number, before.description) as shard:
                for block in _blocks(content):
                    rows = [row for _, row in block if row >= 0]
                    shard.append(
                        np.asarray(store.features[rows]),
                        [records[row] for row in rows],
                        [failures[-1 - row] for _, row in block if row < 0],
                    )
                shard.finish()
        return before, writer.publish(job)


def _is_laid_out(manifest: Manifest, shards: list[list[tuple[bytes, int]]]) -> bool:
    """Whether the rows lie in these shards, in this order, already."""
    rows = [row for shard in shards for _, row in shard if row >= 0]
    wanted = [(k, sum(row >= 0 for _, row in shard)) for k, shard in enumerate(shards)]
    there = [(shard.shard, shard.rows) for shard in manifest.shards]
    return rows == list(range(len(rows))) and there == [(k, count) for k, count in wanted if count]


def _blocks(order: list[tuple[bytes, int]]) -> Iterator[list[tuple[bytes, int]]]:
    for start in range(0, len(order), BLOCK):
        yield order[start : start + BLOCK]


def _records(store: FeatureStore) -> list[ImageRecord]:
    names = ("path", "size", "mtime_ns", "width", "height", "sha256")
    columns = [store.column(name) for name in names]
    return [
        ImageRecord(os.fsencode(path), size, mtime, width, height, sha256 or b"")
        for path, size, mtime, width, height, sha256 in zip(*columns, strict=True)
    ]
