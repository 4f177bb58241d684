"""Nearest rows of vectors, rows and images: :class:`Searcher`."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from extractor.errors import DecodeError, StoreError, UsageError
from extractor.reading.reader import FeatureStore
from extractor.reading.rows import Rows
from extractor.search.hits import Hits
from extractor.search.index import MAX_K, BuiltIndex, StoreIndex, build_index, open_index
from extractor.search.knn import (
    Floats,
    Metric,
    RowLengths,
    best_of,
    check_metric,
    checked_vectors,
    nearest,
)
from extractor.search.queries import Query, as_vectors, queries_of
from extractor.text import plural

if TYPE_CHECKING:
    from extractor.api import Extractor

__all__ = ["Searcher"]

DEFAULT_K = 10
LARGEST_QUERY = 1e100  # squares of more values than any vector has fit into float64
CANCELED = 1e-9  # length of a sum of unit vectors that cancel out

_loading = threading.Lock()  # not of each instance, which could not be pickled


class Searcher:
    """Searches the rows of a store, and keeps what every search needs.

    ``store.search`` makes one and keeps it. Make your own to choose the device or the weights:

    >>> embed = Extractor.for_store(store, device="cpu")  # doctest: +SKIP
    >>> searcher = Searcher(store, extractor=embed)  # doctest: +SKIP
    >>> searcher.search("images/cats/tom.jpg", k=5).rows.shape  # doctest: +SKIP
    (1, 5)

    Args:
        rows: A store, a selection of one, or stores of one backbone.
        extractor: Embeds images. None makes ``Extractor.for_store(rows)`` for the first image that
            has no row in the store.

    Raises:
        UsageError: ``rows`` is no store, such as the folder of one.
    """

    def __init__(self, rows: Rows, *, extractor: Extractor | None = None) -> None:
        if not isinstance(rows, Rows):
            raise UsageError(
                f"rows: got {type(rows).__name__}, expected a store; try FeatureStore.open(folder)"
            )
        self._rows = rows
        self._extractor = extractor
        self._embeds: Extractor | None = None
        self._lengths = RowLengths(len(rows))
        self._indexes: dict[Metric, StoreIndex | None] = {}

    def search(
        self,
        queries: Any,
        k: int | None = None,
        *,
        metric: Metric = "cosine",
        own_rows: npt.ArrayLike | None = None,
        plus: Any = (),
        minus: Any = (),
        exact: bool = False,
    ) -> Hits:
        """Return the nearest rows of each query; see :meth:`FeatureStore.search`."""
        self.check(k, metric)
        added, removed = (queries_of(self._rows, images) for images in (plus, minus))
        self.check(k, metric, has_terms=bool(added or removed))
        vectors = as_vectors(queries)
        if vectors is None:
            if own_rows is not None:
                raise UsageError("own_rows: this goes with vectors; images are found by their path")
            images = queries_of(self._rows, queries)
            vectors = self._vectors_of(images)
            own_rows = np.array([query.row for query in images], np.int64)
        return self.find(vectors, k, metric, own_rows, plus=added, minus=removed, exact=exact)

    def find(
        self,
        vectors: npt.ArrayLike,
        k: int | None,
        metric: Metric,
        own_rows: npt.ArrayLike | None,
        *,
        plus: Sequence[Query] = (),
        minus: Sequence[Query] = (),
        exact: bool = False,
    ) -> Hits:
        """Return the nearest rows of vectors plus and minus the directions of images.

        Args:
            vectors: ``(q, dim)``. Without any, the images of ``plus`` are one query.
            k: Number of rows per query.
            metric: The metric.
            own_rows: ``(q,)`` int, the row of each vector, which is left out; -1 for none. Rows of
                ``plus`` and ``minus`` are left out, too.
            plus: Images to add.
            minus: Images to subtract.
            exact: Whether to search all rows even if there is an index.

        Raises:
            ExtractorError: As for :meth:`search`.
        """
        if not plus and not minus:
            return self.nearest(vectors, k, metric=metric, own_rows=own_rows, exact=exact)
        self.check(k, metric, has_terms=True)
        wanted = checked_vectors(vectors, self._rows.dim)
        wanted = wanted if len(wanted) else np.zeros((1, self._rows.dim))
        others = np.array([query.row for query in (*plus, *minus)], np.int64)
        left_out = np.tile(others, (len(wanted), 1))
        if own_rows is not None and np.size(own_rows):
            own = np.asarray(own_rows).reshape(len(wanted), -1)
            left_out = np.concatenate([own, left_out], axis=1)
        wanted = _combined(wanted, self._vectors_of(plus), self._vectors_of(minus))
        return self.nearest(wanted, k, metric=metric, own_rows=left_out, exact=exact)

    def nearest(
        self,
        vectors: npt.ArrayLike,
        k: int | None = None,
        *,
        metric: Metric = "cosine",
        own_rows: npt.ArrayLike | None = None,
        exact: bool = False,
    ) -> Hits:
        """Return the nearest rows of vectors ``(q, dim)``.

        Args:
            vectors: Finite numbers.
            k: Number of rows per query; None for 10, or all if there are fewer.
            metric: ``cosine``, ``ip`` or ``l2``.
            own_rows: ``(q,)`` or ``(q, n)`` int, rows to leave out; -1 for none.
            exact: Whether to search all rows even if there is an index.

        Raises:
            UsageError: A value that makes no sense.
            StoreError: There are no rows.
        """
        self.check(k, metric)
        k = min(DEFAULT_K, len(self._rows)) if k is None else int(k)
        wanted = checked_vectors(vectors, self._rows.dim)
        if metric != "cosine" and np.abs(wanted).max(initial=0.0) > LARGEST_QUERY:
            raise UsageError(
                f"queries: got a value above {LARGEST_QUERY:g}, whose {metric} overflows; scale "
                "the vectors, or try the metric cosine"
            )
        searches = functools.partial(
            nearest,
            self._rows.features,
            k=k,
            metric=metric,
            lengths=self._lengths,
        )
        index = None if exact else self._index_for(metric)
        left_out = 0 if own_rows is None else np.size(own_rows) // max(len(wanted), 1)
        if index is None or k + left_out > MAX_K:
            return Hits(self._rows, searches(queries=wanted, own_rows=own_rows), metric, "exact")
        found = best_of(
            self._rows.features,
            wanted,
            index.candidates(wanted, k + left_out),
            k,
            metric=metric,
            own_rows=own_rows,
        )
        short = np.flatnonzero(found.rows[:, -1] < 0)  # the index found fewer rows than there are
        if len(short):
            own = None if own_rows is None else np.asarray(own_rows)[short]
            exactly = searches(queries=wanted[short], own_rows=own)
            found.rows[short], found.scores[short] = exactly.rows, exactly.scores
        return Hits(self._rows, found, metric, index.title)

    def build_index(
        self,
        kind: Literal["flat", "hnsw", "ivf"] | None = None,
        *,
        metric: Metric = "cosine",
        progress: Callable[[str, int, int], None] | None = None,
    ) -> BuiltIndex:
        """Build the index of a store for fast approximate search, or bring it up to date.

        Later searches by the same metric use it, in this and in other programs. It lies in the
        folder ``derived`` of the store, or in the user's cache if the store is read-only. Rows that
        are newer than the index are searched exactly.

        >>> built = Searcher(store).build_index("hnsw")  # doctest: +SKIP
        >>> built.entry.kind, built.added, store.reopen().search(store[0]).method  # doctest: +SKIP
        ('hnsw', 25, 'hnsw index (recall@10 1.000)')

        Args:
            kind: ``hnsw``, ``ivf``, which is built faster, or ``flat``, which finds every row. None
                keeps the kind of the present index, or else takes HNSW below a million rows and IVF
                from there on.
            metric: Metric to search by.
            progress: Called with the phase (``training``, ``adding`` or ``measuring`` the recall),
                the number of rows that are done, and how many there are.

        Raises:
            UsageError: An unknown kind or metric, or rows that are no whole store.
            InstallationError: faiss is not installed.
            StoreError: There are no rows, or the index cannot be written.
        """
        if not isinstance(self._rows, FeatureStore):
            raise UsageError(
                f"index: got {type(self._rows).__name__}, expected a store; make an index of each"
            )
        built = build_index(self._rows, kind, metric, progress or (lambda *_: None))
        self._indexes.pop(metric, None)
        return built

    def check(self, k: int | None, metric: object, *, has_terms: bool = False) -> None:
        """Check what is known before a model is loaded.

        Args:
            k: Number of rows per query.
            metric: Name of the metric.
            has_terms: Whether there are images to add or subtract.

        Raises:
            StoreError: There are no rows.
            UsageError: A value that makes no sense.
        """
        check_metric(metric)
        total = len(self._rows)
        if not total:
            raise StoreError(f"{self._rows._source} holds no rows, so there is nothing to search")
        is_integer = isinstance(k, (int, np.integer)) and not isinstance(k, bool)
        if k is not None and not (is_integer and 1 <= k <= total):
            raise UsageError(
                f"k: got {k!r}, expected an integer from 1 to {total:,}, the number of rows of "
                f"{self._rows._source}"
            )
        if has_terms and metric == "l2":
            raise UsageError(
                "plus and minus combine directions, so there is no distance; try the metric cosine"
            )

    def embed(self, queries: Sequence[Query]) -> tuple[Floats, dict[int, DecodeError]]:
        """Return the vectors of queries ``(q, dim)``, and the errors of those without one.

        Rows of the store are read. Images are embedded as the store's were.

        Raises:
            UsageError: The extractor makes embeddings of another size than the rows.
            StoreError: The extractor has other weights than the store, or other pixels.
            ExtractorError: The model of the store cannot be loaded.
        """
        vectors = np.zeros((len(queries), self._rows.dim))
        errors: dict[int, DecodeError] = {}
        stored = [number for number, query in enumerate(queries) if query.row >= 0]
        if stored:
            rows = np.array([queries[number].row for number in stored])
            vectors[stored] = np.asarray(self._rows.features[rows]).reshape(len(stored), -1)
        unseen = [number for number, query in enumerate(queries) if query.row < 0]
        if unseen:
            images = [queries[number].image for number in unseen]
            for number, row in zip(unseen, self._embedder(images, on_error="return"), strict=True):
                if isinstance(row, DecodeError):
                    errors[number] = row
                elif row.size != self._rows.dim:
                    raise UsageError(
                        f"extractor: got an embedding of {plural(row.size, 'value')}, and the rows "
                        f"have {self._rows.dim}; try Extractor.for_store"
                    )
                else:
                    vectors[number] = row.ravel()
        return vectors, errors

    def _index_for(self, metric: Metric) -> StoreIndex | None:
        """Return the index of a whole store for a metric, if it has one."""
        if not isinstance(self._rows, FeatureStore):
            return None
        if metric not in self._indexes:
            self._indexes[metric] = open_index(self._rows, metric)
        return self._indexes[metric]

    @property
    def _embedder(self) -> Extractor:
        """Extractor of the images; threads that need it at the same time share one."""
        with _loading:
            if self._embeds is None:
                self._embeds = self._make_embedder()
            return self._embeds

    def _make_embedder(self) -> Extractor:
        if self._extractor is not None:
            if getattr(self._extractor, "dim", None) == self._rows.dim:
                self._extractor._check_fits(self._rows)
            return self._extractor
        from extractor.api import Extractor  # here, because it loads torch

        return Extractor.for_store(self._rows)

    def _vectors_of(self, queries: Sequence[Query]) -> Floats:
        """Return the vectors of queries.

        Raises:
            DecodeError: An image cannot be decoded.
        """
        vectors, errors = self.embed(queries)
        if errors:
            raise errors[min(errors)]
        return vectors


def _combined(queries: Floats, plus: Floats, minus: Floats) -> Floats:
    """Return each query plus and minus other vectors, all of unit length first.

    Raises:
        UsageError: The vectors cancel out.
    """
    queries, plus, minus = (_directions(vectors) for vectors in (queries, plus, minus))
    sums: Floats = queries + plus.sum(axis=0) - minus.sum(axis=0)
    if np.linalg.norm(sums, axis=1).min() < CANCELED:
        raise UsageError("plus and minus: the vectors cancel out, so no direction is left")
    return sums


def _directions(vectors: Floats) -> Floats:
    lengths: Floats = np.linalg.norm(vectors, axis=1, keepdims=True)
    directions: Floats = np.divide(vectors, np.where(lengths > 0, lengths, 1))
    return directions
