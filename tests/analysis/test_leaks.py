"""Images of one store that are also in another one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.vectors import OpenStore, noisy, turned

from extractor import find_duplicates
from extractor.analysis import leaks, near_pairs
from extractor.analysis.duplicate_groups import Duplicates
from extractor.errors import StoreError, UsageError


def matches(duplicates: Duplicates) -> dict[int, list[int]]:
    found = {}
    for group in duplicates:
        own, *others = group.images
        assert not own.in_other
        assert all(image.in_other for image in others)
        found[own.row] = [image.row for image in others]
    return found


def test_a_group_is_an_image_and_its_matches_in_the_other_store(make_store: OpenStore) -> None:
    test, train = make_store(turned(0, 5, 90, 180)), make_store(turned(92, 3, 300), "train")
    duplicates = find_duplicates(test, against=train)
    assert matches(duplicates) == {0: [1], 1: [1], 2: [0]}
    own, other = duplicates[2].images
    assert (own.path, other.path, other.id) == ("00002.jpg", "00000.jpg", train.ids[0])
    assert other.similarity == pytest.approx(np.cos(np.radians(2)), abs=1e-7)
    assert (duplicates[2].kind, duplicates.redundant) == ("near", 3)
    mapping = duplicates.to_mapping()
    assert mapping["against"] == str(train.path)
    assert mapping["groups"][0]["images"][1]["in_other"]


def test_equal_files_match_first_even_if_their_rows_differ(make_store: OpenStore) -> None:
    rows = turned(0, 3, 120)
    rows[2] = np.nan
    test = make_store(turned(0, 120), contents=["a", "b"])
    train = make_store(rows, "train", contents=["x", "b", "a"])
    duplicates = find_duplicates(test, against=train)
    assert matches(duplicates) == {0: [2, 0, 1], 1: [1]}
    assert [image.same_file for image in duplicates[0].images] == [True, True, False, False]
    assert duplicates[0].images[1].similarity is None
    assert duplicates[1].kind == "identical"


def test_similar_images_within_a_store_do_not_count(make_store: OpenStore) -> None:
    test, train = make_store(turned(0, 1, 2)), make_store(turned(90, 91), "train")
    assert matches(find_duplicates(test, against=train)) == {}


def test_equal_rows_of_both_stores_match_all_of_each_other(make_store: OpenStore) -> None:
    rows = turned(0, 0, 3)
    rows[1] = rows[0]
    test, train = make_store(rows), make_store(rows, "train")
    assert matches(find_duplicates(test, against=train)) == {i: [0, 1, 2] for i in (0, 1)} | {
        2: [2, 0, 1]
    }


def test_further_matches_are_counted(
    make_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leaks, "MAX_MATCHES", 3)
    monkeypatch.setattr(leaks, "MAX_PAIRS", 2)
    test, train = make_store(turned(0)), make_store(turned(5, 4, 3, 2, 1, 90), "train")
    (group,) = find_duplicates(test, against=train)
    assert [image.row for image in group.images] == [0, 4, 3, 2]
    assert group.omitted == 2


@pytest.mark.parametrize("way", ["exact", "clusters"])
def test_every_way_finds_all_matches(
    make_store: OpenStore, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    if way == "clusters":
        monkeypatch.setattr(leaks, "EXACT_COMPARISONS", 0)
    monkeypatch.setattr(near_pairs, "MIN_SKETCHED", 1)
    rows = noisy(600, 300, 80)
    rows[500:520] = rows[:20]
    test, train = make_store(rows[:200]), make_store(rows[200:], "train")
    duplicates = find_duplicates(test, against=train, threshold=0.97)
    unit = rows / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    near = unit[:200] @ unit[200:].T >= 0.97
    expected = {i: set(np.flatnonzero(near[i]).tolist()) for i in np.flatnonzero(near.any(axis=1))}
    assert len(expected) > 50
    assert {row: set(found) for row, found in matches(duplicates).items()} == expected
    assert duplicates.recall == (1.0 if way == "clusters" else None)


def test_stores_of_different_backbones_are_refused(
    tmp_path: Path, make_store: OpenStore, write_store: Callable[..., Path]
) -> None:
    other = write_store(
        tmp_path / "other", [turned(0)], backbone={"model": "timm:other", "tag": "a1"}
    )
    with pytest.raises(StoreError, match="other"):
        find_duplicates(make_store(turned(0)), against=other)


def test_a_store_is_not_compared_with_itself(make_store: OpenStore) -> None:
    store = make_store(turned(0))
    with pytest.raises(UsageError, match="twice"):
        find_duplicates(store, against=store.path)
    with pytest.raises(UsageError, match="against: got int"):
        find_duplicates(store, against=3)  # type: ignore[arg-type]


def test_an_empty_store_has_no_matches(make_store: OpenStore) -> None:
    empty, other = make_store(turned(0)[:0]), make_store(turned(0), "train")
    assert len(find_duplicates(empty, against=other)) == 0
    assert len(find_duplicates(other, against=empty)) == 0
