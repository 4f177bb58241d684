"""Duplicates of one store: which images form a group, and how groups follow a store."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.networks import mean_pixel
from support.vectors import OpenStore, noisy, turned

from extractor import extract, find_duplicates
from extractor.analysis import duplicate_groups, near_pairs
from extractor.analysis import duplicates as duplicates_module
from extractor.analysis.duplicate_groups import Duplicates
from extractor.analysis.kept_pairs import NAME
from extractor.errors import StoreError, UsageError
from extractor.upkeep.compact import compact
from extractor.upkeep.verify import verify


def rows_of(duplicates: Duplicates) -> list[list[int]]:
    return [[image.row for image in group.images] for group in duplicates]


def connected(rows: np.ndarray, threshold: float) -> set[frozenset[int]]:
    """Return the groups by breadth-first search over all pairs, in float64."""
    unit = rows.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    near = unit @ unit.T >= threshold
    left, groups = set(range(len(rows))), set()
    while left:
        group = todo = {left.pop()}
        while todo:
            todo = {int(j) for i in todo for j in np.flatnonzero(near[i])} - group
            group = group | todo
        left -= group
        groups |= {frozenset(group)} if len(group) > 1 else set()
    return groups


def test_near_images_form_a_group_whatever_their_length(make_store: OpenStore) -> None:
    store = make_store(turned(0, 90, 8, 95, 180))
    duplicates = find_duplicates(store)  # 0.98 is 11.5 degrees
    assert rows_of(duplicates) == [[0, 2], [1, 3]]
    group = duplicates[0]
    assert (group.kind, group.omitted) == ("near", 0)
    assert group.images[0].similarity == pytest.approx(1)
    assert group.images[1].similarity == pytest.approx(np.cos(np.radians(8)), abs=1e-7)
    assert group.images[1].path == "00002.jpg"
    assert group.images[1].id == store.ids[2]
    assert not group.images[1].same_file
    assert (duplicates.redundant, duplicates.method, duplicates.recall) == (2, "exact", None)


def test_a_group_is_a_chain(make_store: OpenStore) -> None:
    duplicates = find_duplicates(make_store(turned(0, 9, 18, 27, 90)))
    assert rows_of(duplicates) == [[0, 1, 2, 3]]
    ends = duplicates[0].images[-1].similarity
    assert ends == pytest.approx(np.cos(np.radians(27)), abs=1e-7)


def test_equal_files_form_a_group_even_if_their_rows_differ(make_store: OpenStore) -> None:
    rows = turned(0, 90, 180, 270)
    rows[3] = np.nan
    duplicates = find_duplicates(make_store(rows, contents=["a", "b", "a", "b"]))
    assert rows_of(duplicates) == [[0, 2], [1, 3]]
    assert {group.kind for group in duplicates} == {"identical"}
    assert duplicates[0].images[1].similarity == pytest.approx(-1)
    assert duplicates[1].images[1].similarity is None
    assert duplicates.left_out == 1


def test_a_group_of_equal_and_near_files_is_near(make_store: OpenStore) -> None:
    duplicates = find_duplicates(make_store(turned(0, 0, 5), contents=["a", "a", "b"]))
    assert [group.kind for group in duplicates] == ["near"]
    assert [image.same_file for image in duplicates[0].images] == [True, True, False]


def test_files_without_a_digest_are_not_equal(
    tmp_path: Path, write_store: Callable[..., Path], make_records: Callable[..., Any]
) -> None:
    records = [record._replace(sha256=b"") for record in make_records([b"a", b"b"])]
    out = write_store(tmp_path / "out", [turned(0, 90)], records=[records])
    assert len(find_duplicates(out)) == 0


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, 0),
        ({"widths": [20, 30, 20]}, 1),
        ({"mtimes": [5, 5, 4]}, 2),
        ({"widths": [20, 30, 30], "mtimes": [1, 3, 2]}, 2),
    ],
)
def test_the_largest_then_oldest_then_first_image_is_kept(
    make_store: OpenStore, changes: dict[str, Any], kept: int
) -> None:
    duplicates = find_duplicates(make_store(turned(0, 1, 2), **changes))
    assert duplicates[0].images[0].row == kept


def test_large_groups_come_first_and_similar_images_follow(
    make_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    duplicates = find_duplicates(make_store(turned(0, 5, 90, 96, 92)))
    assert rows_of(duplicates) == [[2, 4, 3], [0, 1]]
    assert [len(group.images) for group in duplicates[1:]] == [2]
    monkeypatch.setattr(duplicate_groups, "GROUPS_AT_ONCE", 1)
    assert list(duplicates) == duplicates[:]
    with pytest.raises(IndexError, match="out of range"):
        duplicates[2]


def test_rows_without_a_direction_are_like_no_other(make_store: OpenStore) -> None:
    rows = turned(0, 0, 0, 0, 0, 0, 40)
    rows[0], rows[1] = 0, 0
    rows[2], rows[3] = np.nan, np.nan
    rows[4], rows[5] = np.inf, np.inf
    duplicates = find_duplicates(make_store(rows))
    assert (len(duplicates), duplicates.left_out) == (0, 6)


def test_rows_of_the_same_bytes_are_equal_at_any_threshold(make_store: OpenStore) -> None:
    rows = np.random.default_rng(0).standard_normal((9, 5)).astype(np.float32)
    rows[7] = rows[3]
    assert rows_of(find_duplicates(make_store(rows), threshold=1)) == [[3, 7]]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("way", ["whole rows", "sketches", "dense", "clusters", "few pairs"])
def test_every_way_finds_the_groups_of_all_pairs(
    make_store: OpenStore, monkeypatch: pytest.MonkeyPatch, way: str, dtype: str
) -> None:
    rows = noisy(700, 250, 80).astype(dtype)
    if way != "whole rows":
        monkeypatch.setattr(near_pairs, "MIN_SKETCHED", 1)
        monkeypatch.setattr(near_pairs, "LEFT_ROWS", 100)
        monkeypatch.setattr(near_pairs, "RIGHT_ROWS", 130)
    if way == "dense":
        monkeypatch.setattr(near_pairs, "DENSE", 0)
    if way == "clusters":
        for module in (near_pairs, duplicates_module):
            monkeypatch.setattr(module, "EXACT_COMPARISONS", 0)
    if way == "few pairs":
        monkeypatch.setattr(near_pairs, "MAX_PAIRS", 10)
    duplicates = find_duplicates(make_store(rows), threshold=0.97)
    expected = connected(rows, 0.97)
    assert len(expected) > 100
    assert set(map(frozenset, rows_of(duplicates))) == expected
    assert duplicates.method == ("clusters" if way == "clusters" else "exact")
    assert duplicates.recall == (1.0 if way == "clusters" else None)


@pytest.mark.parametrize("way", ["exact", "clusters"])
def test_progress_names_the_phase_and_grows(
    make_store: OpenStore, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(near_pairs, "LEFT_ROWS", 100)
    if way == "clusters":
        monkeypatch.setattr(duplicates_module, "EXACT_COMPARISONS", 0)
    seen: list[tuple[str, int, int]] = []
    find_duplicates(make_store(noisy(350, 50, 8)), progress=lambda *each: seen.append(each))
    compared = [(done, total) for phase, done, total in seen if phase == "comparing"]
    assert compared == sorted(compared)
    assert {total for _, total in compared} == {350}
    if way == "exact":
        assert [done for done, _ in compared] == [0, 100, 200, 300, 350]
    else:
        assert list(dict.fromkeys(phase for phase, *_ in seen)) == [
            "clustering",
            "measuring",
            "comparing",
        ]


def test_a_mapping_holds_what_the_groups_hold(make_store: OpenStore) -> None:
    store = make_store(turned(0, 90, 8))
    found = json.loads(json.dumps(find_duplicates(store).to_mapping(), allow_nan=False))
    assert found["store"] == str(store.path)
    assert (found["threshold"], found["rows"], found["redundant"]) == (0.98, 3, 1)
    assert found["against"] is None
    (group,) = found["groups"]
    assert [image["path"] for image in group["images"]] == ["00000.jpg", "00002.jpg"]
    assert group["images"][1]["size"] == 102


@pytest.mark.parametrize("count", [0, 1])
def test_a_store_of_few_rows_has_no_duplicates(make_store: OpenStore, count: int) -> None:
    duplicates = find_duplicates(make_store(turned(0, 0)[:count]))
    assert (len(duplicates), list(duplicates), duplicates.redundant) == (0, [], 0)
    assert duplicates.to_mapping()["groups"] == []


@pytest.mark.parametrize("threshold", [0, -0.5, 1.01, float("nan"), True, "0.9", None])
def test_a_threshold_out_of_range_is_refused(make_store: OpenStore, threshold: Any) -> None:
    with pytest.raises(UsageError, match=r"got .*, expected a number above 0"):
        find_duplicates(make_store(turned(0, 1)), threshold=threshold)


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="store: got list, expected a FeatureStore"):
        find_duplicates([tmp_path])  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="is not a store"):
        find_duplicates(tmp_path)


# ---------------------------------------------------------------------------------------------
# Kept pairs


def gray(folder: Path, *levels: int) -> None:
    """Images of one color each; neighbors of the levels are similar, and none is identical."""
    folder.mkdir(exist_ok=True)
    for level in levels:
        color = (level, 255 - level, 100)
        Image.new("RGB", (40, 30), color).save(folder / f"{level:03d}.png")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Numbers of rows on both sides of each comparison."""
    calls = []

    def compare(rows: Any, left: Any, right: Any, *rest: Any) -> Any:
        calls.append((len(left), len(left) if right is None else len(right)))
        return near_pairs.exact_pairs(rows, left, right, *rest)

    monkeypatch.setattr(duplicates_module, "exact_pairs", compare)
    monkeypatch.setattr(duplicates_module, "MIN_KEPT_ROWS", 1)
    return calls


def groups(duplicates: Duplicates) -> list[list[str]]:
    return sorted(sorted(image.path for image in group.images) for group in duplicates)


def test_new_rows_are_compared_with_old_ones_and_retired_rows_no_longer_count(
    tmp_path: Path, counted: list[tuple[int, int]]
) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    gray(images, 0, 10, 100, 110, 120, 250)
    extract(images, mean_pixel(), out, device="cpu")
    first = find_duplicates(out, threshold=0.995)
    assert groups(first) == [["000.png", "010.png"], ["100.png", "110.png", "120.png"]]
    assert counted == [(6, 6)]
    assert list(verify(out)) == []
    assert groups(find_duplicates(out, threshold=0.995)) == groups(first)
    assert counted == [(6, 6)]  # nothing is compared again

    (images / "110.png").unlink()  # 100 and 120 are too far apart
    gray(images, 5, 245)
    extract(images, mean_pixel(), out, device="cpu")
    grown = find_duplicates(out, threshold=0.995)
    assert counted[1:] == [(2, 6), (2, 2)]
    alone = find_duplicates(out, threshold=0.995, keep=False)
    assert groups(grown) == groups(alone)
    assert groups(grown)[:2] == [["000.png", "005.png", "010.png"], ["245.png", "250.png"]]
    higher = find_duplicates(out, threshold=0.9999)
    assert len(counted) == 4  # kept pairs hold for a higher threshold
    assert groups(higher) == groups(find_duplicates(out, threshold=0.9999, keep=False))
    find_duplicates(out, threshold=0.5)
    assert counted[-1] == (8, 8)  # and not for a lower one


def test_pairs_that_clusters_found_are_extended_exactly(
    tmp_path: Path, counted: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    gray(images, 0, 5, 100, 110, 120, 200, 245, 250)
    extract(images, mean_pixel(), out, device="cpu")
    monkeypatch.setattr(duplicates_module, "EXACT_COMPARISONS", 10)  # of 8 rows: 32
    first = find_duplicates(out, threshold=0.999)
    assert (first.method, first.recall, counted) == ("clusters", 1.0, [])
    gray(images, 2)
    extract(images, mean_pixel(), out, device="cpu")
    grown = find_duplicates(out, threshold=0.999)
    assert counted == [(1, 8), (1, 1)]
    assert (grown.method, grown.recall_pairs) == ("clusters", first.recall_pairs)
    assert groups(grown)[0] == ["000.png", "002.png", "005.png"]
    gray(images, 3, 4)  # too many to compare them exactly
    extract(images, mean_pixel(), out, device="cpu")
    again = find_duplicates(out, threshold=0.999)
    assert len(counted) == 2
    assert groups(again)[0] == [f"00{level}.png" for level in (0, 2, 3, 4, 5)]


def test_a_pair_with_equal_rows_outlives_the_row_that_was_compared(
    tmp_path: Path, counted: list[tuple[int, int]]
) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    gray(images, 100, 110, 250)
    Image.open(images / "100.png").resize((20, 10)).save(images / "200.png")  # the same row
    extract(images, mean_pixel(), out, device="cpu")
    assert groups(find_duplicates(out)) == [["100.png", "110.png", "200.png"]]
    (images / "100.png").unlink()
    extract(images, mean_pixel(), out, device="cpu")
    assert groups(find_duplicates(out)) == [["110.png", "200.png"]]
    assert len(counted) == 1


def test_pairs_of_other_shards_are_not_used(tmp_path: Path, counted: list[tuple[int, int]]) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    gray(images, 100, 110, 250)
    extract(images, mean_pixel(), out, device="cpu")
    find_duplicates(out)
    (images / "100.png").unlink()
    extract(images, mean_pixel(), out, device="cpu")
    compact(out)
    assert groups(find_duplicates(out)) == []
    assert counted == [(3, 3), (2, 2)]


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_a_damaged_file_of_pairs_is_left_out_with_a_warning(
    make_store: OpenStore,
    counted: list[tuple[int, int]],
    caplog: pytest.LogCaptureFixture,
    content: bytes | None,
) -> None:
    store = make_store(turned(0, 5, 90))
    find_duplicates(store)
    path = store.path / "derived" / NAME
    path.write_bytes(path.read_bytes()[:-40] if content is None else content)
    with caplog.at_level(logging.WARNING):
        assert rows_of(find_duplicates(store)) == [[0, 1]]
    assert len(counted) == 2
    assert "duplicates.npz is left out" in caplog.text


def test_a_small_store_keeps_no_pairs(make_store: OpenStore) -> None:
    store = make_store(turned(0, 5, 90))
    find_duplicates(store)
    assert not (store.path / "derived").exists()


def test_retired_rows_join_no_groups_if_there_are_too_many_pairs(
    tmp_path: Path, counted: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    gray(images, 0, 5, 10, 100, 110, 120)
    extract(images, mean_pixel(), out, device="cpu")
    for level in (0, 110):  # the first of its group, and the one between two others
        (images / f"{level:03d}.png").unlink()
    extract(images, mean_pixel(), out, device="cpu")
    monkeypatch.setattr(near_pairs, "MAX_PAIRS", 1)
    assert groups(find_duplicates(out, threshold=0.995)) == [["005.png", "010.png"]]
    assert counted == [(6, 6), (4, 4)]


def test_kept_pairs_of_a_lower_threshold_do_not_join_groups_of_a_higher_one(
    tmp_path: Path, counted: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    gray(images, 100, 110)
    extract(images, mean_pixel(), out, device="cpu")
    find_duplicates(out, threshold=0.5)
    gray(images, 101, 0, 5, 120)
    extract(images, mean_pixel(), out, device="cpu")
    monkeypatch.setattr(near_pairs, "MAX_PAIRS", 1)
    found = groups(find_duplicates(out, threshold=0.9999))
    assert found == [["000.png", "005.png"], ["100.png", "101.png"]]


def test_too_many_pairs_are_not_kept(
    make_store: OpenStore, counted: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near_pairs, "MAX_PAIRS", 2)
    store = make_store(turned(0, 1, 2, 90))
    assert rows_of(find_duplicates(store)) == [[0, 1, 2]]
    assert not (store.path / "derived").exists()
