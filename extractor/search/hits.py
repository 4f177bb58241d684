"""What a search found."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from extractor.reading.rows import Rows
from extractor.search.knn import Metric, Neighbors

__all__ = ["Hit", "Hits"]


class Hit(NamedTuple):
    """One row that a search found.

    >>> Hit(4, 4, 0.912, "cats/04.jpg").path
    'cats/04.jpg'

    Attributes:
        row: Row in the store.
        id: Id of the row; -1 if the rows have none.
        score: Cosine similarity, inner product, or Euclidean distance.
        path: Path of the image, as in ``store.paths``.
    """

    row: int
    id: int
    score: float
    path: str


class Hits:
    """Rows that a search found for each query, the best first.

    >>> hits = store.search(["cats/tom.jpg", "dogs/03.jpg"], k=5)  # doctest: +SKIP
    >>> hits.rows.shape, hits.scores.shape, len(hits[0])  # doctest: +SKIP
    ((2, 5), (2, 5), 5)
    >>> hits[0][0].path in store  # doctest: +SKIP
    True

    Attributes:
        rows: ``(q, k)`` int64, rows in the store; -1 where a query has fewer than k.
        scores: ``(q, k)`` float64: cosine similarity, inner product, or Euclidean distance. NaN
            where there is no row.
        metric: ``cosine``, ``ip`` or ``l2``; for ``l2``, lower scores are better.
        method: How the rows were found: ``exact``, or the index with its recall.
    """

    def __init__(self, source: Rows, found: Neighbors, metric: Metric, method: str) -> None:
        self.rows = found.rows
        self.scores = found.scores
        self.metric = metric
        self.method = method
        self._source = source

    @functools.cached_property
    def ids(self) -> npt.NDArray[np.int64]:
        """``(q, k)`` int64, ids of the rows; -1 where there is no row, or if rows have no ids."""
        if not self._source.has_ids or not self.rows.size:
            return np.full(self.rows.shape, -1, np.int64)
        return np.where(self.rows < 0, -1, self._source.ids[self.rows])

    @functools.cached_property
    def _paths(self) -> dict[int, str]:
        """Path of each row that was found."""
        rows = np.unique(self.rows[self.rows >= 0])
        return dict(zip(rows.tolist(), self._source._paths_of(rows), strict=True))

    def __len__(self) -> int:
        """Return the number of queries."""
        return len(self.rows)

    def __getitem__(self, query: int) -> list[Hit]:
        """Return what was found for one query, the best first."""
        query, paths = operator.index(query), self._paths
        return [
            Hit(row, row_id, score, paths[row])
            for row, row_id, score in zip(
                self.rows[query].tolist(),
                self.ids[query].tolist(),
                self.scores[query].tolist(),
                strict=True,
            )
            if row >= 0
        ]

    def __iter__(self) -> Iterator[list[Hit]]:
        """Return an iterator over the queries."""
        return (self[query] for query in range(len(self)))

    def __repr__(self) -> str:
        queries, k = self.rows.shape
        return f"Hits({queries} queries, {k} rows each, {self.metric}, {self.method})"
