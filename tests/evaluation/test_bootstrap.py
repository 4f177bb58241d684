"""Intervals equal those of a plain bootstrap."""

from __future__ import annotations

import numpy as np
import pytest

from extractor.evaluation.bootstrap import score_of


@pytest.mark.parametrize("kind", ["binary", "continuous"])
def test_interval_is_that_of_resampled_queries(kind: str) -> None:
    random = np.random.default_rng(0)
    values = random.random(300) ** 2 if kind == "continuous" else random.random(300) < 0.9
    values = values.astype(float)
    means = values[random.integers(0, 300, (20_000, 300))].mean(axis=1)
    score = score_of(np.append(values, np.nan), seed=1)
    assert score.value == pytest.approx(values.mean(), abs=1e-12)
    assert score.queries == 300
    # The standard error of a 2.5 % quantile of 2,000 resamples is 0.06 standard deviations.
    tolerance = 4 * 0.06 * means.std() + 1 / 300
    assert score.low == pytest.approx(np.quantile(means, 0.025), abs=tolerance)
    assert score.high == pytest.approx(np.quantile(means, 0.975), abs=tolerance)


def test_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(0).random(50)
    assert score_of(values, 3) == score_of(values, 3) != score_of(values, 4)


def test_interval_of_many_small_values_is_around_their_mean() -> None:
    values = np.random.default_rng(0).random(20_000) ** 4 / 1000
    score = score_of(values, 0)
    assert score.value == values.mean()
    error = values.std() / np.sqrt(20_000)
    assert score.low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert score.high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)


def test_no_query_has_no_mean() -> None:
    score = score_of(np.array([np.nan]), 0)
    assert np.isnan([score.value, score.low, score.high]).all()
    assert score.queries == 0
