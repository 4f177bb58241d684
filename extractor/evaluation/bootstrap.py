"""Intervals by the percentile bootstrap over queries (Efron and Tibshirani, 1993, chapter 13)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["LEVEL", "RESAMPLES", "Score", "score_of"]

RESAMPLES = 2000
LEVEL = 0.95
# More different values than this are replaced by the means of as many groups of neighbors.
MAX_VALUES = 5_000
MAX_DRAWN = 2_000_000

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Score:
    """Mean over queries, with an interval.

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


def score_of(
    values: Floats, seed: int, *, level: float = LEVEL, resamples: int = RESAMPLES
) -> Score:
    """Return the mean of values, and its interval if other queries had been drawn.

    >>> score = score_of(np.array([0.0, 1.0, 1.0, 1.0]), seed=0)
    >>> score.value, 0 <= score.low < 0.75 < score.high <= 1
    (0.75, True)

    Args:
        values: ``(q,)``; NaN for a query that does not count.
        seed: Seed of the resamples.
        level: Probability that the interval covers.
        resamples: Number of resamples.
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
    step = max(MAX_DRAWN // len(unique), 1)  # resamples at a time
    means = np.concatenate(
        [
            random.multinomial(total, counts / total, min(step, resamples - done)) @ unique / total
            for done in range(0, resamples, step)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Score(float(defined.mean()), float(low), float(high), total)
