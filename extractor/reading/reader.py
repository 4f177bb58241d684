"""Read a store: embeddings with numpy, the index with pyarrow."""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from extractor.errors import StoreError
from extractor.reading.array import KeptRows, ShardedArray, map_array
from extractor.store.format import MANIFEST, STAGING, FileEntry, Manifest, ShardEntry
from extractor.store.index import read_column
from extractor.store.publish import check_size, locate
from extractor.text import plural

__all__ = ["FeatureStore"]

T = TypeVar("T")

# Attempts to open a store that is replaced each time while it is opened.
MAX_ATTEMPTS = 10
# Retries if a file seems to be missing although nothing was replaced. A file may move between the
# moment it is located and the moment it is opened.
MOVE_RETRIES = 2


class ReplacedError(StoreError):
    """The store was replaced after it was opened."""


class FeatureStore:
    """A finished store: row i of ``features`` is the embedding of ``paths[i]``.

    >>> store = FeatureStore.open("features/resnet50")  # doctest: +SKIP
    >>> store.features.shape, store.paths[0]  # doctest: +SKIP
    ((334, 2048), 'n01440764_tench.JPEG')
    >>> store[store.index_of("n01440764_tench.JPEG")].shape  # doctest: +SKIP
    (2048,)

    Attributes:
        path: folder of the store.
        manifest: how the store was made and what it holds. Retired rows, of images that changed or
            are gone, are in its files but not in the store.
        features: ``(N, dim)``, memory-mapped; indexed like a numpy array. Layers that were kept
            as maps ``(channels, height, width)`` or tokens have these axes instead of dim.
    """

    def __init__(self, path: Path, manifest: Manifest, features: ShardedArray, identity: object):
        self.path = path
        self.manifest = manifest
        self.features = features
        self._identity = identity

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> FeatureStore:
        """Open a store and check that every listed file exists in its full size.

        While a run is writing to the store, this opens the last complete state.

        Raises:
            StoreError: not a finished store, an unknown version, or damaged files.
        """
        folder = Path(path)
        return _retry_moved(folder, lambda: cls._open(folder))

    @classmethod
    def _open(cls, folder: Path) -> FeatureStore:
        name = locate(folder, MANIFEST)
        try:
            identity = _identity(folder)
            manifest = Manifest.read(name)
        except (FileNotFoundError, NotADirectoryError) as error:
            started = (folder / STAGING).is_dir()
            state = "is not finished: a run is writing it or was stopped"
            if not started:
                state = "is not a store"
            raise StoreError(f"{folder} {state} ({MANIFEST} is missing)") from error
        except OSError as error:
            raise StoreError(f"cannot read {name}: {error.strerror}") from error
        row, dtype = manifest.description.shape, np.dtype(manifest.description.dtype)
        parts = [
            _live(_map(folder, shard.features, (shard.rows, *row), dtype), shard)
            for shard in manifest.shards
        ]
        for shard in manifest.shards:
            check_size(folder, shard.index)
        store = cls(folder, manifest, ShardedArray(parts, row_shape=row, dtype=dtype), identity)
        try:
            store._check_unchanged()
        except ReplacedError as error:
            raise StoreError(str(error)) from error  # a plain StoreError is retried
        return store

    @property
    def dim(self) -> int:
        """Number of values in one embedding."""
        return self.manifest.description.dim

    @functools.cached_property
    def paths(self) -> list[str]:
        """Path of each row's image, relative to :attr:`root`, with ``/``.

        A name that is not UTF-8 is decoded by ``os.fsdecode``, so that it opens the file.
        """
        return [os.fsdecode(path) for path in self.column("path")]

    @property
    def root(self) -> str:
        """Folder that the paths are relative to, as it was when the store was made."""
        return self.manifest.description.root

    @property
    def failures(self) -> list[dict[str, Any]]:
        """One mapping per image without a row, with the keys of ``failures.jsonl``."""
        entry = self.manifest.failures

        def read() -> list[dict[str, Any]]:
            self._check_unchanged(entry)
            check_size(self.path, entry)
            try:
                with locate(self.path, entry.name).open(encoding="ascii") as lines:
                    failures = [json.loads(line) for line in lines]
            except (OSError, ValueError) as error:
                raise StoreError(f"{self.path / entry.name}: {error}") from error
            self._check_unchanged(entry)
            return failures

        return _retry_moved(self.path, read)

    @property
    def list_rows(self) -> npt.NDArray[np.int64]:
        """Row of each line of the list that ``--keep-order`` kept the order of.

        ``(lines,)`` int64, duplicates included; -1 for an image without a row. Empty lines of the
        list do not count.

        >>> rows = store.list_rows  # doctest: +SKIP
        >>> features, labels = store.features[rows[rows >= 0]], labels[rows >= 0]  # doctest: +SKIP

        Raises:
            StoreError: the last run that changed the store did not keep the order of a list.
        """
        entry = self.manifest.list_rows
        if entry is None:
            raise StoreError(
                f"{self.path} has no rows of a list: the run that wrote it did not keep the order; "
                "run it again with --list FILE --keep-order"
            )

        def read() -> npt.NDArray[np.int64]:
            self._check_unchanged(entry)
            check_size(self.path, entry)
            try:
                rows: npt.NDArray[np.int64] = np.load(
                    locate(self.path, entry.name), allow_pickle=False
                )
            except (OSError, ValueError) as error:
                raise StoreError(f"{self.path / entry.name}: {error}") from error
            self._check_unchanged(entry)
            return rows

        return _retry_moved(self.path, read)

    def column(self, name: str) -> list[Any]:
        """Return one column of the index, one value per row.

        Args:
            name: ``path``, ``size``, ``mtime_ns``, ``width``, ``height`` or ``sha256``.

        Raises:
            StoreError: a file of the index is damaged, or the store was replaced in the meantime.
        """
        return _retry_moved(self.path, lambda: self._column(name))

    def _column(self, name: str) -> list[Any]:
        self._check_unchanged()
        values: list[Any] = []
        for shard in self.manifest.shards:
            check_size(self.path, shard.index)
            path = locate(self.path, shard.index.name)
            column = read_column(path, name)
            if len(column) != shard.rows:
                raise StoreError(f"{path} has {plural(len(column), 'row')}, expected {shard.rows}")
            if shard.retired:
                column = list(itertools.compress(column, shard.live_mask()))
            values.extend(column)
        self._check_unchanged()
        return values

    def index_of(self, path: str | bytes | os.PathLike[str]) -> int:
        """Return the row of an image.

        Args:
            path: path as in :attr:`paths`, or the full path.

        Raises:
            KeyError: the image has no row.
        """
        name = os.fsdecode(path)
        row = self._rows.get(name)
        if row is None and name.startswith(self.root.rstrip("/") + "/"):
            row = self._rows.get(name[len(self.root.rstrip("/")) + 1 :])
        if row is None:
            raise KeyError(f"{name!r} has no row in {self.path}")
        return row

    @functools.cached_property
    def _rows(self) -> dict[str, int]:
        return {path: row for row, path in enumerate(self.paths)}

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: Any) -> npt.NDArray[Any]:
        """Return embeddings: ``store[i]`` is ``(dim,)``, ``store[a:b]`` is ``(b - a, dim)``."""
        picked: npt.NDArray[Any] = self.features[index]
        return picked

    def __repr__(self) -> str:
        made_with = self.manifest.description.made_with
        shape = " x ".join(str(axis) for axis in self.features.shape)
        return f"FeatureStore({str(self.path)!r}: {shape}, {made_with})"

    def _check_unchanged(self, *entries: FileEntry) -> None:
        """Check that the files of the shards, and further ones, are still those of this store."""
        now = _identity(self.path)
        if now == self._identity:
            return
        try:
            manifest = Manifest.read(locate(self.path, MANIFEST))
        except (OSError, StoreError):
            present = set()
        else:
            present = set(manifest.files)
        if not present.issuperset([*self.manifest.shard_files, *entries]):
            raise ReplacedError(f"{self.path} was replaced since it was opened; open it again")
        self._identity = now  # it was extended


def _retry_moved(folder: Path, read: Callable[[], T]) -> T:
    """Read something from a store; retry if a file moved in the meantime."""
    for attempt in range(MAX_ATTEMPTS):
        before = _identity(folder)
        try:
            return read()
        except ReplacedError:
            raise
        except StoreError:
            unchanged = _identity(folder) == before and attempt >= MOVE_RETRIES
            if unchanged or attempt == MAX_ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")


def _identity(folder: Path) -> tuple[int, int, int] | None:
    """Return values that differ between manifests; None if there is no manifest."""
    try:
        status = locate(folder, MANIFEST).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _map(
    folder: Path, entry: FileEntry, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> npt.NDArray[Any]:
    check_size(folder, entry)
    path = locate(folder, entry.name)
    try:
        array = map_array(path)
    except Exception as error:  # numpy parses the header as Python and raises anything
        raise StoreError(f"{path} is damaged: {error}") from error
    if array.shape != shape or array.dtype != dtype:
        raise StoreError(f"{path} holds {array.shape} {array.dtype}, expected {shape} {dtype}")
    return array


def _live(array: npt.NDArray[Any], shard: ShardEntry) -> npt.NDArray[Any] | KeptRows:
    return KeptRows(array, shard.live_mask()) if shard.retired else array
