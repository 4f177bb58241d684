"""Intervals by the percentile bootstrap over queries (Efron and Tibshirani, 1993, chapter 13)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Score", "score_of"]

RESAMPLES = 2000
LEVEL = 0.95
# More different values than this are replaced by the means of as many groups of neighbors.
MAX_VALUES = 5_000

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Score:
    """Mean over queries, with an interval of 95 %.

    Attributes:
        value: The mean; NaN without queries.
        low: Lower end of the interval.
        high: Upper end of the interval.
        queries: Number of queries for which the measure is defined.
    """

    value: float
    low: float
    high: float
    queries: int


def score_of(values: Floats, seed: int) -> Score:
    """Return the mean of values, and its interval if other queries had been drawn.

    >>> score = score_of(np.array([0.0, 1.0, 1.0, 1.0]), seed=0)
    >>> score.value, 0 <= score.low < 0.75 < score.high <= 1
    (0.75, True)

    Args:
        values: ``(q,)``; NaN for a query that does not count.
        seed: Seed of the resamples.
    """
    defined = values[~np.isnan(values)]
    if not len(defined):
        return Score(np.nan, np.nan, np.nan, 0)
    # How often each value occurs in a resample is multinomial.
    unique, counts = np.unique(defined, return_counts=True)
    if len(unique) > MAX_VALUES:
        groups = np.array_split(np.sort(defined), MAX_VALUES)
        unique = np.array([group.mean() for group in groups])
        counts = np.array([len(group) for group in groups])
    random = np.random.default_rng(seed)
    total = len(defined)
    drawn = random.multinomial(total, counts / total, RESAMPLES)
    means = drawn @ unique / total
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Score(float(defined.mean()), float(low), float(high), total)
