"""Linear probe: a logistic regression on frozen embeddings."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from extractor.errors import InstallationError

__all__ = ["probe"]

FOLDS = 5
MAX_STEPS = 1000

Codes = npt.NDArray[np.int64]


def probe(
    rows: npt.NDArray[Any],
    classes: Codes,
    queries: npt.NDArray[Any] | None,
    truth: Codes,
    *,
    seed: int,
) -> npt.NDArray[np.float64]:
    """Return 1 for each query that a linear classifier puts into its class, else 0.

    The classifier is scikit-learn's ``LogisticRegression`` (L2, C = 1) on standardized rows.

    Args:
        rows: ``(N, dim)``, the rows to train on.
        classes: ``(N,)``, the class of each.
        queries: ``(q, dim)``; None for the rows themselves, each of them predicted by the one of
            five classifiers that was trained without it.
        truth: ``(q,)``, the class of each query.
        seed: Seed of the five parts.

    Raises:
        InstallationError: scikit-learn is not installed.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise InstallationError(
            "probe: scikit-learn is not installed; pip install 'backbone-extractor[evaluate]'"
        ) from error

    def predicted(train: Any, tested: npt.NDArray[Any]) -> Codes:
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_STEPS))
        classifier.fit(rows[train], classes[train])
        answers: Codes = classifier.predict(tested)
        return answers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", message="The least populated class")
        if queries is not None:
            found = predicted(slice(None), queries)
            return np.where(found == truth, 1.0, 0.0)
        folds = min(FOLDS, int(np.bincount(classes).max()))
        right = np.zeros(len(rows))
        parts = StratifiedKFold(folds, shuffle=True, random_state=seed % 2**32)
        for train, tested in parts.split(rows, classes):
            right[tested] = predicted(train, rows[tested]) == truth[tested]
        return right
