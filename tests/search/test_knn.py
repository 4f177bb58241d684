"""Exact nearest neighbors: the same answers as a brute force in float64, whatever computes them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from extractor.errors import InstallationError, UsageError
from extractor.reading.array import KeptRows, ShardedArray
from extractor.search import knn
from extractor.search.knn import METRICS, nearest

LIBRARIES = ("faiss", "numpy")


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> str:
    if request.param == "faiss":
        pytest.importorskip("faiss")
    return request.param


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows and chunks of a few queries, so that each test has several."""
    monkeypatch.setattr(knn, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(knn, "PAIR_BYTES", 500)
    monkeypatch.setattr(knn, "QUERY_CHUNK", 7)


def score(row: np.ndarray, query: np.ndarray, metric: str) -> float:
    """The score of one row, by Python's exact sum of floats."""
    a, b = row.astype(float).tolist(), query.astype(float).tolist()
    if metric == "l2":
        return math.sqrt(math.fsum((x - y) ** 2 for x, y in zip(a, b, strict=True)))
    product = math.fsum(x * y for x, y in zip(a, b, strict=True))
    if metric == "ip":
        return product
    lengths = math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))
    return product / lengths if lengths else 0.0


def brute_force(
    rows: np.ndarray, queries: np.ndarray, k: int, metric: str, own: np.ndarray | None = None
) -> tuple[list[list[int]], list[list[float]]]:
    all_rows, all_scores = [], []
    for number, query in enumerate(queries):
        scores = [score(row, query, metric) for row in rows]
        sign = 1 if metric == "l2" else -1
        order = [i for i in range(len(rows)) if own is None or i != own[number]]
        order.sort(key=lambda i: (round(sign * scores[i], 11), i))
        all_rows.append(order[:k])
        all_scores.append([scores[i] for i in order[:k]])
    return all_rows, all_scores


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("dim", [1, 3, 40])
@pytest.mark.parametrize("leave_out", [False, True])
def test_answers_equal_a_brute_force_with_ties_and_zeros(
    dim: int, dtype: type, metric: str, leave_out: bool, library: str
) -> None:
    random = np.random.default_rng(dim)
    distinct: np.ndarray = random.normal(size=(40, dim)).astype(dtype)
    rows = distinct[random.integers(0, 40, 200)]
    rows[[5, 60]] = 0
    picked = random.integers(0, 200, 16)
    own = picked if leave_out else None

    found = nearest(rows, rows[picked], 9, metric=metric, own_rows=own, library=library)

    expected_rows, expected_scores = brute_force(rows, rows[picked], 9, metric, own)
    assert found.rows.tolist() == expected_rows
    np.testing.assert_allclose(
        found.scores, expected_scores, rtol=0, atol=1e-7 if metric == "l2" else 1e-12
    )


@pytest.mark.parametrize("metric", METRICS)
def test_ties_beyond_the_candidates_go_to_the_lower_row(metric: str, library: str) -> None:
    rows = np.ones((500, 3), np.float32)
    rows[400] = [1, 1, 1.5] if metric == "ip" else rows[400]
    found = nearest(rows, [[1, 1, 1]], 4, metric=metric, library=library)
    assert found.rows.tolist() == [[400, 0, 1, 2] if metric == "ip" else [0, 1, 2, 3]]


def test_near_ties_are_ordered_as_float64_has_them(library: str) -> None:
    """Rows whose products differ by less than float32 resolves: 1 + i * 2**-26."""
    order = np.random.default_rng(0).permutation(300)
    rows = np.stack([np.ones(300), order * 2.0**-26], axis=1).astype(np.float32)
    found = nearest(rows, [[1, 1]], 5, metric="ip", library=library)
    assert found.rows.tolist() == [[int(np.flatnonzero(order == 299 - i)[0]) for i in range(5)]]
    assert found.scores.tolist() == [[1 + (299 - i) * 2.0**-26 for i in range(5)]]


def test_shards_on_disk_give_the_rows_of_one_array(tmp_path: Path, library: str) -> None:
    rows = np.random.default_rng(1).normal(size=(90, 5)).astype(np.float32)
    np.save(tmp_path / "a.npy", rows[:30])
    np.save(tmp_path / "b.npy", rows[20:])
    second = np.load(tmp_path / "b.npy", mmap_mode="r")
    kept = KeptRows(second, np.arange(70) >= 10)
    array = ShardedArray(
        [np.load(tmp_path / "a.npy", mmap_mode="r"), kept], row_shape=(5,), dtype=rows.dtype
    )
    found = nearest(array, rows[:9], 6, library=library)
    expected = nearest(rows, rows[:9], 6, library=library)
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_array_equal(found.scores, expected.scores)


def test_answers_do_not_depend_on_the_library_to_the_last_bit() -> None:
    pytest.importorskip("faiss")
    rows = np.random.default_rng(2).normal(size=(400, 24)).astype(np.float32)
    for metric in METRICS:
        with_faiss, with_numpy = (
            nearest(rows, rows[::9], 7, metric=metric, library=each) for each in LIBRARIES
        )
        np.testing.assert_array_equal(with_faiss.rows, with_numpy.rows)
        np.testing.assert_array_equal(with_faiss.scores, with_numpy.scores)


@pytest.mark.parametrize("factor", [1e-30, 1e-18, 1e19, 1e30])
@pytest.mark.parametrize("metric", METRICS)
def test_scale_of_the_rows_changes_no_order(factor: float, metric: str, library: str) -> None:
    rows = np.random.default_rng(3).normal(size=(80, 6))
    expected = nearest(rows, rows[:4], 5, metric=metric, library="numpy")
    scaled = (rows * factor).astype(np.float32)
    found = nearest(scaled, scaled[:4], 5, metric=metric, library=library)
    np.testing.assert_array_equal(found.rows, expected.rows)


def test_axes_of_a_row_are_flattened(library: str) -> None:
    rows = np.random.default_rng(4).normal(size=(30, 2, 2, 3)).astype(np.float32)
    found = nearest(rows, rows[:2], 3, library=library)
    flat = nearest(rows.reshape(30, 12), rows[:2].reshape(2, 12), 3, library=library)
    np.testing.assert_array_equal(found.rows, flat.rows)


@pytest.mark.parametrize("metric", METRICS)
def test_missing_rows_are_minus_one(metric: str, library: str) -> None:
    rows = np.array([[1, 0], [0, 1], [1, 1]], np.float32)
    found = nearest(rows, rows[:1], 4, metric=metric, own_rows=[0], library=library)
    assert found.rows.tolist() == [[2, 1, -1, -1]]
    assert np.isnan(found.scores[0, 2:]).all()
    empty = nearest(rows[:0], rows[:1], 2, metric=metric, library=library)
    assert empty.rows.tolist() == [[-1, -1]]
    assert nearest(rows, rows[:0], 2, metric=metric, library=library).rows.shape == (0, 2)


def test_several_rows_of_a_query_are_left_out(library: str) -> None:
    rows = np.ones((300, 3), np.float32)
    found = nearest(rows, rows[:2], 2, own_rows=[[0, 2], [1, -1]], library=library)
    assert found.rows.tolist() == [[1, 3], [0, 2]]


@pytest.mark.parametrize("metric", METRICS)
def test_rows_with_nan_are_no_answers(metric: str, library: str) -> None:
    rows = np.random.default_rng(5).normal(size=(60, 4)).astype(np.float32)
    rows[::2] = np.nan
    found = nearest(rows, rows[1:2], 40, metric=metric, library=library)
    assert sorted(found.rows[0].tolist()) == sorted([*range(1, 60, 2), *[-1] * 10])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"queries": [[1, 2]]}, r"shape \(1, 2\), expected \(number of queries, 3\)"),
        ({"queries": [1, 2, 3]}, r"shape \(3,\), expected"),
        ({"queries": [[1, 2, np.nan]]}, "query 0 holds NaN or infinity"),
        ({"queries": [["a", "b", "c"]]}, "expected vectors of numbers"),
        ({"k": 0}, "k: got 0, expected an integer of at least 1"),
        ({"k": 2.5}, "k: got 2.5, expected an integer"),
        ({"metric": "dot"}, "metric: got 'dot', expected one of cosine, ip, l2"),
        ({"library": "annoy"}, "library: got 'annoy', expected one of auto, faiss, numpy"),
        ({"own_rows": [9]}, "own_rows: got a row outside of -1 to 3"),
        ({"own_rows": [0, 1]}, r"own_rows: got \(2,\) int64, expected \(1,\) integers"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, object], message: str) -> None:
    values = {"queries": [[1, 2, 3]], "k": 1, **arguments}
    with pytest.raises(UsageError, match=message):
        nearest(np.ones((4, 3), np.float32), **values)


def test_missing_faiss_is_named_only_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "faiss_module", lambda: None)
    rows = np.eye(3, dtype=np.float32)
    assert nearest(rows, rows, 1).rows.ravel().tolist() == [0, 1, 2]
    with pytest.raises(InstallationError, match=r"pip install 'backbone-extractor\[search\]'"):
        nearest(rows, rows, 1, library="faiss")
