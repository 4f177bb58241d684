"""Exact k-nearest neighbors over rows that may be larger than memory.

A library computes candidates in float32, block by block. Their scores are computed again in
float64, so that faiss and NumPy give the same answers.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from extractor.errors import InstallationError, UsageError
from extractor.reading.array import LazyArray, ShardedArray

__all__ = [
    "METRICS",
    "Features",
    "Library",
    "Metric",
    "Neighbors",
    "RowLengths",
    "best_of",
    "check_metric",
    "checked_vectors",
    "faiss_module",
    "merged",
    "nearest",
    "pair_scores",
    "prepared",
    "row_blocks",
]

Metric: TypeAlias = Literal["cosine", "ip", "l2"]
Library: TypeAlias = Literal["auto", "faiss", "numpy"]
Features: TypeAlias = "npt.NDArray[Any] | LazyArray"
Floats: TypeAlias = npt.NDArray[np.float64]
Rows: TypeAlias = npt.NDArray[np.int64]

METRICS = ("cosine", "ip", "l2")
LIBRARIES = ("auto", "faiss", "numpy")

BLOCK_BYTES = 16 * 2**20  # of rows in float32 at a time
PAIR_BYTES = 32 * 2**20  # of rows that are scored in float64 at a time
QUERY_CHUNK = 1024
FEW = 4  # queries; up to here one pass per query is faster than a matrix product
# Candidates beyond k. More of them make a second pass over the rows rarer.
EXTRA = 32

ROUNDING = 2.0**-24  # of float32
# Products beyond these overflow or underflow in float32.
SMALLEST, LARGEST = 1e-25, 1e37


@dataclass(frozen=True)
class Neighbors:
    """Nearest rows of each query, the best first.

    Attributes:
        rows: ``(q, k)`` int64; -1 where there are fewer than k rows.
        scores: ``(q, k)`` float64: cosine similarity, inner product, or for ``l2`` the Euclidean
            distance, which is lower for better rows. NaN where there is no row.
    """

    rows: Rows
    scores: Floats


def nearest(
    features: Features,
    queries: npt.ArrayLike,
    k: int,
    *,
    metric: Metric = "cosine",
    own_rows: npt.ArrayLike | None = None,
    library: Library = "auto",
    lengths: RowLengths | None = None,
) -> Neighbors:
    """Return the k nearest rows of each query.

    Scores are computed in float64. Among equal scores, the lower row comes first. The answers do
    not depend on the library, the blocks or the other queries.

    >>> rows = np.array([[1, 0], [0, 1], [1, 1]], np.float32)
    >>> found = nearest(rows, [[2, 0]], 2)
    >>> found.rows.tolist(), found.scores.round(3).tolist()
    ([[0, 2]], [[1.0, 0.707]])

    Args:
        features: ``(N, dim)``, an array or the features of a store. Further axes are flattened.
        queries: ``(q, dim)``, finite.
        k: Number of rows per query. Missing ones are -1.
        metric: ``cosine``, ``ip`` for the inner product, or ``l2`` for the Euclidean distance. The
            cosine similarity with a vector of zeros is 0.
        own_rows: ``(q,)`` or ``(q, n)`` int, rows that are left out for each query, such as its
            own; -1 for none.
        library: ``faiss``, ``numpy``, or ``auto`` for faiss where it is installed.
        lengths: Lengths of the rows, to compute them only once for several calls.

    Raises:
        UsageError: A query with NaN or infinity or of another dim, or an unknown metric.
        InstallationError: faiss was asked for and is not installed.
    """
    check_metric(metric)
    vectors = checked_vectors(queries, math.prod(features.shape[1:]))
    own = _checked_rows(own_rows, len(vectors), len(features))
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise UsageError(f"k: got {k!r}, expected an integer of at least 1")
    faiss = _library(library)
    lengths = lengths or RowLengths(len(features))
    found = Neighbors(
        np.full((len(vectors), k), -1, np.int64), np.full((len(vectors), k), np.nan, np.float64)
    )
    for start in range(0, len(vectors) if len(features) else 0, QUERY_CHUNK):
        chunk = slice(start, start + QUERY_CHUNK)
        search = _Search(features, vectors[chunk], own[chunk], metric, lengths)
        rows, scores = search.run(min(k, len(features)), faiss)
        found.rows[chunk, : rows.shape[1]] = rows
        found.scores[chunk, : rows.shape[1]] = scores
    return found


def best_of(
    features: Features,
    queries: npt.ArrayLike,
    candidates: Rows,
    k: int,
    *,
    metric: Metric = "cosine",
    own_rows: npt.ArrayLike | None = None,
) -> Neighbors:
    """Return the k nearest of some rows, scored in float64 as :func:`nearest` does.

    Args:
        features: ``(N, dim)``.
        queries: ``(q, dim)``, finite.
        candidates: ``(q, n)`` int64, different rows for each query; -1 for none.
        k: Number of rows per query. Missing ones are -1.
        metric: ``cosine``, ``ip`` or ``l2``.
        own_rows: As for :func:`nearest`.

    Raises:
        UsageError: As for :func:`nearest`.
    """
    vectors = checked_vectors(queries, math.prod(features.shape[1:]))
    own = _checked_rows(own_rows, len(vectors), len(features))
    missing = np.full((len(vectors), max(k - candidates.shape[1], 0)), -1, np.int64)
    candidates = np.concatenate([candidates, missing], axis=1)
    search = _Search(features, vectors, own, metric, RowLengths(0))
    return Neighbors(*search.best_of(candidates, k))


def prepared(vectors: npt.NDArray[Any], metric: Metric) -> npt.NDArray[Any]:
    """Return vectors as libraries compare them: of unit length for the cosine similarity."""
    return _unit(vectors) if metric == "cosine" else vectors


def check_metric(metric: object) -> None:
    """Check the name of a metric.

    Raises:
        UsageError: It is unknown.
    """
    if metric not in METRICS:
        raise UsageError(f"metric: got {metric!r}, expected one of {', '.join(METRICS)}")


def checked_vectors(queries: npt.ArrayLike, dim: int) -> Floats:
    """Return queries as ``(q, dim)`` float64.

    Raises:
        UsageError: They have another shape, or hold NaN or infinity.
    """
    try:
        vectors = np.asarray(queries)
        vectors = vectors.reshape(len(vectors), -1) if vectors.ndim > 2 else vectors
        vectors = vectors.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise UsageError(f"queries: expected vectors of numbers ({error})") from error
    if vectors.ndim != 2 or (len(vectors) and vectors.shape[1] != dim):
        raise UsageError(
            f"queries: got an array of shape {np.shape(queries)}, expected (number of queries, "
            f"{dim}) as in the store"
        )
    if not np.isfinite(vectors).all():
        bad = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
        raise UsageError(f"queries: query {bad} holds NaN or infinity, expected finite numbers")
    return vectors.reshape(len(vectors), dim)


def _checked_rows(rows: npt.ArrayLike | None, count: int, total: int) -> Rows:
    if rows is None:
        return np.empty((count, 0), np.int64)
    own = np.asarray(rows)
    is_known = own.ndim in (1, 2) and len(own) == count
    if not is_known or (own.size and own.dtype.kind not in "iu"):
        raise UsageError(f"own_rows: got {own.shape} {own.dtype}, expected ({count},) integers")
    if own.size and not -1 <= own.min() <= own.max() < total:
        raise UsageError(f"own_rows: got a row outside of -1 to {total - 1}")
    return own.astype(np.int64).reshape(count, -1) if count else np.empty((0, 0), np.int64)


def faiss_module() -> Any:
    """Return faiss, or None if it cannot be used here.

    On macOS, faiss and torch bring an OpenMP library each, and a process with both may crash.
    """
    if sys.platform == "darwin" and "torch" in sys.modules:
        return None
    try:
        import faiss
    except ImportError:
        return None
    return faiss


def _library(library: Library) -> Any:
    """Return faiss, or None for NumPy.

    Raises:
        InstallationError: faiss was asked for and is not there.
    """
    if library not in LIBRARIES:
        raise UsageError(f"library: got {library!r}, expected one of {', '.join(LIBRARIES)}")
    faiss = None if library == "numpy" else faiss_module()
    if faiss is None and library == "faiss":
        raise InstallationError(
            "faiss is not installed; try pip install 'backbone-extractor[search]'"
        )
    return faiss


def row_blocks(
    features: Features, size: int | None = None
) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """Yield the first row of each block and its rows ``(n, dim)``.

    A block of a memory-mapped shard is a view of its file.

    Args:
        features: ``(N, dim)``; further axes are flattened.
        size: Largest number of rows in a block; None for 16 MB of them in float32.
    """
    if size is None:
        size = max(BLOCK_BYTES // max(4 * math.prod(features.shape[1:]), 1), 1)
    parts = features.parts if isinstance(features, ShardedArray) else [features]
    first = 0
    for part in parts:
        for start in range(0, len(part), size):
            block = np.asarray(part[start : start + size])
            yield first + start, block.reshape(len(block), -1)
        first += len(part)


class RowLengths:
    """Euclidean lengths of rows, each computed when its block is first read.

    Args:
        rows: Number of rows.
    """

    def __init__(self, rows: int) -> None:
        self._values = np.full(rows, np.nan)

    def of(self, start: int, block: npt.NDArray[Any]) -> Floats:
        """Return the lengths of a block of rows, ``(n,)``; NaN for rows with NaN.

        Args:
            start: Row that the block begins with.
            block: ``(n, dim)`` float32 or float64.
        """
        known = self._values[start : start + len(block)]
        if np.isnan(known).any():
            known[:] = np.sqrt(_squares(block))
        return known

    @property
    def largest(self) -> float:
        """Largest length so far, slightly rounded up; 0 for none."""
        finite = self._values[np.isfinite(self._values)]
        return float(finite.max(initial=0.0)) * (1 + 1e-3)


class _Block(NamedTuple):
    """Rows that are compared at a time.

    Attributes:
        start: Row that the block begins with.
        rows: ``(n, dim)``.
        lengths: ``(n,)``.
    """

    start: int
    rows: npt.NDArray[Any]
    lengths: Floats

    @property
    def unit_factors(self) -> npt.NDArray[Any]:
        """``(n,)``, what makes rows of unit length; those of zeros stay zeros."""
        factors: npt.NDArray[Any] = 1 / np.where(self.lengths > 0, self.lengths, 1)
        return factors.astype(self.rows.dtype)


def _squares(block: npt.NDArray[Any]) -> Floats:
    """Return the squared length of each row; float32 is left where it overflows."""
    with np.errstate(over="ignore", under="ignore"):
        squares: Floats = np.einsum("ij,ij->i", block, block).astype(np.float64)
    unsure = np.flatnonzero(~((squares > SMALLEST) & (squares < LARGEST)))
    if len(unsure) and block.dtype != np.float64:
        exact = block[unsure].astype(np.float64)
        squares[unsure] = np.einsum("ij,ij->i", exact, exact)
    return squares


def _is_moderate(lengths: Floats) -> bool:
    """Return whether products of rows neither overflow nor underflow in float32."""
    return bool(((lengths == 0) | ((lengths > 1e-15) & (lengths < 1e15))).all())


def _unit(block: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return rows of unit length; rows of zeros stay zeros."""
    lengths = np.sqrt(_squares(block))
    lengths[lengths == 0] = 1
    if block.dtype == np.float32 and SMALLEST < lengths.min() <= lengths.max() < LARGEST:
        return block * (1 / lengths).astype(np.float32)[:, None]
    scaled: npt.NDArray[Any] = (block / lengths[:, None]).astype(block.dtype)
    return scaled


def pair_scores(rows: npt.NDArray[Any], queries: Floats, metric: Metric) -> Floats:
    """Return how near each row is to the query beside it, ``(n,)`` float64; more is nearer.

    For ``l2`` this is the negative square of the distance. Equal rows have equal scores to the last
    bit, since each score is a sum over one row. Rows with NaN have a score of -inf.

    Args:
        rows: ``(n, dim)``.
        queries: ``(n, dim)``; of unit length for ``cosine``.
        metric: The metric.
    """
    values = rows.astype(np.float64)
    if metric == "l2":
        values -= queries
        np.square(values, out=values)
        scores = -values.sum(axis=1)
    elif metric == "ip":
        scores = (values * queries).sum(axis=1)
    else:
        products = (values * queries).sum(axis=1)
        np.square(values, out=values)
        lengths = np.sqrt(values.sum(axis=1))
        lengths[lengths == 0] = 1
        scores = np.clip(products / lengths, -1.0, 1.0)
    return np.where(np.isnan(scores), -np.inf, scores)


def merged(rows: Rows, scores: Floats, k: int) -> tuple[Rows, Floats]:
    """Return the k best of each query, ``(q, k)``: higher scores first, then lower rows.

    Args:
        rows: ``(q, n)``; those with a score of -inf do not count.
        scores: ``(q, n)``; more is nearer.
        k: Number of rows to return; at most n.
    """
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    best = np.take_along_axis(scores, order, 1)
    return np.where(np.isneginf(best), -1, np.take_along_axis(rows, order, 1)), best


class _Search:
    """Search for a few queries, which fit into memory with their candidates."""

    def __init__(
        self, features: Features, queries: Floats, own: Rows, metric: Metric, lengths: RowLengths
    ) -> None:
        self._features = features
        self._own = own
        self._metric: Metric = metric
        self._row_lengths = lengths
        self._dim = queries.shape[1]
        if metric == "cosine":
            peaks = np.abs(queries).max(axis=1, initial=0.0, keepdims=True)
            queries = _unit(queries / np.where(peaks > 0, peaks, 1))
        self._queries = queries
        self._lengths: Floats = np.sqrt(np.einsum("ij,ij->i", queries, queries))
        is_narrow = features.dtype in (np.float16, np.float32)
        self._dtype: type[np.floating[Any]] = np.float32 if is_narrow else np.float64

    def run(self, k: int, faiss: Any) -> tuple[Rows, Floats]:
        """Return rows and scores, ``(q, k)``; ``faiss`` is the library, or None."""
        total = len(self._features)
        count = min(k + EXTRA + self._own.shape[1], total)
        best = self._best(count, faiss)
        scales = self._scales()
        nonzero = scales[scales > 0]
        if len(nonzero) and not SMALLEST < nonzero.min() <= nonzero.max() < LARGEST:
            self._dtype = np.float64
            best = self._best(count, None)
        scores64 = self._scored(best.rows)
        rows, scores64 = merged(best.rows, scores64, k)
        if count < total:
            # No sum of dim products in float32, in any order, is further from the true one.
            error = 2 * (self._dim + 8) * ROUNDING * scales
            # A row that is no candidate has at most the lowest score of the candidates.
            unsure = np.flatnonzero(~(scores64[:, -1] > best.scores.min(axis=1) + error))
            if len(unsure):
                found = self._all_above(unsure, scores64[unsure, -1] - error[unsure], k)
                rows[unsure], scores64[unsure] = found
        return self._shown(rows, scores64)

    def _scales(self) -> Floats:
        """Return for each query the largest value that its products add up to."""
        if self._metric == "cosine":
            return np.ones(len(self._queries))
        largest = self._row_lengths.largest
        if self._metric == "ip":
            return self._lengths * largest
        return np.square(self._lengths + largest)

    def _best(self, count: int, faiss: Any) -> _Best:
        """Return the best rows of all by their scores in the type of the search."""
        best = _Best(len(self._queries), count)
        queries = self._queries.astype(self._dtype)
        # For a few queries, faiss would spend its time on making rows of unit length.
        use_faiss = faiss is not None and not (self._metric == "cosine" and len(queries) <= FEW)
        for block in self._blocks():
            if use_faiss:
                scores, rows = self._with_faiss(faiss, queries, block, count)
                best.add(scores, np.where(rows < 0, -1, rows + block.start))
            else:
                best.add_block(block.start, self._scores(queries, block))
        return best

    def best_of(self, candidates: Rows, k: int) -> tuple[Rows, Floats]:
        """Return the k best of some rows ``(q, n)``, and their scores."""
        return self._shown(*merged(candidates, self._scored(candidates), k))

    def _shown(self, rows: Rows, scores: Floats) -> tuple[Rows, Floats]:
        """Return rows and scores as callers get them."""
        if self._metric == "l2":
            scores = np.sqrt(np.maximum(-scores, 0.0))
        return rows, np.where(rows < 0, np.nan, scores)

    def _blocks(self) -> Iterator[_Block]:
        for start, block in row_blocks(self._features):
            rows = np.ascontiguousarray(block, self._dtype)
            lengths = self._row_lengths.of(start, rows)
            if self._metric == "cosine" and not _is_moderate(lengths):
                rows, lengths = _unit(rows), np.ones(len(rows))
            yield _Block(start, rows, lengths)

    def _with_faiss(
        self, faiss: Any, queries: npt.NDArray[Any], block: _Block, count: int
    ) -> tuple[npt.NDArray[Any], Rows]:
        count = min(count, len(block.rows))
        if self._metric == "l2":
            distances, found = faiss.knn(queries, block.rows, count, metric=faiss.METRIC_L2)
            return -distances, found
        rows = block.rows
        if self._metric == "cosine":
            rows = rows * block.unit_factors[:, None]
        scores, found = faiss.knn(queries, rows, count, metric=faiss.METRIC_INNER_PRODUCT)
        return scores, found

    def _scores(self, queries: npt.NDArray[Any], block: _Block) -> npt.NDArray[Any]:
        """Return ``(q, n)`` scores of a block, in the type of the search."""
        scores: npt.NDArray[Any]
        with np.errstate(over="ignore", invalid="ignore"):  # then float64 is used
            if len(queries) <= FEW:
                # Threads of BLAS would cost more than they save, above all on a busy machine.
                scores = np.stack([np.einsum("ij,j->i", block.rows, query) for query in queries])
            else:
                scores = queries @ block.rows.T
            if self._metric == "cosine":
                scores *= block.unit_factors
            elif self._metric == "l2":
                scores *= 2
                scores -= np.square(block.lengths.astype(scores.dtype))
                scores -= np.einsum("ij,ij->i", queries, queries)[:, None]
        return scores

    def _scored(self, rows: Rows) -> Floats:
        """Return the scores of rows ``(q, n)`` in float64; -inf for own rows and for -1."""
        scores = np.full(rows.shape, -np.inf)
        counts = rows >= 0
        for own in self._own.T:
            counts &= rows != own[:, None]
        queries, columns = np.nonzero(counts)
        scores[queries, columns] = self._score_pairs(queries, rows[queries, columns])
        return scores

    def _score_pairs(self, queries: npt.NDArray[np.intp], rows: Rows) -> Floats:
        scores = np.empty(len(rows))
        size = max(PAIR_BYTES // (self._dim * 8 + 1), 1)
        for start in range(0, len(rows), size):
            pairs = slice(start, start + size)
            vectors = np.asarray(self._features[rows[pairs]]).reshape(-1, self._dim)
            scores[pairs] = pair_scores(vectors, self._queries[queries[pairs]], self._metric)
        return scores

    def _all_above(
        self, queries: npt.NDArray[np.intp], limits: Floats, k: int
    ) -> tuple[Rows, Floats]:
        """Return the k best rows of some queries, ``(n, k)``, from all that may be among them.

        Args:
            queries: Which queries, ``(n,)``.
            limits: ``(n,)``; rows whose score in float32 is lower do not count.
            k: Number of rows.
        """
        rows = np.full((len(queries), k), -1, np.int64)
        scores = np.full((len(queries), k), -np.inf)
        vectors = self._queries[queries].astype(self._dtype)
        for block in self._blocks():
            near = self._scores(vectors, block) >= limits[:, None]
            for number in np.flatnonzero(near.any(axis=1)).tolist():
                found = np.flatnonzero(near[number]) + block.start
                found = found[~np.isin(found, self._own[queries[number]])]
                new = self._score_pairs(np.full(len(found), queries[number]), found)
                both = np.concatenate([rows[number], found])[None]
                both_scores = np.concatenate([scores[number], new])[None]
                rows[number], scores[number] = (each[0] for each in merged(both, both_scores, k))
        return rows, scores


class _Best:
    """Best candidates of each query so far, in no order.

    Attributes:
        scores: ``(q, count)``, -inf for none.
        rows: ``(q, count)`` int64, -1 for none.
    """

    def __init__(self, queries: int, count: int) -> None:
        self.scores = np.full((queries, count), -np.inf)
        self.rows = np.full((queries, count), -1, np.int64)

    def add(self, scores: npt.NDArray[Any], rows: Rows) -> None:
        """Add candidates ``(q, n)``; a row of -1 is none."""
        count = self.rows.shape[1]
        all_scores = np.concatenate([self.scores, np.where(rows < 0, -np.inf, scores)], axis=1)
        all_rows = np.concatenate([self.rows, rows], axis=1)
        best = np.argpartition(-all_scores, count - 1, axis=1)[:, :count]
        self.scores = np.take_along_axis(all_scores, best, 1)
        self.rows = np.take_along_axis(all_rows, best, 1)

    def add_block(self, start: int, scores: npt.NDArray[Any]) -> None:
        """Add all rows of a block from their scores ``(q, n)``; NaN does not count."""
        lowest = self.scores.min(axis=1)
        above = scores > lowest[:, None].astype(scores.dtype)
        queries, columns = np.nonzero(above)
        if not len(queries):
            return
        counts = np.bincount(queries, minlength=len(scores))
        places = np.arange(len(queries)) - np.repeat(np.cumsum(counts) - counts, counts)
        shape = (len(scores), int(counts.max()))
        found, rows = np.full(shape, -np.inf), np.full(shape, -1, np.int64)
        found[queries, places] = scores[queries, columns]
        rows[queries, places] = columns + start
        self.add(found, rows)
