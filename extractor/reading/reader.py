"""Read a store: embeddings with numpy, the index with pyarrow."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np
import numpy.typing as npt

from extractor.errors import (
    StoreDamagedError,
    StoreError,
    StoreNotFoundError,
    StoreReplacedError,
    UnknownTokenError,
    UsageError,
)
from extractor.reading.array import KeptRows, ShardedArray, map_array
from extractor.reading.info import StoreInfo
from extractor.reading.lookup import LARGE, IndexLookup, read_live_column
from extractor.reading.rows import Rows
from extractor.store.format import MANIFEST, STAGING, FileEntry, Manifest, ShardEntry
from extractor.store.history import Changes, HistoryEntry, net_changes
from extractor.store.ids import live_ids, read_history
from extractor.store.index import ImageRecord, read_table
from extractor.store.publish import check_size, locate
from extractor.text import plural

if TYPE_CHECKING:
    from extractor.reading.groups import JoinedRows, StoreGroup

__all__ = ["FeatureStore", "manifest_errors", "shard_table"]

T = TypeVar("T")
P = TypeVar("P", bound="str | os.PathLike[str]")

COLUMNS = (*ImageRecord._fields, "id")

# Attempts to open a store that is replaced each time while it is opened.
MAX_ATTEMPTS = 10
# Retries if a file seems to be missing although nothing was replaced. A file may move between the
# moment it is located and the moment it is opened.
MOVE_RETRIES = 2
MAX_NAMES = 5  # of stores in one message


class FeatureStore(Rows):
    """A finished store: row i of ``features`` is the embedding of ``paths[i]``.

    >>> store = FeatureStore.open("features/resnet50")  # doctest: +SKIP
    >>> store.features.shape, store.paths[0]  # doctest: +SKIP
    ((25, 2048), 'cats/00.jpg')
    >>> store["cats/tom.jpg"].shape  # doctest: +SKIP
    (2048,)

    An open store shows one state, whatever is written meanwhile. Its embeddings stay readable even
    if the store is replaced or deleted, since their files are mapped. What has not been read of the
    index by then, such as :attr:`paths`, raises :class:`StoreReplacedError`. :meth:`is_current`
    tells, and :meth:`reopen` opens the newest state.

    A store that is pickled sends its path, not its rows; it is opened again in the same state.

    Attributes:
        path: Folder of the store.
        manifest: How the store was made and what it holds. Retired rows, of images that changed or
            are gone, are in its files but not in the store.
    """

    def __init__(self, path: Path, manifest: Manifest, features: ShardedArray, identity: object):
        self.path = path
        self.manifest = manifest
        self._features = features
        self._opened_identity = identity
        self._identity = identity
        self._shards_read = 0  # for paths of single rows

    @overload
    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> FeatureStore: ...

    @overload
    @classmethod
    def open(
        cls, path: list[str | os.PathLike[str]] | tuple[str | os.PathLike[str], ...]
    ) -> StoreGroup: ...

    @overload
    @classmethod
    def open(cls, path: list[P]) -> StoreGroup: ...

    @classmethod
    def open(
        cls,
        path: str
        | os.PathLike[str]
        | list[str | os.PathLike[str]]
        | list[P]
        | tuple[str | os.PathLike[str], ...],
    ) -> FeatureStore | StoreGroup:
        """Open a store and check that every listed file exists in its full size.

        While a run is writing to the store, this opens the last complete state.

        Args:
            path: Folder of the store; or several of stores that were made with the same backbone,
                whose rows follow each other.

        Raises:
            StoreNotFoundError: There is no finished store.
            StoreDamagedError: A file is missing or damaged.
            StoreError: The store has an unknown version, or several stores do not fit together.
        """
        if isinstance(path, (str, os.PathLike)):
            folder = Path(path)
            return _retry_moved(folder, lambda: cls._open(folder))
        other: object = path
        if isinstance(other, Rows) and not isinstance(other, FeatureStore):
            raise UsageError(
                f"path: got {type(other).__name__}, expected one whole store or its folder"
            )
        if not isinstance(path, (list, tuple)):
            raise UsageError(
                f"path: got {type(path).__name__}, expected the folder of a store, or a list of "
                "folders"
            )
        from extractor.reading.groups import StoreGroup

        return StoreGroup([cls.open(folder) for folder in path])

    @staticmethod
    def join(*stores: FeatureStore | str | os.PathLike[str], unit_parts: bool = True) -> JoinedRows:
        """Join the embeddings of images that several stores have in common.

        An image counts if it has the same path and the same content in all stores.

        >>> both = FeatureStore.join("both/resnet50", "both/torchvision-resnet18")  # doctest: +SKIP
        >>> both.features.shape, both.left_out  # doctest: +SKIP
        ((25, 2560), (0, 0))

        Args:
            stores: Stores or their folders. The rows have the order of the first one.
            unit_parts: Scale the part of each store to unit length, as ``A+B`` does.

        Raises:
            StoreError: No image is in all stores, or their embeddings are no vectors.
        """
        from extractor.reading.groups import join_stores

        opened = [s if isinstance(s, FeatureStore) else FeatureStore.open(s) for s in stores]
        return join_stores(opened, unit_parts=unit_parts)

    @classmethod
    def _open(cls, folder: Path) -> FeatureStore:
        with manifest_errors(folder):
            identity = _identity(folder)
            manifest = Manifest.read(locate(folder, MANIFEST))
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
        except StoreReplacedError as error:
            raise StoreError(str(error)) from error  # a plain StoreError is retried
        return store

    @property
    def features(self) -> ShardedArray:
        """``(N, dim)``, memory-mapped; indexed like a numpy array.

        Layers that were kept as maps ``(channels, height, width)`` or tokens have these axes
        instead of dim.
        """
        return self._features

    @functools.cached_property
    def info(self) -> StoreInfo:
        """How the rows were made: model, weights, shape, precision and more."""
        return StoreInfo.of(self.manifest)

    @functools.cached_property
    def token(self) -> str:
        """Name of the state that this store shows; another state has another one."""
        return self.manifest.checksum

    def is_current(self) -> bool:
        """Return whether the folder still holds the state that this store shows."""
        if _identity(self.path) == self._opened_identity:
            return True
        try:
            return FeatureStore.open(self.path).token == self.token
        except StoreError:
            return False

    def reopen(self) -> FeatureStore:
        """Open the newest state of the store.

        Raises:
            StoreError: As for :meth:`open`.
        """
        return FeatureStore.open(self.path)

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
                raise StoreDamagedError(f"{self.path / entry.name}: {error}") from error
            self._check_unchanged(entry)
            return failures

        return _retry_moved(self.path, read)

    @property
    def list_rows(self) -> npt.NDArray[np.int64]:
        """Row of each line of the list that ``--keep-order`` kept the order of.

        ``(lines,)`` int64, duplicates included; -1 for an image without a row. Empty lines of the
        list do not count.

        >>> listed = ["images/dogs/03.jpg", "images/cats/tom.jpg"]  # doctest: +SKIP
        >>> extract(listed, out="listed", keep_order=True).store.list_rows  # doctest: +SKIP
        array([1, 0])

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
                raise StoreDamagedError(f"{self.path / entry.name}: {error}") from error
            self._check_unchanged(entry)
            return rows

        return _retry_moved(self.path, read)

    def full_path(self, row: int) -> str:
        """Return the absolute path of a row's image, as it was when the store was made."""
        (path,) = self._values("path", np.array([range(len(self))[row]]))
        return os.path.join(self.root, path)

    def column(self, name: str) -> list[Any]:
        """Return one column of the index, one value per row; see :meth:`Rows.column`."""
        if name not in COLUMNS:
            raise UsageError(f"column: got {name!r}, expected one of {', '.join(COLUMNS)}")
        return _retry_moved(self.path, lambda: self._column(name))

    def _column(self, name: str) -> list[Any]:
        if name == "id":
            return list(self._ids().tolist())
        self._check_unchanged()
        values: list[Any] = []
        for shard in self.manifest.shards:
            values.extend(read_live_column(self.path, shard, self._locate, name))
        self._check_unchanged()
        return values

    def _values(self, name: str, rows: npt.NDArray[np.int64]) -> list[Any]:
        if len(self) <= LARGE or name == "id":
            return super()._values(name, rows)
        found = self._look_up(lambda lookup: lookup.values(name, rows))
        return list(map(os.fsdecode, found)) if name == "path" else found

    def _paths_of(self, rows: npt.NDArray[np.int64]) -> list[str]:
        if "paths" not in self.__dict__:
            # One search reads few shards. After many searches, a list of all paths costs less.
            self._shards_read += len(np.unique(self._lookup.shards_of(rows)))
            if self._shards_read <= len(self.manifest.shards) // 2:
                return list(map(os.fsdecode, self._look_up(lambda it: it.values("path", rows))))
        return super()._paths_of(rows)

    def _find(self, path: str) -> int | None:
        if len(self) <= LARGE:
            return super()._find(path)
        return self._look_up(lambda lookup: lookup.find(os.fsencode(path)))

    def _each_path(self) -> Iterator[str]:
        if len(self) <= LARGE:
            return super()._each_path()
        columns = (self._path_column(shard) for shard in self.manifest.shards)
        return itertools.chain.from_iterable(columns)

    def _path_column(self, shard: ShardEntry) -> Iterator[str]:
        def read(lookup: IndexLookup) -> list[Any]:
            return read_live_column(self.path, shard, self._locate, "path")

        return map(os.fsdecode, self._look_up(read))

    def _look_up(self, find: Callable[[IndexLookup], T]) -> T:
        def checked() -> T:
            self._check_unchanged()
            found = find(self._lookup)
            self._check_unchanged()
            return found

        return _retry_moved(self.path, checked)

    @functools.cached_property
    def _lookup(self) -> IndexLookup:
        return IndexLookup(self.path, self.manifest.shards, self._locate)

    def _locate(self, name: str) -> Path:
        return locate(self.path, name)

    @functools.cached_property
    def ids(self) -> npt.NDArray[np.int64]:
        """``(N,)`` int64, the id of each row, which is never used for another one."""
        return _retry_moved(self.path, self._ids)

    def _ids(self) -> npt.NDArray[np.int64]:
        shards = self.manifest.shards
        if any(shard.first_id is None for shard in shards):
            self._check_unchanged()
        ids = live_ids(shards, self._locate)
        if any(shard.first_id is None for shard in shards):
            self._check_unchanged()
        return ids

    def changes_since(self, token: str) -> Changes:
        """Return which rows were added, removed, changed and moved since an earlier state.

        >>> store = FeatureStore.open("features/resnet50")  # doctest: +SKIP
        >>> changes = store.changes_since(store.token)  # doctest: +SKIP
        >>> len(changes.added), len(changes.removed)  # doctest: +SKIP
        (0, 0)

        A store remembers its last 100 states, and fewer if many ids changed.

        Args:
            token: :attr:`token` of the earlier state. An empty one stands for no state: all rows
                were added.

        Raises:
            UnknownTokenError: The store does not remember that state, or never had it. Read all
                ids instead.
            StoreReplacedError: The store was changed since it was opened; call :meth:`reopen`.
        """
        if not isinstance(token, str):
            raise UsageError(f"token: got {type(token).__name__}, expected the token of a store")
        if token == self.token:
            return net_changes([], self.token)
        if not token:
            nothing = np.empty(0, np.int64)
            return Changes(self.token, np.sort(self.ids), nothing, nothing.reshape(0, 2), nothing)
        history = _retry_moved(self.path, self._history)
        for i, entry in enumerate(history):
            if entry.since == token:
                return net_changes(history[i:], self.token)
        raise UnknownTokenError(
            f"{self.path} does not know the state {token[:12]!r}, which is too old or of another "
            "store; do a full sync: read all of store.ids, and remember store.token"
        )

    def _history(self) -> list[HistoryEntry]:
        entry = self.manifest.history
        if entry is None:
            return []
        self._check_unchanged(entry)
        check_size(self.path, entry)
        history = read_history(locate(self.path, entry.name), self.manifest)
        self._check_unchanged(entry)
        return history

    def _row_of_full_path(self, path: str) -> int | None:
        root = self.root.rstrip("/") + "/"
        return self._find(path[len(root) :]) if path.startswith(root) else None

    @property
    def _source(self) -> str:
        return str(self.path)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path.absolute(), self.token)

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
            raise StoreReplacedError(
                f"{self.path} was replaced or removed since it was opened; its embeddings stay "
                "readable, for the rest call reopen()"
            )
        self._identity = now  # it was extended


def shard_table(store: FeatureStore, shard: ShardEntry, names: list[str]) -> Any:
    """Return columns of the index of one shard, of the rows that count.

    Returns:
        A :class:`pyarrow.Table`. Its paths are strings, or bytes if one of them is not UTF-8.

    Raises:
        StoreDamagedError: The index is missing or damaged.
        StoreReplacedError: The store was replaced since it was opened.
    """

    def read() -> Any:
        store._check_unchanged()
        check_size(store.path, shard.index)
        path = locate(store.path, shard.index.name)
        table = read_table(path, names)
        if len(table) != shard.rows:
            raise StoreDamagedError(
                f"{path} has {plural(len(table), 'row')}, expected {shard.rows}"
            )
        store._check_unchanged()
        return table.filter(shard.live_mask()) if shard.retired else table

    return _retry_moved(store.path, read)


def _reopen(path: Path, token: str) -> FeatureStore:
    """Open a store that was pickled, in the same state.

    Raises:
        StoreReplacedError: The store has another state by now.
    """
    store = FeatureStore.open(path)
    if store.token != token:
        raise StoreReplacedError(f"{path} changed since it was pickled; send it again")
    return store


@contextlib.contextmanager
def manifest_errors(folder: Path) -> Iterator[None]:
    """Raise an error where the manifest of a store cannot be read.

    Raises:
        StoreNotFoundError: The folder holds no finished store.
        StoreError: The manifest cannot be read.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreNotFoundError(_why_no_store(folder)) from error
    except OSError as error:
        raise StoreError(f"cannot read {folder / MANIFEST}: {error.strerror}") from error


def _why_no_store(folder: Path) -> str:
    """Return why a folder without a manifest is no store, and which folder may be meant."""
    if not folder.exists():
        return f"{folder} is not a store: there is no such folder"
    if not folder.is_dir():
        return f"{folder} is not a store: it is a file"
    if (folder / STAGING).is_dir():
        return (
            f"{folder} is not finished: a run is writing it or was stopped ({MANIFEST} is missing)"
        )
    with contextlib.suppress(OSError):
        stores = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
        if stores:
            names = ", ".join(store.name for store in stores[:MAX_NAMES])
            more = f" and {len(stores) - MAX_NAMES} more" if len(stores) > MAX_NAMES else ""
            return (
                f"{folder} is not a store but holds {plural(len(stores), 'store')}: {names}{more}; "
                f"try {stores[0]}"
            )
    parent = folder.absolute().parent
    if (parent / MANIFEST).is_file():
        return f"{folder} is a part of a store; try {parent}"
    return f"{folder} is not a store ({MANIFEST} is missing)"


def _retry_moved(folder: Path, read: Callable[[], T]) -> T:
    """Read something from a store; retry if a file moved in the meantime."""
    for attempt in range(MAX_ATTEMPTS):
        before = _identity(folder)
        try:
            return read()
        except StoreReplacedError:
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
        raise StoreDamagedError(f"{path} is damaged: {error}") from error
    if array.shape != shape or array.dtype != dtype:
        raise StoreDamagedError(
            f"{path} holds {array.shape} {array.dtype}, expected {shape} {dtype}"
        )
    return array


def _live(array: npt.NDArray[Any], shard: ShardEntry) -> npt.NDArray[Any] | KeptRows:
    return KeptRows(array, shard.live_mask()) if shard.retired else array
