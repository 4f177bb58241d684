"""Rows of a store as the images of a run: what another store of them lacks, and their index."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from extractor.paths import PackedPaths
from extractor.reading.reader import FeatureStore, shard_table
from extractor.store.failures import FailureRecord
from extractor.store.format import listing_digest
from extractor.store.index import DIGEST_BYTES, ImageRecord
from extractor.store.plan import Plan, Sight, Snapshot, StoredImages, plan_run

__all__ = ["SourceRows"]

Numbers = npt.NDArray[np.int64]


class SourceRows:
    """Rows of a store, compared with those that another store made of them.

    A row is known by the path and the content of its image, as a run knows an image.

    Args:
        source: The store.

    Raises:
        StoreError: The index is damaged, or the store was replaced since it was opened.
    """

    def __init__(self, source: FeatureStore) -> None:
        self.source = source
        shards = source.manifest.shards
        self._starts = np.cumsum([0, *(shard.live_rows for shard in shards)])
        sizes, times, digests = [np.empty(0, np.int64)], [np.empty(0, np.int64)], []
        for shard in shards:
            table = shard_table(source, shard, ["size", "mtime_ns", "sha256"])
            sizes.append(table.column("size").to_numpy())
            times.append(table.column("mtime_ns").to_numpy())
            found = table.column("sha256").to_pylist()
            digests.append(b"".join(each or bytes(DIGEST_BYTES) for each in found))
        self._sizes, self._times = np.concatenate(sizes), np.concatenate(times)
        self._digests = b"".join(digests)
        self._paths = PackedPaths(self._each_path())
        self._recent: tuple[int, Any] = -1, None  # number and index of a shard
        self._order: Numbers | None = None  # row of each path in ascending order
        self._sorted = self._paths
        if not self._paths.is_ascending:
            paths = list(self._paths)
            order = sorted(range(len(paths)), key=paths.__getitem__)
            self._order = np.array(order, np.int64)
            self._sorted = PackedPaths(paths[row] for row in order)

    def _each_path(self) -> Iterator[bytes]:
        for shard in self.source.manifest.shards:
            table = shard_table(self.source, shard, ["path"])
            yield from map(os.fsencode, table.column("path").to_pylist())

    def plan(self, stored: StoredImages) -> Plan:
        """Return what becomes of the rows that another store holds.

        Failures are those of the source, whichever the store holds.
        """
        everything = np.arange(len(self._paths)) if self._order is None else self._order

        def look(paths: Sequence[bytes]) -> list[Sight]:
            return [Sight.READABLE if path in self._sorted else Sight.GONE for path in paths]

        def digests(indices: Sequence[int]) -> list[bytes]:
            return [self._digest(int(everything[index])) for index in indices]

        snapshot = Snapshot(
            self._sorted,
            self._sizes[everything],
            self._times[everything],
            look,
            digests,
            check_content=True,
        )
        rows_alone = replace(stored, failures=(), new_failures=(), vanished=0)
        plan = plan_run(snapshot, rows_alone, retire=True)
        vanished = self.source.manifest.vanished
        return replace(plan, failures=self._failures, vanished=vanished)

    def todo(self, plan: Plan) -> Numbers:
        """Return the rows of the source that a plan has to transform, ascending."""
        indices = np.asarray(plan.todo, np.int64)
        return indices if self._order is None else np.sort(self._order[indices])

    def digest(self, rows: Numbers) -> str:
        """Return a digest of the images of some rows."""
        names = (
            b"%s\0%d\0%d\0%s"
            % (self._paths[row], self._sizes[row], self._times[row], self._digest(row))
            for row in rows.tolist()
        )
        return listing_digest(names)

    def features(self, rows: Numbers) -> npt.NDArray[Any]:
        """Return some rows, which ascend."""
        first, last = int(rows[0]), int(rows[-1])
        picked: Any = slice(first, last + 1) if last - first + 1 == len(rows) else rows
        return np.asarray(self.source.features[picked])

    def records(self, rows: Numbers) -> list[ImageRecord]:
        """Return the index of some rows, which ascend."""
        records: list[ImageRecord] = []
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        for shard in np.unique(shards).tolist():
            table = self._table(shard).take(rows[shards == shard] - self._starts[shard])
            columns = [table.column(name).to_pylist() for name in ImageRecord._fields]
            records.extend(
                ImageRecord(os.fsencode(path), size, mtime, width, height, digest or b"")
                for path, size, mtime, width, height, digest in zip(*columns, strict=True)
            )
        return records

    @property
    def listed(self) -> Iterable[bytes] | None:
        """Path of each line of the list whose order the source keeps; None if it keeps none.

        A line without a row has an empty path.
        """
        if self.source.manifest.list_rows is None:
            return None
        return [self._paths[row] if row >= 0 else b"" for row in self.source.list_rows.tolist()]

    def _table(self, shard: int) -> Any:
        """Return the index of a shard; rows are read in order, so the last one is kept."""
        if self._recent[0] != shard:
            entry = self.source.manifest.shards[shard]
            table = shard_table(self.source, entry, list(ImageRecord._fields))
            self._recent = shard, table
        return self._recent[1]

    @functools.cached_property
    def _failures(self) -> list[FailureRecord]:
        return [
            FailureRecord(
                os.fsencode(failure["path"]),
                *(failure[key] for key in ("error", "message", "size", "mtime_ns")),
            )
            for failure in self.source.failures
        ]

    def _digest(self, row: int) -> bytes:
        digest = self._digests[row * DIGEST_BYTES : (row + 1) * DIGEST_BYTES]
        return digest if any(digest) else b""
