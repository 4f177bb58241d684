"""Reads a store with numpy alone, and its index with pyarrow."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from extractor.errors import StoreError
from extractor.store.array import ShardedArray
from extractor.store.format import MANIFEST, STAGING, FileEntry, Manifest

__all__ = ["FeatureStore"]


class FeatureStore:
    """A finished store: row i of ``features`` is the embedding of ``paths[i]``.

    >>> store = FeatureStore.open("features/resnet50")  # doctest: +SKIP
    >>> store.features.shape, store.paths[0]  # doctest: +SKIP
    ((334, 2048), 'n01440764_tench.JPEG')
    >>> store[store.index_of("n01440764_tench.JPEG")].shape  # doctest: +SKIP
    (2048,)

    Attributes:
        path: folder of the store.
        manifest: how it was made, and what it must hold.
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
        """Open a store and check that every file that it lists is there in its full size.

        Raises:
            StoreError: no finished store, one of an unknown version, or one with damaged files.
        """
        folder = Path(path)
        name = folder / MANIFEST
        try:
            identity = _identity(name)
            manifest = Manifest.from_json(name.read_bytes(), str(name))
        except (FileNotFoundError, NotADirectoryError) as error:
            started = (folder / STAGING).is_dir()
            state = "is not finished: a run is at work or was stopped" if started else "is no store"
            raise StoreError(f"{folder} {state} (there is no {MANIFEST})") from error
        except OSError as error:
            raise StoreError(f"cannot read {name}: {error.strerror}") from error
        row, dtype = manifest.description.shape, np.dtype(manifest.description.dtype)
        parts = [
            _map(folder, shard.features, (shard.rows, *row), dtype) for shard in manifest.shards
        ]
        for shard in manifest.shards:
            _check_size(folder, shard.index)
        store = cls(folder, manifest, ShardedArray(parts, row_shape=row, dtype=dtype), identity)
        store._check_unchanged()
        return store

    @property
    def dim(self) -> int:
        """Numbers in one embedding."""
        return self.manifest.description.dim

    @functools.cached_property
    def paths(self) -> list[str]:
        """Path of each row's image, relative to :attr:`root`, with ``/``.

        A name that is no UTF-8 comes as ``os.fsdecode`` gives it, so that it opens the file.
        """
        return [os.fsdecode(path) for path in self.column("path")]

    @property
    def root(self) -> str:
        """The folder that the paths are relative to, as it was when the store was made."""
        return self.manifest.description.root

    @property
    def failures(self) -> list[dict[str, str]]:
        """The images that have no row: ``path``, ``error`` and ``message`` of each."""
        entry = self.manifest.failures
        self._check_unchanged()
        _check_size(self.path, entry)
        with (self.path / entry.name).open(encoding="ascii") as lines:
            failures = [json.loads(line) for line in lines]
        self._check_unchanged()
        return failures

    def column(self, name: str) -> list[Any]:
        """One column of the index: ``path``, ``size``, ``mtime_ns``, ``width`` or ``height``.

        Raises:
            StoreError: a file of the index is damaged, or the store was replaced meanwhile.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._check_unchanged()
        values: list[Any] = []
        for shard in self.manifest.shards:
            try:
                _check_size(self.path, shard.index)
                with (self.path / shard.index.name).open("rb") as file:
                    table = pq.read_table(file, columns=[name])
                column = table.column(name)
            except (OSError, KeyError, pa.ArrowException) as error:
                raise StoreError(f"{self.path / shard.index.name}: {error}") from error
            if len(column) != shard.rows:
                raise StoreError(
                    f"{self.path / shard.index.name} has {len(column)} rows, expected {shard.rows}"
                )
            values.extend(column.to_pylist())
        self._check_unchanged()
        return values

    def index_of(self, path: str | bytes | os.PathLike[str]) -> int:
        """The row of an image, named as in :attr:`paths` or by its full path.

        Raises:
            KeyError: no row for it.
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
        """Embeddings by row: ``store[i]`` is ``(dim,)``, ``store[a:b]`` is ``(b - a, dim)``."""
        picked: npt.NDArray[Any] = self.features[index]
        return picked

    def __repr__(self) -> str:
        made_with = self.manifest.description.made_with
        shape = " x ".join(str(axis) for axis in self.features.shape)
        return f"FeatureStore({str(self.path)!r}: {shape}, {made_with})"

    def _check_unchanged(self) -> None:
        try:
            unchanged = _identity(self.path / MANIFEST) == self._identity
        except OSError:
            unchanged = False
        if not unchanged:
            raise StoreError(f"{self.path} was replaced since it was opened; open it again")


def _identity(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def _check_size(folder: Path, entry: FileEntry) -> None:
    try:
        size = (folder / entry.name).stat().st_size
    except OSError as error:
        raise StoreError(f"{folder / entry.name} is missing from the store") from error
    if size != entry.bytes:
        raise StoreError(f"{folder / entry.name} has {size} bytes, expected {entry.bytes}")


def _map(
    folder: Path, entry: FileEntry, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> npt.NDArray[Any]:
    _check_size(folder, entry)
    try:
        array: npt.NDArray[Any] = np.lib.format.open_memmap(folder / entry.name, mode="r")
    except Exception as error:  # numpy parses the header as Python, and raises what that raises
        raise StoreError(f"{folder / entry.name} is damaged: {error}") from error
    if array.shape != shape or array.dtype != dtype:
        raise StoreError(
            f"{folder / entry.name} holds {array.shape} {array.dtype}, expected {shape} {dtype}"
        )
    return array
