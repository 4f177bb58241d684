"""Single paths and values of a large store, without reading all of its index."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from extractor.errors import StoreDamagedError
from extractor.paths import PackedPaths, find_path
from extractor.store.format import ShardEntry
from extractor.store.index import read_column, read_path_range
from extractor.store.publish import check_size
from extractor.text import plural

__all__ = ["LARGE", "IndexLookup", "read_live_column"]

# Rows above which single paths are looked up in their shard. Below, a list and a table of all paths
# are made once: a second and 200 MB for a million rows.
LARGE = 2**20


class IndexLookup:
    """Finds rows by path, and values by row, and reads only the shards that may hold them.

    Args:
        folder: Folder of the store.
        shards: Its shards.
        locate: Returns the path of a file of the store.
    """

    def __init__(
        self, folder: Path, shards: Sequence[ShardEntry], locate: Callable[[str], Path]
    ) -> None:
        self._folder = folder
        self._shards = shards
        self._locate = locate
        self._starts = [0, *itertools.accumulate(shard.live_rows for shard in shards)]
        self._ranges: list[tuple[bytes, bytes] | None] = []
        self._paths: dict[int, PackedPaths] = {}  # of live rows, by position of the shard

    def find(self, path: bytes) -> int | None:
        """Return the row of a path; None if it has none."""
        if not self._ranges:
            self._ranges = [read_path_range(self._locate(s.index.name)) for s in self._shards]
        for at, bounds in enumerate(self._ranges):
            if bounds is None or bounds[0] <= path <= bounds[1]:
                offset = self._find_in_shard(at, path)
                if offset >= 0:
                    return self._starts[at] + offset
        return None

    def shards_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the position of the shard that holds each row, ``(n,)``."""
        return np.searchsorted(self._starts, rows, side="right") - 1

    def values(self, name: str, rows: npt.NDArray[np.int64]) -> list[Any]:
        """Return the values of a column in some rows."""
        found = np.empty(len(rows), object)
        parts = self.shards_of(rows)
        for at in np.unique(parts).tolist():
            column = self._column(at, name)
            for i in np.flatnonzero(parts == at).tolist():
                found[i] = column[int(rows[i]) - self._starts[at]]
        return list(found)

    def _find_in_shard(self, at: int, path: bytes) -> int:
        if at not in self._paths:
            self._paths[at] = PackedPaths(map(os.fsencode, self._column(at, "path")))
        paths = self._paths[at]
        if paths.is_ascending:
            return find_path(paths, path)
        return next((i for i, other in enumerate(paths) if other == path), -1)

    def _column(self, at: int, name: str) -> list[Any]:
        return read_live_column(self._folder, self._shards[at], self._locate, name)


def read_live_column(
    folder: Path, shard: ShardEntry, locate: Callable[[str], Path], name: str
) -> list[Any]:
    """Return one column of a shard's index, one value per row that counts.

    Args:
        folder: Folder of the store.
        shard: The shard.
        locate: Returns the path of a file of the store.
        name: Name of the column.

    Raises:
        StoreDamagedError: The index is missing or damaged.
    """
    check_size(folder, shard.index)
    path = locate(shard.index.name)
    column = read_column(path, name)
    if len(column) != shard.rows:
        raise StoreDamagedError(f"{path} has {plural(len(column), 'row')}, expected {shard.rows}")
    return list(itertools.compress(column, shard.live_mask())) if shard.retired else column
