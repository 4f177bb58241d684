"""Rows are ranked as a search ranks them."""

from __future__ import annotations

import numpy as np
import pytest

from extractor.evaluation import ranking
from extractor.evaluation.ranking import Ranking
from extractor.search.knn import nearest


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
@pytest.mark.parametrize("block_bytes", [1, 700, 2**20])
def test_ranking_is_that_of_the_search(
    metric: str, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "BLOCK_BYTES", block_bytes)
    random = np.random.default_rng(0)
    rows = random.standard_normal((60, 5)).astype(np.float32)
    rows[30:40] = rows[10:20]  # equal rows, in other blocks
    rows[50] = 0
    rows[51] = -0.0
    queries = np.concatenate([rows[8:14], random.standard_normal((3, 5)).astype(np.float32)])
    own = np.array([8, 9, 10, 11, 12, 13, 0, 1, 2])
    found = Ranking(rows, metric).nearest(queries, 59, own)
    np.testing.assert_array_equal(
        found, nearest(rows, queries, 59, metric=metric, own_rows=own).rows
    )
    without = Ranking(rows, metric).nearest(queries, 60, None)
    np.testing.assert_array_equal(without, nearest(rows, queries, 60, metric=metric).rows)


def test_equal_rows_tie_however_a_product_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = Ranking._scores

    def rounded(self: Ranking, queries: np.ndarray, block: np.ndarray) -> np.ndarray:
        return exact(self, queries, block) + 1e-12 * np.arange(len(block))

    monkeypatch.setattr(Ranking, "_scores", rounded)
    rows = np.array([[1, 0], [0, 1], [1, 0], [0, 1], [1, 0]], np.float32)
    found = Ranking(rows, "ip").nearest(np.array([[1, 0.5]]), 5, None)
    assert found.tolist() == [[0, 2, 4, 1, 3]]
