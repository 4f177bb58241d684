"""Neighbors of rows equal a brute force."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from extractor.analysis.maps import neighbors
from extractor.analysis.maps.neighbors import RowNeighbors
from extractor.errors import UsageError
from extractor.reading.reader import FeatureStore


@pytest.fixture
def store(tmp_path: Path, write_store: Callable[..., Path]) -> FeatureStore:
    rows = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
    return FeatureStore.open(write_store(tmp_path / "out", [rows[:20], rows[20:]]))


def test_many_neighbors_without_an_index_are_refused(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbors, "EXACT_ROWS", 29)
    with pytest.raises(
        UsageError, match=r"30 rows would take hours; run extract index .* or try pca"
    ):
        RowNeighbors(store, 30, 4, "pca")
    RowNeighbors(store, 28, 4, "pca")
    with pytest.raises(UsageError, match="neighbors: got 100, expected fewer than 100 for 30 rows"):
        RowNeighbors(store, 30, 100, "pca")


def test_neighbors_are_those_of_a_brute_force(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbors, "CHUNK", 7)
    rows = np.array(store.features, np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    far = 1 - rows @ rows.T
    np.fill_diagonal(far, np.inf)
    found, distances = RowNeighbors(store, 30, 4, "pca").of(np.arange(30))
    np.testing.assert_array_equal(found, np.argsort(far, axis=1)[:, :4])
    np.testing.assert_allclose(distances, np.sort(far, axis=1)[:, :4], atol=1e-6)
    found, distances = RowNeighbors(store, 1, 40, "pca").of(np.array([7]))
    assert (found[0, 29:] == -1).all()
    assert np.isinf(distances[0, 29:]).all()


def test_a_single_row_has_no_neighbor(tmp_path: Path, write_store: Callable[..., Path]) -> None:
    store = FeatureStore.open(write_store(tmp_path / "one", [np.ones((1, 3), np.float32)]))
    found, distances = RowNeighbors(store, 1, 2, "pca").of(np.array([0]))
    assert found.tolist() == [[-1, -1]]
    assert np.isinf(distances).all()
