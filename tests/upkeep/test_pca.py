"""Principal components, summed block by block, are those of all rows at once."""

from __future__ import annotations

import numpy as np
import pytest

from extractor.upkeep.pca import principal_components

ROWS = np.random.default_rng(0).normal(size=(400, 12)) @ np.random.default_rng(1).normal(
    size=(12, 12)
)


@pytest.mark.parametrize("sizes", [[400], [1, 399], [7] * 57 + [1]])
@pytest.mark.parametrize("offset", [0, 1e6])
def test_components_are_those_of_the_singular_value_decomposition(
    sizes: list[int], offset: float
) -> None:
    """A mean a million times the spread costs digits of the rows, and no more."""
    rows = ROWS + offset
    found = principal_components(np.split(rows, np.cumsum(sizes)[:-1]), 12)
    _, singular, directions = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    assert found.rows == 400
    assert found.rank == 12
    np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.variances, singular**2 / 399, rtol=1e-7)
    cosines = np.abs(np.einsum("ij,ij->i", found.directions, directions))
    np.testing.assert_allclose(cosines, 1, atol=1e-9)
    largest = np.abs(found.directions).argmax(1)
    assert (found.directions[np.arange(12), largest] > 0).all()


def test_components_equal_those_of_scikit_learn() -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    judge = decomposition.PCA(5, whiten=True, svd_solver="full").fit(ROWS)
    found = principal_components(np.array_split(ROWS, 9), 12)
    np.testing.assert_allclose(found.variances[:5], judge.explained_variance_, rtol=1e-9)
    scaled = (ROWS - found.mean) @ found.directions[:5].T / np.sqrt(found.variances[:5])
    expected = judge.transform(ROWS)
    signs = np.sign((scaled * expected).sum(0))
    np.testing.assert_allclose(scaled * signs, expected, atol=1e-9)


@pytest.mark.parametrize(
    ("rows", "rank"),
    [
        (ROWS[:1], 0),
        (ROWS[:5], 4),
        (np.ones((9, 12)), 0),
        (ROWS[:, :1] * np.arange(1, 13), 1),
        (np.zeros((3, 12)), 0),
    ],
    ids=["one row", "fewer rows than dims", "all equal", "one direction", "zeros"],
)
def test_rank_counts_the_directions_in_which_rows_vary(rows: np.ndarray, rank: int) -> None:
    assert principal_components([rows], 12).rank == rank
