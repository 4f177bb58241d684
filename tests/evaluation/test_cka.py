"""Linear CKA follows its definition and its laws."""

from __future__ import annotations

import numpy as np
import pytest

from extractor.evaluation import cka
from extractor.evaluation.cka import linear_cka


def by_definition(first: np.ndarray, second: np.ndarray) -> float:
    """HSIC of linear kernels, with the centering matrix written out."""
    n = len(first)
    center = np.eye(n) - np.ones((n, n)) / n
    k, m = (center @ rows @ rows.T @ center for rows in (first, second))
    return float(np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m)))


@pytest.mark.parametrize("shape", [(30, 4, 7), (6, 10, 3), (5, 9, 9), (40, 1, 1)])
def test_cka_is_that_of_its_definition(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    n, p, q = shape
    random = np.random.default_rng(n)
    first, second = random.standard_normal((n, p)) + 3, random.standard_normal((n, q)) - 1
    second[:, 0] += first[:, 0]
    monkeypatch.setattr(cka, "BLOCK_ROWS", 7)
    assert linear_cka(first, second) == pytest.approx(by_definition(first, second), rel=1e-9)
    assert linear_cka(first, second) == pytest.approx(linear_cka(second, first), rel=1e-12)


def test_rotation_and_scale_change_nothing() -> None:
    random = np.random.default_rng(0)
    rows = random.standard_normal((40, 5))
    rotation, _ = np.linalg.qr(random.standard_normal((5, 5)))
    assert linear_cka(rows, 7 * rows @ rotation + 2) == pytest.approx(1, abs=1e-12)


def test_rows_that_are_all_equal_have_no_cka() -> None:
    assert np.isnan(linear_cka(np.ones((4, 2)), np.random.default_rng(0).random((4, 2))))
