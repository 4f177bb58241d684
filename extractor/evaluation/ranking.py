"""All rows in the order of their distance, for lists of neighbors that are nearly as long."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from extractor.search.knn import Features, Metric

__all__ = ["Ranking"]

BLOCK_BYTES = 16 * 2**20

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Ranking:
    """Ranks rows by products of matrices in float64.

    :func:`extractor.search.knn.nearest` scores each neighbor anew, which takes longer if the lists
    are long. Equal rows have equal scores here, too, so that the lower row is nearer.

    Args:
        features: ``(N, dim)``; further axes are flattened.
        metric: ``cosine``, ``ip`` or ``l2``.
    """

    def __init__(self, features: Features, metric: Metric) -> None:
        self._features = features
        self._metric = metric
        self._first_equal = self._equal_rows()

    def nearest(self, queries: npt.NDArray[Any], depth: int, own_rows: Rows | None) -> Rows:
        """Return the nearest rows of each query, ``(q, depth)``.

        Args:
            queries: ``(q, dim)``.
            depth: Number of rows per query.
            own_rows: ``(q,)``, the row of each query, which is left out; None for none.
        """
        vectors = queries.astype(np.float64)
        scores = np.empty((len(vectors), len(self._features)))
        for start, block in self._blocks():
            scores[:, start : start + len(block)] = self._scores(vectors, block)
        # A product of matrices may round equal columns differently.
        later = np.flatnonzero(self._first_equal != np.arange(len(self._first_equal)))
        scores[:, later] = scores[:, self._first_equal[later]]
        if own_rows is not None:
            scores[np.arange(len(vectors)), own_rows] = -np.inf
        return np.argsort(-scores, axis=1, kind="stable")[:, :depth]

    def _scores(self, queries: Floats, block: Floats) -> Floats:
        """Return ``(q, n)`` scores; more is nearer, and only their order within a query counts."""
        products: Floats = queries @ block.T
        if self._metric == "l2":
            products = 2 * products - (block * block).sum(axis=1)
        elif self._metric == "cosine":
            lengths = np.sqrt((block * block).sum(axis=1))
            products /= np.where(lengths > 0, lengths, 1)
        return products

    def _blocks(self) -> Iterator[tuple[int, Floats]]:
        dim = int(np.prod(self._features.shape[1:]))
        size = max(BLOCK_BYTES // (8 * max(dim, 1)), 1)
        for start in range(0, len(self._features), size):
            block = np.asarray(self._features[start : start + size])
            yield start, block.reshape(len(block), dim).astype(np.float64)

    def _equal_rows(self) -> Rows:
        """Return for each row the first one with the same values, ``(N,)``."""
        first: dict[bytes, int] = {}
        found = np.empty(len(self._features), np.int64)
        for start, block in self._blocks():
            for row, values in enumerate(block + 0.0, start):  # -0.0 becomes 0.0
                digest = hashlib.blake2b(values.tobytes(), digest_size=16).digest()
                found[row] = first.setdefault(digest, row)
        return found
