"""Rows of unit length, read as they are needed, and their cosine similarities."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from extractor.search.knn import Features, pair_scores, prepared

__all__ = ["Numbers", "UnitRows"]

Numbers: TypeAlias = npt.NDArray[np.int64]
Floats32: TypeAlias = npt.NDArray[np.float32]

BLOCK_BYTES = 16 * 2**20  # of rows in memory at a time
PAIR_BYTES = 16 * 2**20  # of rows that are scored in float64 at a time


class UnitRows:
    """Some rows of an array, scaled to unit length; those without a direction are zeros.

    Args:
        features: ``(N, dim)``; further axes are flattened.
        rows: ``(n,)`` int64, rows of the array. They are numbered from 0 here.
    """

    def __init__(self, features: Features, rows: Numbers) -> None:
        self._features = features
        self._rows = rows
        self.dim = math.prod(features.shape[1:])

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def block_rows(self) -> int:
        """Number of rows that fit into one block."""
        return max(BLOCK_BYTES // (4 * max(self.dim, 1)), 1)

    def take(self, numbers: Numbers) -> Floats32:
        """Return rows ``(n, dim)`` float32 of unit length."""
        block = self._raw(numbers)
        wide = block.astype(np.float32) if block.dtype == np.float16 else block
        with np.errstate(all="ignore"):
            unit = np.ascontiguousarray(prepared(wide, "cosine"), np.float32)
        unit[~np.isfinite(unit).all(axis=1)] = 0
        return unit

    def blocks(self) -> Iterator[tuple[int, Floats32]]:
        """Yield the first number of each block, and its rows ``(n, dim)``."""
        for start in range(0, len(self), self.block_rows):
            stop = min(start + self.block_rows, len(self))
            yield start, self.take(np.arange(start, stop))

    def similarities(self, left: Numbers, right: Numbers) -> npt.NDArray[np.float64]:
        """Return the cosine similarity of each pair, ``(n,)``, computed in float64.

        It is -inf if a row holds NaN or infinity, and 0 for a row of zeros.
        """
        step = max(PAIR_BYTES // (8 * max(self.dim, 1)), 1)
        found = [
            self._similarities(left[start : start + step], right[start : start + step])
            for start in range(0, len(left), step)
        ]
        return np.concatenate(found) if found else np.empty(0)

    def _similarities(self, left: Numbers, right: Numbers) -> npt.NDArray[np.float64]:
        # The lower row first, so that a pair has one similarity to the last bit.
        low, high = np.minimum(left, right), np.maximum(left, right)
        with np.errstate(all="ignore"):
            queries = prepared(_moderate(self._raw(low)), "cosine")
            return pair_scores(_moderate(self._raw(high)), queries, "cosine")

    def _raw(self, numbers: Numbers) -> npt.NDArray[Any]:
        block = np.asarray(self._features[self._rows[numbers]])
        return block.reshape(len(block), -1)


def _moderate(block: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return rows in float64 whose largest value is 1, so that no square overflows."""
    wide = block.astype(np.float64)
    peaks = np.abs(wide).max(axis=1, initial=0.0, keepdims=True)
    scaled: npt.NDArray[np.float64] = wide / np.where(peaks > 0, peaks, 1)
    return scaled
