"""Rows of a store, of a part of one, or of several: an array and a mapping at once."""

from __future__ import annotations

import fnmatch
import functools
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from extractor.errors import UsageError
from extractor.reading.array import KeptRows, LazyArray

if TYPE_CHECKING:
    import torch

    from extractor import Hits, Searcher
    from extractor.reading.dataset import FeatureDataset

__all__ = ["Rows", "Selection"]

BATCH_BYTES = 64 * 2**20


class Rows(ABC):
    """Rows of embeddings with the paths of their images.

    ``rows[i]`` is the embedding of ``rows.paths[i]``, and ``rows["cats/tom.jpg"]`` that of an
    image.
    """

    @property
    @abstractmethod
    def features(self) -> LazyArray:
        """``(N, dim)``, memory-mapped; indexed like a numpy array."""

    @abstractmethod
    def column(self, name: str) -> list[Any]:
        """Return one column of the index, one value per row.

        Args:
            name: ``path``, ``size``, ``mtime_ns``, ``width``, ``height``, ``sha256`` or ``id``.

        Raises:
            StoreError: A file of the index is damaged, or the store was replaced in the meantime.
            UsageError: There is no such column.
        """

    @abstractmethod
    def full_path(self, row: int) -> str:
        """Return the absolute path of a row's image, as it was when the store was made."""

    @property
    @abstractmethod
    def _source(self) -> str:
        """Name of the store in messages."""

    @property
    def has_ids(self) -> bool:
        """Whether the rows have ids. Those of several stores have none, since ids may repeat."""
        return True

    @property
    def dim(self) -> int:
        """Number of values in one embedding."""
        return math.prod(self.features.shape[1:])

    @functools.cached_property
    def paths(self) -> list[str]:
        """Path of each row's image, relative to the folder of the images, with ``/``.

        A name that is not UTF-8 is decoded by ``os.fsdecode``, so that it opens the file.
        """
        return [os.fsdecode(path) for path in self.column("path")]

    @functools.cached_property
    def ids(self) -> npt.NDArray[np.int64]:
        """``(N,)`` int64, the id of each row, which stays the same as long as the row exists."""
        return np.array(self.column("id"), np.int64)

    def index_of(self, path: str | bytes | os.PathLike[str]) -> int:
        """Return the row of an image.

        Args:
            path: Path as in :attr:`paths`, or the full path.

        Raises:
            KeyError: The image has no row.
            UsageError: Something else than a path.
        """
        if not isinstance(path, (str, bytes, os.PathLike)):
            raise UsageError(f"path: got {type(path).__name__}, expected the path of an image")
        name = os.fsdecode(path)
        row = self._find(name)
        if row is None and os.path.isabs(name):
            row = self._row_of_full_path(name)
        if row is None:
            raise KeyError(f"{name!r} has no row in {self._source}")
        return row

    def _row_of_full_path(self, path: str) -> int | None:
        """Return the row of an image by its absolute path."""
        return None

    def _find(self, path: str) -> int | None:
        """Return the row of an image by its path as in :attr:`paths`."""
        return self._row_of_path.get(path)

    def _each_path(self) -> Iterator[str]:
        """Return an iterator over the paths of all rows."""
        return iter(self.paths)

    def _values(self, name: str, rows: npt.NDArray[np.int64]) -> list[Any]:
        """Return the values of a column of the index in some rows."""
        values = self.paths if name == "path" else self.column(name)
        return [values[row] for row in rows.tolist()]

    def _paths_of(self, rows: npt.NDArray[np.int64]) -> list[str]:
        """Return the paths of some rows."""
        return [self.paths[row] for row in rows.tolist()]

    @functools.cached_property
    def _row_of_path(self) -> dict[str, int]:
        return {path: row for row, path in enumerate(self.paths)}

    def rows_of(self, ids: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return the rows of ids, ``(n,)`` int64.

        Raises:
            KeyError: An id has no row.
            UsageError: The ids are no integers.
        """
        wanted = np.asarray(ids)
        if wanted.size and wanted.dtype.kind not in "iu":
            raise UsageError(f"ids: got {wanted.dtype}, expected integers")
        wanted = wanted.astype(np.int64)
        order = self._order_of_ids
        at = np.searchsorted(self.ids, wanted, sorter=order)
        rows = np.minimum(at, max(len(self.ids) - 1, 0))
        if order is not None and len(order):
            rows = order[rows]
        missing = wanted[self.ids[rows] != wanted] if len(self.ids) else wanted
        if missing.size:
            raise KeyError(f"id {missing.flat[0]} has no row in {self._source}")
        return rows.astype(np.int64)

    @functools.cached_property
    def _order_of_ids(self) -> npt.NDArray[np.int64] | None:
        """Rows in the order of their ids; None if it is that of the rows."""
        if (self.ids[1:] > self.ids[:-1]).all():
            return None
        return np.argsort(self.ids).astype(np.int64)

    def __len__(self) -> int:
        return self.features.shape[0]

    def __contains__(self, path: object) -> bool:
        """Return whether an image has a row: ``"cats/tom.jpg" in store``."""
        if not isinstance(path, (str, bytes, os.PathLike)):
            return False
        try:
            self.index_of(path)
        except KeyError:
            return False
        return True

    def __iter__(self) -> Iterator[npt.NDArray[Any]]:
        """Return an iterator over the embeddings, in the order of the rows."""
        return iter(self[row] for row in range(len(self)))

    def __getitem__(self, index: Any) -> npt.NDArray[Any]:
        """Return embeddings.

        ``rows[i]`` and ``rows["cats/tom.jpg"]`` are ``(dim,)``; ``rows[a:b]`` is ``(b - a, dim)``.
        """
        if isinstance(index, (str, bytes, os.PathLike)):
            index = self.index_of(index)
        elif isinstance(index, list) and index and isinstance(index[0], (str, bytes, os.PathLike)):
            index = [self.index_of(path) for path in index]
        picked: npt.NDArray[Any] = self.features[index]
        return picked

    def batches(self, *, bytes: int = BATCH_BYTES) -> Iterator[tuple[slice, npt.NDArray[Any]]]:
        """Yield the rows in blocks that fit into memory.

        >>> for rows, block in store.batches(bytes=2**17):  # doctest: +SKIP
        ...     print(rows.start, block.shape)
        0 (16, 2048)
        16 (9, 2048)

        Args:
            bytes: Size of a block; it holds at least one row.

        Raises:
            UsageError: The size is no positive integer.

        Yields:
            The slice of the rows, and the rows ``(n, dim)`` in memory.
        """
        if not isinstance(bytes, (int, np.integer)) or bytes < 1:
            raise UsageError(f"bytes: got {bytes!r}, expected a positive integer")
        row_bytes = self.dim * self.features.dtype.itemsize
        size = max(bytes // max(row_bytes, 1), 1)
        for start in range(0, len(self), size):
            rows = slice(start, min(start + size, len(self)))
            yield rows, np.asarray(self.features[rows])

    def select(self, which: str | npt.ArrayLike) -> Selection:
        """Return some of the rows, without reading them.

        >>> cats = store.select("cats/*")  # doctest: +SKIP
        >>> cats.features.shape, cats.paths[0]  # doctest: +SKIP
        ((12, 2048), 'cats/00.jpg')

        Args:
            which: A glob over :attr:`paths`, whose ``*`` also matches ``/``; a mask ``(N,)``; or
                rows in any order.

        Raises:
            UsageError: Something else.
            IndexError: A row that does not exist, or a mask of another length.
        """
        if isinstance(which, str):
            matches = re.compile(fnmatch.translate(which)).match
            rows = [row for row, path in enumerate(self._each_path()) if matches(path)]
            return Selection(self, np.array(rows, np.int64))
        try:
            index = np.asarray(which)
        except ValueError:  # lists of different lengths
            index = np.array(None)
        if index.size == 0 and index.dtype != bool:
            index = index.astype(np.int64)
        if index.ndim != 1 or index.dtype.kind not in "biu":
            raise UsageError(
                f"select: got {type(which).__name__}, expected a glob, a mask or a list of rows"
            )
        return Selection(self, np.arange(len(self), dtype=np.int64)[index])

    def search(
        self,
        queries: Any,
        k: int | None = None,
        *,
        metric: Literal["cosine", "ip", "l2"] = "cosine",
        own_rows: npt.ArrayLike | None = None,
        plus: Any = (),
        minus: Any = (),
        exact: bool = False,
    ) -> Hits:
        """Return the nearest rows of each query.

        >>> hits = store.search("cats/tom.jpg", k=5)  # doctest: +SKIP
        >>> hits.rows.shape, [hit.path in store for hit in hits[0]]  # doctest: +SKIP
        ((1, 5), [True, True, True, True, True])

        Vectors and paths in the store need no torch. Other images are embedded as the rows were,
        by an :class:`Extractor` that the store keeps.

        All rows are searched, unless there is an index (:meth:`Searcher.build_index`). Scores are
        computed in float64. Among equal scores, the lower row comes first.

        Args:
            queries: Vectors ``(q, dim)``, or a single one. Or images: paths in :attr:`paths`, image
                files, encoded images as bytes, PIL images or uint8 arrays. A path in the store, and
                an image file that did not change, stands for its row and does not find itself.
            k: Number of rows per query; None for 10, or all rows if there are fewer.
            metric: ``cosine``, ``ip`` for the inner product, or ``l2`` for the Euclidean distance.
            own_rows: ``(q,)`` int, the row of each query vector, which is left out; -1 for none.
            plus: Images whose direction is added to that of each query.
            minus: Images whose direction is subtracted.
            exact: Whether to search all rows even if there is an index.

        Raises:
            UsageError: Vectors of another dim or with NaN, k above the number of rows, or an
                unknown metric.
            DecodeError: A query cannot be decoded.
            StoreError: There are no rows.
            ExtractorError: The model of the store cannot be loaded, or has other weights.
        """
        return self._searcher.search(
            queries, k, metric=metric, own_rows=own_rows, plus=plus, minus=minus, exact=exact
        )

    @property
    def _searcher(self) -> Searcher:
        # Search stands above reading, since it embeds images. As any program would, this asks the
        # package for the public name.
        from extractor import Searcher

        kept = vars(self)
        if "_kept_searcher" not in kept:
            kept.setdefault("_kept_searcher", Searcher(self))  # threads share the first one
        searcher: Searcher = kept["_kept_searcher"]
        return searcher

    def frame(self, kind: Literal["arrow", "pandas"] = "arrow", *, embeddings: bool = True) -> Any:
        """Return a table: id, path, size, mtime_ns, width, height, sha256, embedding.

        Rows of several stores have no column ``id``.

        >>> store.frame().schema.names  # doctest: +SKIP
        ['id', 'path', 'size', 'mtime_ns', 'width', 'height', 'sha256', 'embedding']

        Args:
            kind: ``arrow`` for a :class:`pyarrow.Table`, ``pandas`` for a data frame.
            embeddings: Whether to read the embeddings, a column of fixed-size lists.

        Raises:
            UsageError: pandas is not installed.
        """
        from extractor.reading.frame import table_of

        return table_of(self, kind, embeddings=embeddings)

    def torch(self, index: Any = slice(None)) -> torch.Tensor:
        """Return rows as a tensor of its own, ``(N, dim)``.

        >>> store.torch().shape, store.torch("cats/tom.jpg").shape  # doctest: +SKIP
        (torch.Size([25, 2048]), torch.Size([2048]))

        Args:
            index: Rows, as for :meth:`__getitem__`.
        """
        import torch

        return torch.from_numpy(np.array(self[index]))

    def dataset(self, labels: Sequence[Any] | npt.ArrayLike | None = None) -> FeatureDataset:
        """Return a dataset for :class:`torch.utils.data.DataLoader`.

        Its workers map the same files: what they get is the path of the store, not its rows.

        >>> from torch.utils.data import DataLoader  # doctest: +SKIP
        >>> labels = [path.startswith("cats/") for path in store.paths]  # doctest: +SKIP
        >>> loader = DataLoader(store.dataset(labels), batch_size=16)  # doctest: +SKIP
        >>> [rows.shape for rows, labels in loader]  # doctest: +SKIP
        [torch.Size([16, 2048]), torch.Size([9, 2048])]

        Args:
            labels: One value per row; each item is then a pair of a row and its label.

        Raises:
            UsageError: Another number of labels than of rows.
        """
        from extractor.reading.dataset import FeatureDataset

        return FeatureDataset(self, labels)


class Selection(Rows):
    """Some rows of a store, in an order of their own.

    Attributes:
        base: What they were selected from.
        rows: ``(n,)`` int64, their rows there.
    """

    def __init__(self, base: Rows, rows: npt.NDArray[np.int64]) -> None:
        self.base = base
        self.rows = rows
        self._features = KeptRows(base.features, rows)

    @property
    def features(self) -> LazyArray:
        """``(n, dim)``; indexed like a numpy array."""
        return self._features

    def column(self, name: str) -> list[Any]:
        """Return one column of the index, one value per row; see :meth:`Rows.column`."""
        return self.base._values(name, self.rows)

    def _paths_of(self, rows: npt.NDArray[np.int64]) -> list[str]:
        return self.base._paths_of(self.rows[rows])

    @functools.cached_property
    def ids(self) -> npt.NDArray[np.int64]:
        """``(n,)`` int64, the id of each row, as in the store."""
        return self.base.ids[self.rows]

    def full_path(self, row: int) -> str:
        """Return the absolute path of a row's image, as it was when the store was made."""
        return self.base.full_path(int(self.rows[row]))

    @property
    def has_ids(self) -> bool:
        """Whether the rows have ids."""
        return self.base.has_ids

    @property
    def _source(self) -> str:
        return f"a selection of {self.base._source}"

    def _row_of_full_path(self, path: str) -> int | None:
        row = self.base._row_of_full_path(path)
        found = np.flatnonzero(self.rows == row) if row is not None else np.empty(0)
        return int(found[0]) if found.size else None

    def __reduce__(self) -> tuple[Any, ...]:
        return Selection, (self.base, self.rows)

    def __repr__(self) -> str:
        return f"Selection({len(self)} of {len(self.base)} rows of {self.base!r})"
