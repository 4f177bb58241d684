"""Near pairs that are kept: what comes back, and what is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.vectors import OpenStore, turned

from extractor.analysis.kept_pairs import NAME, KeptPairs
from extractor.reading.reader import FeatureStore
from extractor.search.derived import shard_keys


def pairs_of(store: FeatureStore, **changes: Any) -> KeptPairs:
    values = {
        "shards": shard_keys(store.manifest),
        "threshold": 0.9,
        "compared": 3,
        "sampled": 4,
        "is_exact": False,
        "is_complete": True,
        "left": np.array([0, 1]),
        "right": np.array([2, 3]),
        "similarities": np.array([0.95, 0.9]),
    }
    return KeptPairs(**{**values, **changes})


@pytest.fixture
def store(make_store: OpenStore) -> FeatureStore:
    return make_store(turned(0, 5, 90, 95))


def test_what_is_saved_comes_back(store: FeatureStore) -> None:
    saved = pairs_of(store)
    saved.save(store.path)
    loaded = KeptPairs.load(store.path, store.manifest, 0.92)
    assert loaded is not None
    assert loaded.shards == saved.shards
    assert (loaded.threshold, loaded.compared, loaded.sampled) == (0.9, 3, 4)
    assert not loaded.is_exact
    for name in ("left", "right", "similarities"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(saved, name))


def test_pairs_of_a_higher_threshold_or_of_other_shards_are_not_loaded(
    store: FeatureStore, make_store: OpenStore
) -> None:
    pairs_of(store).save(store.path)
    assert KeptPairs.load(store.path, store.manifest, 0.89) is None
    other = make_store(turned(0, 5, 90, 96), "other")
    assert KeptPairs.load(store.path, other.manifest, 0.92) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"left": np.array([0])}, "different lengths"),
        ({"left": np.array([[0, 1]])}, "different lengths"),
        ({"left": np.array([-1, 1])}, "no numbers of rows"),
        ({"right": np.array([0.0, 1.0])}, "no numbers of rows"),
        ({"right": np.array([0, 4])}, "row 4 of 4"),
        ({"threshold": float("nan")}, "threshold nan"),
        ({"similarities": np.array([1, 1])}, "int64"),
    ],
)
def test_impossible_values_are_refused(
    store: FeatureStore, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pairs_of(store, **changes)


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_file_is_as_it_was_or_left_out(store: FeatureStore, seed: int) -> None:
    saved = pairs_of(store)
    saved.save(store.path)
    path: Path = store.path / "derived" / NAME
    content = bytearray(path.read_bytes())
    random = np.random.default_rng(seed)
    for at in random.integers(0, len(content), 1 + seed % 4).tolist():
        content[at] = int(random.integers(256))
    path.write_bytes(content[: random.integers(len(content))] if seed % 5 == 0 else content)
    loaded = KeptPairs.load(store.path, store.manifest, 0.92)
    if loaded is not None:
        np.testing.assert_array_equal(loaded.left, saved.left)
        np.testing.assert_array_equal(loaded.similarities, saved.similarities)
