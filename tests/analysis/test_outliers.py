"""Outliers: ranks by distance, in all and per class, and labels that are probably wrong."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from support.vectors import OpenStore, turned

from extractor import find_outliers
from extractor.analysis import outliers as outliers_module
from extractor.errors import StoreError, UsageError


def distances(rows: np.ndarray, k: int) -> np.ndarray:
    """Return the mean distance to the k nearest other rows, by a sort of all pairs."""
    unit = rows / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    away = 1 - unit @ unit.T
    np.fill_diagonal(away, np.inf)
    nearest = np.sort(away, axis=1)[:, :k]
    return np.asarray(np.where(np.isinf(nearest), np.nan, nearest).mean(axis=1))


def clouds(sizes: tuple[int, ...], dim: int = 16, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    centers = random.standard_normal((len(sizes), dim)) * 4
    return np.concatenate(
        [
            center + random.standard_normal((size, dim))
            for center, size in zip(centers, sizes, strict=True)
        ]
    ).astype(np.float32)


def test_the_image_far_from_all_others_is_first(make_store: OpenStore) -> None:
    outliers = find_outliers(make_store(turned(0, 2, 3, 90, 5)), k=2)
    assert [each.row for each in outliers][:2] == [3, 0]
    first = outliers[0]
    assert (first.rank, first.path, first.neighbors) == (1, "00003.jpg", (4, 2))
    expected = 1 - np.cos(np.radians([85, 87])).mean()
    assert first.distance == pytest.approx(expected, abs=1e-6)
    assert (first.label, first.class_rank, first.class_distance) == (None, None, None)
    assert (len(outliers), outliers.method, outliers.label_errors) == (5, "exact", ())
    assert outliers[-1].rank == 5


def test_ranks_are_those_of_all_pairs_in_all_and_per_class(make_store: OpenStore) -> None:
    rows = clouds((30, 20, 10))
    labels = ["a"] * 30 + ["b"] * 20 + ["c"] * 10
    outliers = find_outliers(make_store(rows), labels, k=4)
    expected = distances(rows, 4)
    order = [each.row for each in outliers]
    assert order == np.argsort(-expected, kind="stable").tolist()
    np.testing.assert_allclose([each.distance for each in outliers], expected[order], atol=1e-6)
    assert [each.rank for each in outliers] == list(range(1, 61))
    of_b = distances(rows[30:50], 4)
    assert outliers.classes["b"].tolist() == (30 + np.argsort(-of_b, kind="stable")).tolist()
    first = outliers.of_rows(outliers.classes["b"])[0]
    assert (first.label, first.class_rank) == ("b", 1)
    assert first.class_distance == pytest.approx(of_b.max(), abs=1e-6)


def test_an_image_whose_neighbors_agree_on_another_label_is_found(make_store: OpenStore) -> None:
    rows = clouds((20, 20))
    labels = ["cat"] * 20 + ["dog"] * 20
    labels[3], labels[25], labels[26] = "dog", "cat", "bird"
    outliers = find_outliers(make_store(rows), labels, k=5)
    found = {each.row: (each.label, each.suggested) for each in outliers.label_errors}
    assert found == {3: ("dog", "cat"), 25: ("cat", "dog"), 26: ("bird", "dog")}
    assert all(each.agreement > 0.5 and each.support < 0.5 for each in outliers.label_errors)
    scores = [(-each.agreement, each.support) for each in outliers.label_errors]
    assert scores == sorted(scores)


def test_a_near_neighbor_has_more_votes_than_a_far_one(make_store: OpenStore) -> None:
    store = make_store(turned(0, 1, 3, 7, 12))
    outliers = find_outliers(store, ["a", "b", "a", "a", "a"], k=4)
    errors = {each.row: each for each in outliers.label_errors}
    # The neighbors of row 1 by rank: 0, 2, 3, 4. The votes are 1 + 1/2 + 1/3 + 1/4.
    assert errors[1].agreement == pytest.approx(1)
    # Those of row 0: 1 (b), then three of its own label.
    assert 0 not in errors
    labels = ["b", "b", "c", "b", "d"]
    (error,) = find_outliers(store, labels, k=4).of_rows([2])
    assert error.neighbors == (1, 0, 3, 4)
    found = {each.row: each for each in find_outliers(store, labels, k=4).label_errors}
    votes = 1 + 1 / 2 + 1 / 3
    assert found[2].agreement == pytest.approx(votes / (votes + 1 / 4))
    assert found[2].support == 0


def test_the_only_image_of_a_class_has_no_rank_in_it(make_store: OpenStore) -> None:
    outliers = find_outliers(make_store(turned(0, 1, 2)), ["a", "b", "a"], k=1)
    (only,) = outliers.of_rows([1])
    assert (only.label, only.class_rank, only.class_distance) == ("b", None, None)
    assert outliers.classes["b"].tolist() == []
    assert outliers.classes["a"].tolist() == [0, 2]


def test_labels_come_from_folders(make_store: OpenStore) -> None:
    store = make_store(turned(0, 1, 90), names=["a/1.jpg", "a/2.jpg", "b/3.jpg"])
    outliers = find_outliers(store, "folders")
    assert sorted(outliers.classes) == ["a", "b"]
    assert outliers.k == 2


def test_missing_labels_are_refused(make_store: OpenStore) -> None:
    with pytest.raises(UsageError, match="3 rows without a label"):
        find_outliers(make_store(turned(0, 1, 2)), "folders")
    with pytest.raises(UsageError, match="got 2 labels for 3 rows"):
        find_outliers(make_store(turned(0, 1, 2), "other"), ["a", "b"])


def test_rows_with_nan_are_left_out_and_are_no_neighbors(make_store: OpenStore) -> None:
    rows = turned(0, 1, 2, 90)
    rows[1, 0], rows[2, 0] = np.nan, np.inf
    outliers = find_outliers(make_store(rows), ["a", "a", "a", "b"])
    assert outliers.left_out == 2
    assert [each.row for each in outliers] == [0, 3]
    assert outliers[0].neighbors == (3,)
    assert outliers.label_errors[0].neighbors == (3,)
    mapping = json.loads(json.dumps(outliers.to_mapping(), allow_nan=False))
    assert len(mapping["outliers"]) == 2


def test_an_image_of_zeros_is_at_distance_one(make_store: OpenStore) -> None:
    rows = turned(0, 1, 2)
    rows[1] = 0
    assert find_outliers(make_store(rows), k=1)[0].distance == 1
    assert find_outliers(make_store(rows, "again"), k=1)[0].row == 1


@pytest.mark.parametrize("way", ["sample", "index"])
def test_a_large_store_has_nearly_the_same_ranks(
    make_store: OpenStore, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    rows = clouds((300, 300))
    rows[100] *= -1
    store = make_store(rows)
    exact = find_outliers(store, ["a"] * 300 + ["b"] * 300)
    if way == "index":
        pytest.importorskip("faiss")
        store._searcher.build_index("hnsw")
    monkeypatch.setattr(outliers_module, "MAX_EXACT", 200)
    monkeypatch.setattr(outliers_module, "SAMPLE_ROWS", 150)
    outliers = find_outliers(store, ["a"] * 300 + ["b"] * 300)
    assert way in outliers.method
    assert outliers[0].row == exact[0].row == outliers.classes["a"][0] == 100
    first, again = ([each.row for each in some[:60]] for some in (exact, outliers))
    assert len(set(first) & set(again)) > 40


@pytest.mark.parametrize("k", [0, 3, 1.5, True])
def test_k_out_of_range_is_refused(make_store: OpenStore, k: Any) -> None:
    with pytest.raises(UsageError, match=r"k: got .*, expected an integer from 1 to 2"):
        find_outliers(make_store(turned(0, 1, 2)), k=k)


@pytest.mark.parametrize("count", [0, 1])
def test_a_store_of_few_rows_has_no_outliers(make_store: OpenStore, count: int) -> None:
    with pytest.raises(StoreError, match=f"holds {count} row.*expected at least two"):
        find_outliers(make_store(turned(0, 1)[:count]))


def test_progress_names_the_phase_and_grows(
    make_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outliers_module, "BLOCK_ROWS", 5)
    seen: list[tuple[str, int, int]] = []
    labels = ["a"] * 8 + ["b"] * 4
    find_outliers(make_store(clouds((8, 4))), labels, progress=lambda *each: seen.append(each))
    assert seen[:4] == [("comparing", done, 12) for done in (0, 5, 10, 12)]
    assert seen[4:] == [("classes", 0, 12), ("classes", 8, 12)]


def test_iteration_reads_some_images_at_a_time(
    make_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    outliers = find_outliers(make_store(clouds((8, 4))))
    whole = outliers[:]
    monkeypatch.setattr(outliers_module, "IMAGES_AT_ONCE", 5)
    assert list(outliers) == whole


def test_a_mapping_may_hold_the_first_only(make_store: OpenStore) -> None:
    outliers = find_outliers(make_store(clouds((6, 6))), ["a"] * 6 + ["b"] * 6)
    found = outliers.to_mapping(2)
    assert [len(each) for each in (found["outliers"], found["classes"]["a"])] == [2, 2]
    assert len(outliers.to_mapping()["outliers"]) == 12
