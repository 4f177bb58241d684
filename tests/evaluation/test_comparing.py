"""Comparisons of stores: the same images, the same queries, and which differences are real."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from extractor import (
    FeatureStore,
    StoreError,
    UsageError,
    compare_stores,
    evaluate_store,
    extract,
)
from extractor.evaluation import speed

WriteStore = Callable[..., Path]
COUNT = 120
LABELS = [f"class {number % 6}" for number in range(COUNT)]
NAMES = [f"{number:03}.jpg".encode() for number in range(COUNT)]


def rows(noise: float, seed: int = 0, dim: int = 8) -> np.ndarray:
    """Rows around one center per class."""
    random = np.random.default_rng(seed)
    centers = np.random.default_rng(99).standard_normal((6, dim))
    classes = np.arange(COUNT) % 6
    return (centers[classes] + noise * random.standard_normal((COUNT, dim))).astype(np.float32)


@pytest.fixture
def stores(tmp_path: Path, write_store: WriteStore) -> list[Path]:
    """A bad store, a good one, and one that is as good."""
    parts = {"bad": rows(1.6, 1), "good": rows(0.6, 2), "equal": rows(0.6, 3, dim=4)[:, :4]}
    parts["equal"] = np.concatenate([rows(0.6, 3), np.zeros((COUNT, 2), np.float32)], axis=1)
    return [write_store(tmp_path / name, [part], names=[NAMES]) for name, part in parts.items()]


def test_best_store_is_first_and_its_lead_is_real(stores: list[Path]) -> None:
    comparison = compare_stores(stores, LABELS)
    assert comparison.stores[-1].name == "bad"
    assert (comparison.images, comparison.measure) == (COUNT, "accuracy@1")
    for measure in ("accuracy@1", "MAP@R", "R-precision"):
        found = {
            frozenset((each.better, each.worse)): each
            for each in comparison.differences
            if each.measure == measure
        }
        assert len(found) == 3
        assert found[frozenset(("good", "bad"))].is_real
        assert found[frozenset(("equal", "bad"))].is_real
        assert not found[frozenset(("good", "equal"))].is_real
        assert all(each.low <= each.value <= each.high for each in found.values())
        assert found[frozenset(("good", "bad"))].better == "good"
    assert comparison.level == pytest.approx(1 - 0.05 / 3)


def test_each_store_has_its_own_evaluation(stores: list[Path]) -> None:
    comparison = compare_stores(stores, LABELS, k=[1, 3], metric="l2", seed=5)
    for path in stores:
        (compared,) = (each for each in comparison.stores if each.name == path.name)
        assert compared.evaluation == evaluate_store(path, LABELS, k=[1, 3], metric="l2", seed=5)
        assert compared.bytes_per_image == 4 * compared.dim == 4 * FeatureStore.open(path).dim
        assert (compared.parameters, compared.images_per_second) == (None, None)


def test_interval_of_a_difference_is_that_of_pairs(stores: list[Path]) -> None:
    comparison = compare_stores(stores[:2], LABELS, k=[1])
    good, bad = comparison.stores
    pairs = good.evaluation.values["MAP@R"] - bad.evaluation.values["MAP@R"]
    random = np.random.default_rng(0)
    means = pairs[random.integers(0, COUNT, (20_000, COUNT))].mean(axis=1)
    (found,) = (each for each in comparison.differences if each.measure == "MAP@R")
    assert found.value == pytest.approx(pairs.mean(), abs=1e-12)
    tolerance = 0.25 * means.std()
    assert found.low == pytest.approx(np.quantile(means, 0.025), abs=tolerance)
    assert found.high == pytest.approx(np.quantile(means, 0.975), abs=tolerance)


def test_only_common_images_count(tmp_path: Path, write_store: WriteStore) -> None:
    first = write_store(tmp_path / "a", [rows(0.6)], names=[NAMES])
    # In reverse order, which changes the content of the fixture's images: keep the first half.
    second = write_store(tmp_path / "b", [rows(0.6)[:60]], names=[NAMES[:60]])
    comparison = compare_stores([second, first], LABELS[:60])
    left_out = {each.name: each.left_out for each in comparison.stores}
    assert left_out == {"a": 60, "b": 0}
    assert comparison.images == 60
    assert comparison.stores[0].evaluation.values["MAP@R"].tolist() == (
        comparison.stores[1].evaluation.values["MAP@R"].tolist()
    )
    assert comparison.cka == pytest.approx(np.ones((2, 2)))
    assert not any(each.is_real for each in comparison.differences)


def test_comparison_for_json_holds_everything(stores: list[Path]) -> None:
    mapping = compare_stores(stores, LABELS, k=[1]).to_mapping()
    assert json.loads(json.dumps(mapping, allow_nan=False)) == mapping
    assert {each["name"] for each in mapping["stores"]} == {"bad", "good", "equal"}
    assert len(mapping["differences"]) == 3 * 4
    assert np.array(mapping["cka"]).shape == (3, 3)


def test_stores_of_the_same_name_get_their_paths(tmp_path: Path, write_store: WriteStore) -> None:
    paths = [
        write_store(tmp_path / folder / "store", [rows(0.6)], names=[NAMES]) for folder in "ab"
    ]
    names = {each.name for each in compare_stores(paths, LABELS).stores}
    assert names == {str(path) for path in paths}


def test_what_cannot_be_compared_is_refused(
    stores: list[Path], tmp_path: Path, write_store: WriteStore
) -> None:
    with pytest.raises(UsageError, match="compare: got 1 store, expected at least two"):
        compare_stores(stores[:1])
    with pytest.raises(UsageError, match="compare: got 1 store, expected at least two"):
        compare_stores(str(stores[0]))
    with pytest.raises(UsageError, match="twice, expected each folder once"):
        compare_stores([stores[0], stores[0].parent / "." / stores[0].name], LABELS)
    (tmp_path / "link").symlink_to(stores[0])
    with pytest.raises(UsageError, match=r"bad and .*link twice, expected each folder once"):
        compare_stores([stores[0], tmp_path / "link"], LABELS)
    others = [b"x" + name for name in NAMES]
    other = write_store(tmp_path / "other", [rows(0.6)], names=[others])
    with pytest.raises(StoreError, match="no image is in"):
        compare_stores([stores[0], other], LABELS)
    with pytest.raises(UsageError, match="without a label"):
        compare_stores(stores)


def test_speed_counts_parameters_once(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "SECONDS", 0.0)
    monkeypatch.setattr(speed, "BATCH", 2)
    options: dict[str, Any] = {"weights": "random", "device": "cpu"}
    store = extract(photos, "test_resnet", tmp_path / "out", **options).store
    found = speed.speed_of(store, "cpu")
    timm: Any = pytest.importorskip("timm")
    network = timm.create_model("test_resnet", num_classes=0)
    assert found.parameters == sum(p.numel() for p in network.parameters())
    assert found.images_per_second > 0


def test_better_store_of_a_measure_has_the_higher_mean(
    tmp_path: Path, write_store: WriteStore
) -> None:
    paths = [
        write_store(tmp_path / f"{seed}", [rows(1.2, seed)], names=[NAMES]) for seed in range(5)
    ]
    comparison = compare_stores(paths, LABELS)
    order = [each.name for each in comparison.stores]
    means = {each.name: each.evaluation.scores for each in comparison.stores}
    turned = 0
    for each in comparison.differences:
        lead = means[each.better][each.measure].value - means[each.worse][each.measure].value
        assert lead == pytest.approx(each.value, abs=1e-12)
        assert each.low <= each.value <= each.high
        assert each.value >= 0
        turned += order.index(each.better) > order.index(each.worse)
    assert turned  # the order by another measure differs from that by accuracy@1


def test_progress_counts_the_queries_of_all_stores(stores: list[Path]) -> None:
    seen: list[tuple[str, int, int]] = []
    compare_stores(stores, LABELS, progress=lambda *step: seen.append(step))
    counts = [done for phase, done, _ in seen if phase == "comparing"]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 3 * COUNT)
    assert {total for _, _, total in seen} == {3 * COUNT}
    assert seen[-1][0] == "resampling"
