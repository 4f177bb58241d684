"""Measures of retrieval and classification, for lists of neighbors; one value per query.

Definitions:

- k-NN accuracy: whether most of the k nearest rows have the query's class. Among classes with as
  many votes, the first one by name counts, as in scikit-learn's ``KNeighborsClassifier``.
- recall@k: whether one of the k nearest rows has the query's class, as in Oh Song et al., "Deep
  Metric Learning via Lifted Structured Feature Embedding", 2016.
- R-precision and MAP@R: over the R nearest rows, where R is the number of rows of the query's
  class, as in Musgrave et al., "A Metric Learning Reality Check", 2020, section 3.2.

The last three are undefined, NaN, for a query whose class has no other row.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["average_precision_at_r", "knn_accuracy", "r_precision", "recall"]

Codes = npt.NDArray[np.int64]
Matches = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


def knn_accuracy(neighbors: Codes, truth: Codes, classes: int, k: int) -> Floats:
    """Return 1 for each query whose k nearest rows vote for its class, else 0.

    >>> knn_accuracy(np.array([[0, 1, 1]]), np.array([1]), 2, 3).tolist()
    [1.0]

    Args:
        neighbors: ``(q, n)`` class of each neighbor, the nearest first; -1 for none.
        truth: ``(q,)`` class of each query; -1 for one that no row has.
        classes: Number of classes.
        k: Number of neighbors that vote.
    """
    votes = np.zeros((len(truth), classes + 1), np.int64)  # the last column is that of -1
    queries = np.arange(len(truth))
    for column in neighbors[:, :k].T:
        votes[queries, column] += 1
    winners = votes[:, :classes].argmax(axis=1)
    return np.where(winners == truth, 1.0, 0.0)


def recall(matches: Matches, relevant: Codes, k: int) -> Floats:
    """Return 1 for each query with a match among its k nearest rows, else 0.

    Args:
        matches: ``(q, n)``, whether each neighbor has the query's class, the nearest first.
        relevant: ``(q,)`` number of rows of the query's class, without itself.
        k: Number of neighbors.
    """
    return np.where(relevant > 0, matches[:, :k].any(axis=1), np.nan)


def r_precision(matches: Matches, relevant: Codes) -> Floats:
    """Return the share of matches among the R nearest rows of each query.

    >>> matches = np.array([[True, False, True, True]])
    >>> r_precision(matches, np.array([2])).tolist()
    [0.5]

    Args:
        matches: ``(q, n)``, the nearest first; n is at least the largest R.
        relevant: ``(q,)``, R of each query.
    """
    within = matches & _first(matches, relevant)
    return _ratio(within.sum(axis=1), relevant)


def average_precision_at_r(matches: Matches, relevant: Codes) -> Floats:
    """Return the sum of the precision at each match among the R nearest rows, divided by R.

    >>> matches = np.array([[True, False, True, True]])
    >>> average_precision_at_r(matches, np.array([3])).round(4).tolist()
    [0.5556]

    Args:
        matches: ``(q, n)``, the nearest first; n is at least the largest R.
        relevant: ``(q,)``, R of each query.
    """
    within = matches & _first(matches, relevant)
    precision = np.cumsum(matches, axis=1) / np.arange(1, matches.shape[1] + 1)
    return _ratio((precision * within).sum(axis=1), relevant)


def _first(matches: Matches, relevant: Codes) -> Matches:
    first: Matches = np.arange(matches.shape[1]) < relevant[:, None]
    return first


def _ratio(sums: npt.NDArray[np.number], relevant: Codes) -> Floats:
    return np.where(relevant > 0, sums / np.maximum(relevant, 1), np.nan)
