"""Nearest other rows of many rows of a store."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from extractor.errors import UsageError
from extractor.reading.reader import FeatureStore
from extractor.search.index import MAX_K, open_index
from extractor.search.knn import Features
from extractor.search.searcher import Searcher
from extractor.text import plural

__all__ = ["CHUNK", "EXACT_ROWS", "RowNeighbors", "chunk_rows"]

EXACT_ROWS = 200_000  # all pairs of 200,000 x 512 take minutes; of a million, hours
CHUNK = 4096  # queries
CHUNK_BYTES = 64 * 2**20  # of queries in float64

Rows = npt.NDArray[np.int64]
Distances = npt.NDArray[np.float32]


def chunk_rows(features: Features) -> int:
    """Return how many rows are searched for at a time."""
    row_bytes = 8 * math.prod(features.shape[1:])
    return max(min(CHUNK, CHUNK_BYTES // max(row_bytes, 1)), 1)


class RowNeighbors:
    """Finds the nearest other rows of rows by the cosine distance, with an index if there is one.

    Args:
        store: The store.
        queries: Number of rows that will be looked up.
        k: Number of neighbors of each.
        instead: What needs no neighbors, for the message.

    Raises:
        UsageError: The store is too large to compare all pairs, and has no index; or k is beyond
            what an index finds.
    """

    def __init__(self, store: FeatureStore, queries: int, k: int, instead: str) -> None:
        is_large = queries * len(store) > EXACT_ROWS**2
        if is_large and k >= MAX_K:
            raise UsageError(
                f"neighbors: got {k}, expected fewer than {MAX_K} for {plural(queries, 'row')}"
            )
        if is_large and open_index(store, "cosine") is None:
            raise UsageError(
                f"{store.path}: the neighbors of {plural(queries, 'row')} would take hours; run "
                f"extract index {store.path} first, or try {instead}"
            )
        self._store = store
        self._k = k
        self._searcher = Searcher(store)

    def of(self, rows: Rows) -> tuple[Rows, Distances]:
        """Return the nearest other rows of some rows, the nearest first.

        Args:
            rows: ``(n,)``, finite rows.

        Returns:
            Rows of the store ``(n, k)``, -1 where there are fewer, and distances ``(n, k)`` from 0
            to 2, infinite where there is no row.
        """
        store, k = self._store, self._k
        size = chunk_rows(store.features)
        found = np.full((len(rows), k), -1, np.int64)
        distances = np.full((len(rows), k), np.inf, np.float32)
        k_found = min(k, len(store) - 1)
        for start in range(0, len(rows) if k_found else 0, size):
            chunk = slice(start, start + size)
            vectors = np.asarray(store.features[rows[chunk]]).reshape(len(rows[chunk]), -1)
            hits = self._searcher.nearest(vectors, k_found, own_rows=rows[chunk])
            far = np.where(hits.rows >= 0, np.maximum(1 - hits.scores, 0), np.inf)
            found[chunk, :k_found], distances[chunk, :k_found] = hits.rows, far
        return found, distances
