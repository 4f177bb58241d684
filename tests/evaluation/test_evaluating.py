"""Measures equal an independent brute force, on data with ties and classes of one row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from extractor import FeatureStore, StoreError, UsageError, evaluate_store
from extractor.evaluation import evaluating

WriteStore = Callable[..., Path]
K = (1, 2, 5, 20)


def order_of(distances: np.ndarray) -> np.ndarray:
    """Rows from near to far; among equal distances the lower row is first."""
    columns = range(distances.shape[1])
    return np.array([sorted(columns, key=lambda c: (of_query[c], c)) for of_query in distances])


def brute_force(distances: np.ndarray, rows: list[str], queries: list[str], own: bool) -> dict:
    """Every measure of every query, with loops over Python lists."""
    found: dict[str, list[float]] = {}
    for query, label in enumerate(queries):
        order = [r for r in order_of(distances[query : query + 1])[0] if not (own and r == query)]
        hits = [rows[r] == label for r in order]
        total = sum(hits)
        for k in K:
            votes = [rows[r] for r in order[:k]]
            winner = min(set(votes), key=lambda name: (-votes.count(name), name))
            found.setdefault(f"accuracy@{k}", []).append(float(winner == label))
            recalled = float(any(hits[:k])) if total else float("nan")
            found.setdefault(f"recall@{k}", []).append(recalled)
        precisions = [sum(hits[: i + 1]) / (i + 1) for i in range(total) if hits[i]]
        found.setdefault("MAP@R", []).append(sum(precisions) / total if total else float("nan"))
        found.setdefault("R-precision", []).append(
            sum(hits[:total]) / total if total else float("nan")
        )
    return found


def check(evaluation: Any, expected: dict[str, list[float]]) -> None:
    assert list(evaluation.scores) == list(evaluation.values)
    assert set(evaluation.scores) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(evaluation.values[name], values, atol=1e-9, err_msg=name)
        assert evaluation.scores[name].value == pytest.approx(np.nanmean(values), abs=1e-9)
        assert evaluation.scores[name].queries == np.isfinite(values).sum()


def labels(random: np.random.Generator, count: int) -> list[str]:
    """Classes of very different sizes, among them some of one row."""
    names = [f"class {number}" for number in random.zipf(1.7, count) % 40]
    return [*names[:-2], "lonely", "alone"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("metric", ["cosine", "l2", "ip"])
@pytest.mark.parametrize("long_lists", [0, 10_000], ids=["searched", "ranked"])
def test_measures_equal_a_brute_force(
    tmp_path: Path,
    write_store: WriteStore,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    metric: str,
    long_lists: int,
) -> None:
    monkeypatch.setattr(evaluating, "LONG_LISTS", long_lists)
    random = np.random.default_rng(seed)
    # Small integers: distances tie often, and are exact.
    rows = random.integers(-2, 3, (90, 4)).astype(np.float32)
    wide = rows.astype(np.float64)
    if metric == "cosine":
        wide = random.standard_normal((90, 4)).astype(np.float32).astype(np.float64)
        wide[10:20] = wide[20:30]
        rows = wide.astype(np.float32)
        unit = wide / np.sqrt((wide * wide).sum(1, keepdims=True))
        distances = -np.round(unit @ unit.T, 12)
    elif metric == "l2":
        distances = ((wide[:, None] - wide[None]) ** 2).sum(2)
    else:
        distances = -wide @ wide.T
    names = labels(random, 90)
    store = write_store(tmp_path / "store", [rows[:50], rows[50:]])
    evaluation = evaluate_store(store, names, k=K, metric=metric)
    check(evaluation, brute_force(distances, names, names, own=True))
    singles = sum(names.count(name) == 1 for name in names)
    assert evaluation.unmatched == singles >= 2


@pytest.mark.parametrize("k", [1, 2, 5, 20])
def test_accuracy_is_that_of_scikit_learn(tmp_path: Path, write_store: WriteStore, k: int) -> None:
    neighbors: Any = pytest.importorskip("sklearn.neighbors")
    random = np.random.default_rng(k)
    rows = random.integers(-2, 3, (90, 4)).astype(np.float32)
    names = labels(random, 90)
    squares = ((rows[:, None] - rows[None]) ** 2).sum(2)
    # Equal distances differ by less than the next distance, so that the lower row is nearer.
    distinct = squares * 1000.0 + np.arange(90)
    right = []
    for query in range(90):
        others = np.delete(np.arange(90), query)
        classifier = neighbors.KNeighborsClassifier(k, metric="precomputed", algorithm="brute")
        classifier.fit(distinct[np.ix_(others, others)], np.array(names)[others])
        right.append(classifier.predict(distinct[query, others][None])[0] == names[query])
    evaluation = evaluate_store(write_store(tmp_path / "store", [rows]), names, k=[k], metric="l2")
    np.testing.assert_array_equal(evaluation.values[f"accuracy@{k}"], right)


def test_chunks_of_queries_change_nothing(
    tmp_path: Path, write_store: WriteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.random.default_rng(0).standard_normal((30, 4), np.float32)
    store = write_store(tmp_path / "store", [rows])
    names = [f"{row % 4}" for row in range(30)]
    whole = evaluate_store(store, names)
    monkeypatch.setattr(evaluating, "MAX_QUERIES", 7)
    parts = evaluate_store(store, names)
    assert whole == parts
    for name, values in whole.values.items():
        np.testing.assert_array_equal(parts.values[name], values)


def test_queries_of_another_store_are_not_left_out(tmp_path: Path, write_store: WriteStore) -> None:
    random = np.random.default_rng(0)
    rows = random.integers(-2, 3, (40, 3)).astype(np.float32)
    asked = np.concatenate([rows[:5], random.integers(-2, 3, (10, 3)).astype(np.float32)])
    names, query_names = labels(random, 40), [*labels(random, 14), "unknown"]
    store = write_store(tmp_path / "store", [rows])
    queries = write_store(tmp_path / "queries", [asked])
    evaluation = evaluate_store(
        store, names, k=K, metric="l2", queries=queries, query_labels=query_names
    )
    distances = ((asked[:, None] - rows[None]) ** 2).sum(2)
    check(evaluation, brute_force(distances, names, query_names, own=False))
    assert evaluation.classes["unknown"].rows == 0
    assert evaluation.classes["unknown"].scores["accuracy@1"] == 0


def test_classes_are_means_of_their_queries(tmp_path: Path, write_store: WriteStore) -> None:
    # a: 0 and 1, b: 10 and 2; the nearest of 10 is 2, and of 2 is 1.
    rows = np.array([[0], [1], [10], [2]], np.float32)
    store = write_store(tmp_path / "store", [rows])
    evaluation = evaluate_store(store, ["a", "a", "b", "b"], metric="l2")
    assert list(evaluation.values["accuracy@1"]) == [1, 1, 1, 0]
    assert {name: each.scores["accuracy@1"] for name, each in evaluation.classes.items()} == {
        "a": 1.0,
        "b": 0.5,
    }
    assert (evaluation.rows, evaluation.queries, evaluation.classes["a"].rows) == (4, 4, 2)
    assert "accuracy@5" not in evaluation.scores  # there are three other rows


def test_result_for_json_has_no_nan(tmp_path: Path, write_store: WriteStore) -> None:
    store = write_store(tmp_path / "store", [np.eye(3, dtype=np.float32)])
    mapping = evaluate_store(store, ["a", "a", "b"]).to_mapping()
    assert json.loads(json.dumps(mapping, allow_nan=False)) == mapping
    assert mapping["classes"]["b"]["scores"]["MAP@R"] is None
    assert mapping["unmatched"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": ["a", "b", "c"]}, r"no query has another row of its class \(3 rows in 3 cl"),
        ({"labels": ["a", "a", "a"]}, "have the label 'a'; expected two classes"),
        ({"labels": ["a", "a"]}, "labels: got 2 labels for 3 rows"),
        ({"labels": ["a", "a", None]}, r"labels: 1 row without a label: 0/2.jpg;"),
        ({"k": [3]}, "k: got 3, but a query has 2 other rows"),
        ({"k": [0]}, "k: got 0, expected integers of at least 1"),
        ({"k": []}, "k: got an empty list"),
        ({"k": 1}, "k: got 1, expected a list of integers"),
        ({"seed": -1}, "seed: got -1, expected an integer of at least 0"),
        ({"seed": 0.5}, "seed: got 0.5, expected an integer of at least 0"),
        ({"labels": ["a", "a", float("nan")]}, r"labels: 1 row without a label: 0/2.jpg;"),
        ({"labels": [np.float32("nan"), "a", "a"]}, r"labels: 1 row without a label: 0/0.jpg;"),
        ({"metric": "dot"}, "metric: got 'dot', expected one of cosine, ip, l2"),
        ({"query_labels": ["a"]}, "query labels: there are no queries"),
    ],
)
def test_bad_argument_is_refused(
    tmp_path: Path, write_store: WriteStore, arguments: dict, message: str
) -> None:
    store = write_store(tmp_path / "store", [np.eye(3, dtype=np.float32)])
    with pytest.raises(UsageError, match=message):
        evaluate_store(store, **{"labels": ["a", "a", "b"], **arguments})


def test_store_without_rows_is_refused(tmp_path: Path, write_store: WriteStore) -> None:
    store = write_store(tmp_path / "store", [], failures=[(b"a", "reason", "message")])
    with pytest.raises(UsageError, match="holds no rows"):
        evaluate_store(store, [])


def test_queries_of_another_backbone_are_refused(tmp_path: Path, write_store: WriteStore) -> None:
    rows = [np.eye(3, dtype=np.float32)]
    store = write_store(tmp_path / "store", rows)
    other = write_store(tmp_path / "other", rows, backbone={"model": "timm:other", "sha256": "1"})
    with pytest.raises(StoreError, match="made differently"):
        evaluate_store(store, ["a", "a", "b"], queries=other)


def test_probe_separates_what_a_line_separates(tmp_path: Path, write_store: WriteStore) -> None:
    pytest.importorskip("sklearn")
    random = np.random.default_rng(0)
    rows = random.standard_normal((60, 4)).astype(np.float32)
    names = ["right" if row[0] > 0 else "left" for row in rows]
    rows[:, 0] += 3 * np.sign(rows[:, 0])
    store = write_store(tmp_path / "store", [rows])
    evaluation = evaluate_store(store, names, probe=True)
    assert evaluation.scores["linear probe"].value == 1
    assert evaluate_store(store, names, probe=True, seed=2**40).scores["linear probe"].value == 1
    noise = [f"{number}" for number in random.integers(0, 2, 60)]
    assert evaluate_store(store, noise, probe=True).scores["linear probe"].value < 0.75
    queries = write_store(tmp_path / "queries", [rows[:4]])
    apart = evaluate_store(store, names, probe=True, queries=queries, query_labels=names[:4])
    assert apart.scores["linear probe"].queries == 4
    single = evaluate_store(store, [*names[:-1], "lonely"], probe=True)
    assert single.values["linear probe"][-1] == 0


def test_evaluation_of_a_group_of_folders(tmp_path: Path, write_store: WriteStore) -> None:
    names = [[b"cats/1.jpg", b"cats/2.jpg", b"x/dogs/1.jpg", b"y/dogs/2.jpg"]]
    rows = np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1]], np.float32)
    store = FeatureStore.open(write_store(tmp_path / "store", [rows], names=names))
    evaluation = evaluate_store(store)
    assert list(evaluation.classes) == ["cats", "dogs"]
    assert evaluation.scores["MAP@R"].value == 1


def test_progress_counts_queries_and_names_the_training(
    tmp_path: Path, write_store: WriteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(evaluating, "MAX_QUERIES", 4)
    rows = np.random.default_rng(0).standard_normal((10, 3)).astype(np.float32)
    store = write_store(tmp_path / "store", [rows])
    seen: list[tuple[str, int, int]] = []
    labels = ["a", "b"] * 5
    evaluate_store(store, labels, probe=True, progress=lambda *step: seen.append(step))
    counts = [("comparing", done, 10) for done in (0, 4, 8, 10)]
    assert seen == [*counts, ("training", 0, 10)]
