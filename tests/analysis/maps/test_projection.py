"""Principal components equal those of a singular value decomposition, however rows are read."""

from __future__ import annotations

import numpy as np
import pytest

from extractor.analysis.maps import projection
from extractor.analysis.maps.projection import finite_rows, principal_components
from extractor.reading.array import KeptRows
from extractor.search import knn


def rows_of(count: int, dim: int) -> np.ndarray:
    random = np.random.default_rng(count + dim)
    spread = random.normal(size=(count, dim)) * np.geomspace(5, 0.5, dim)
    return (spread + 2).astype(np.float32)


def reference(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates and shares of variance by a singular value decomposition in float64."""
    unit = rows.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    centered = unit - unit.mean(axis=0)
    left, values, axes = np.linalg.svd(centered, full_matrices=False)
    signs = np.sign(axes[np.arange(2), np.abs(axes[:2]).argmax(axis=1)])
    return left[:, :2] * values[:2] * signs, values[:2] ** 2 / (values**2).sum()


@pytest.mark.parametrize("covariance", [0, 64], ids=["iterated", "covariance"])
@pytest.mark.parametrize(("count", "dim"), [(200, 12), (7, 30), (3, 2)])
def test_components_equal_a_singular_value_decomposition(
    monkeypatch: pytest.MonkeyPatch, covariance: int, count: int, dim: int
) -> None:
    monkeypatch.setattr(projection, "MAX_COVARIANCE", covariance)
    monkeypatch.setattr(knn, "BLOCK_BYTES", 4 * dim * 5)  # five rows
    monkeypatch.setattr(projection, "CONVERGED", 1e-12)
    rows = rows_of(count, dim)
    found = principal_components(rows)
    points, shares = reference(rows)
    np.testing.assert_allclose(found.project(rows), points, atol=2e-4)
    np.testing.assert_allclose(found.explained, shares, atol=1e-5)


def test_the_length_of_a_row_does_not_matter() -> None:
    rows = rows_of(20, 4)
    lengths = np.geomspace(1e-20, 1e20, 20, dtype=np.float32)[:, None]
    found, expected = principal_components(rows * lengths), principal_components(rows)
    np.testing.assert_allclose(found.axes, expected.axes, atol=1e-4)


@pytest.mark.parametrize("covariance", [0, 64], ids=["iterated", "covariance"])
@pytest.mark.parametrize(
    "rows",
    [np.ones((1, 3)), np.ones((5, 3)), np.zeros((4, 3)), np.ones((3, 1)), np.array([[1.0], [-1]])],
    ids=["one row", "equal rows", "zeros", "one value", "one axis"],
)
def test_an_axis_without_variance_has_coordinates_of_zero(
    monkeypatch: pytest.MonkeyPatch, covariance: int, rows: np.ndarray
) -> None:
    monkeypatch.setattr(projection, "MAX_COVARIANCE", covariance)
    found = principal_components(rows.astype(np.float32))
    points = found.project(rows.astype(np.float32))
    assert points.shape == (len(rows), 2)
    expected = [1.0, -1.0] if len(rows) == 2 else [0.0] * len(rows)
    np.testing.assert_allclose(points[:, 0], expected, atol=1e-6)
    assert found.explained == (float(len(rows) == 2), 0.0)
    assert not points[:, 1].any()


def test_finite_rows_are_those_without_nan_and_infinity() -> None:
    rows = np.zeros((4, 2, 2), np.float16)
    rows[1, 0, 1], rows[3, 1, 0] = np.nan, -np.inf
    assert finite_rows(rows).tolist() == [True, False, True, False]
    assert finite_rows(KeptRows(rows, np.array([3, 2]))).tolist() == [False, True]
    assert finite_rows(rows[:0]).tolist() == []
