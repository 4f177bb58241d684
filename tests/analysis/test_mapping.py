"""Maps of a store: rows keep their coordinates, whatever happens to the store."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.networks import mean_pixel

from extractor import StoreMap, extract, map_store
from extractor.analysis.maps import kept
from extractor.analysis.maps.layout import place_beside
from extractor.analysis.maps.projection import principal_components
from extractor.errors import InstallationError, StoreDamagedError, StoreError, UsageError
from extractor.reading.reader import FeatureStore
from extractor.upkeep.compact import compact
from extractor.upkeep.verify import verify

WriteStore = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def two_clusters(count: int, seed: int = 0) -> np.ndarray:
    """Rows near one of two axes, in turn."""
    random = np.random.default_rng(seed)
    rows = random.normal(size=(count, 8)) * 0.1
    rows[np.arange(count), np.arange(count) % 2] += 1
    return rows.astype(np.float32)


@pytest.fixture
def store(tmp_path: Path, write_store: WriteStore) -> FeatureStore:
    rows = two_clusters(30)
    return FeatureStore.open(write_store(tmp_path / "out", [rows[:20], rows[20:]]))


class Growing:
    """A store of images of one color each, named by it, that come and go."""

    def __init__(self, folder: Path) -> None:
        self.images, self.out = folder / "images", folder / "store"
        self.images.mkdir()

    def add(self, *colors: tuple[int, int, int]) -> None:
        for color in colors:
            name = "-".join(map(str, color))
            Image.new("RGB", (32, 24), color).save(self.images / f"{name}.png")

    def remove(self, color: tuple[int, int, int]) -> None:
        (self.images / f"{'-'.join(map(str, color))}.png").unlink()

    def run(self, **options: Any) -> FeatureStore:
        return extract(self.images, mean_pixel(), self.out, device="cpu", **options).store


COLORS = [(250, 10, 10), (10, 250, 10), (10, 10, 250), (200, 100, 0), (90, 60, 250)]


@pytest.fixture
def growing(tmp_path: Path) -> Growing:
    made = Growing(tmp_path)
    made.add(*COLORS)
    return made


def by_path(store_map: StoreMap) -> dict[str, list[float]]:
    return dict(zip(store_map.store.paths, store_map.coordinates.tolist(), strict=True))


def test_a_map_is_made_once_and_read_afterwards(store: FeatureStore) -> None:
    made, again = map_store(store), map_store(os.fspath(store.path))
    assert (made.was_made, made.fitted, made.placed, made.left_out) == (True, 30, 0, 0)
    assert (again.was_made, again.fitted, again.placed) == (False, 30, 0)
    assert again.path == made.path
    assert made.path.parent == store.path / "derived"
    np.testing.assert_array_equal(again.coordinates, made.coordinates)
    expected = principal_components(np.array(store.features)).project(np.array(store.features))
    np.testing.assert_allclose(made.coordinates, expected, atol=1e-6)
    assert made.rows.tolist() == list(range(30))
    assert list(verify(store.path)) == []


def test_rows_keep_their_coordinates_while_images_come_and_go(growing: Growing) -> None:
    before = by_path(map_store(growing.run()))
    growing.add((0, 120, 60))  # sorted before all others
    growing.remove(COLORS[1])
    grown = map_store(growing.run())
    after = by_path(grown)
    assert (grown.was_made, grown.fitted, grown.placed) == (False, 5, 1)
    assert set(before) - set(after) == {"10-250-10.png"}
    both = set(before) & set(after)
    assert {path: after[path] for path in both} == {path: before[path] for path in both}

    compact(growing.out)
    compacted = map_store(growing.out)
    assert (compacted.was_made, compacted.placed) == (False, 0)
    assert by_path(compacted) == after
    assert len(list((growing.out / "derived").glob("map-pca-*.npz"))) == 1


def test_a_changed_image_gets_the_coordinates_of_its_new_content(growing: Growing) -> None:
    before = map_store(growing.run())
    Image.new("RGB", (32, 24), COLORS[1]).save(growing.images / "250-10-10.png")
    after = map_store(growing.run())
    assert after.placed == 1
    expected = by_path(before)["10-250-10.png"]
    np.testing.assert_allclose(by_path(after)["250-10-10.png"], expected, atol=1e-6)


def test_a_new_row_of_a_pca_lies_where_its_components_put_it(growing: Growing) -> None:
    store = growing.run()
    map_store(store)
    components = principal_components(np.array(store.features))
    growing.add((30, 30, 30))
    store = growing.run()
    found = map_store(store).coordinates[store.index_of("30-30-30.png")]
    row = np.array(store.features)[[store.index_of("30-30-30.png")]]
    np.testing.assert_allclose(found, components.project(row)[0], atol=1e-6)


def test_a_map_of_other_rows_is_refused_until_refit(
    store: FeatureStore, write_store: WriteStore
) -> None:
    old = map_store(store)
    write_store(store.path, [two_clusters(30, seed=1)], overwrite=True)
    with pytest.raises(StoreError, match=r"other rows than .* start over with --refit"):
        map_store(store.path)
    new = map_store(store.path, refit=True)
    assert new.was_made
    assert not np.array_equal(new.coordinates, old.coordinates)
    assert not map_store(store.path).was_made


def test_refit_makes_the_map_that_a_new_store_would_get(growing: Growing) -> None:
    map_store(growing.run())
    growing.add((30, 30, 30), (120, 0, 90))
    store = growing.run()
    assert map_store(store).fitted == 5
    refit = map_store(store, refit=True)
    assert (refit.was_made, refit.fitted, refit.placed) == (True, 7, 0)
    components = principal_components(np.array(store.features))
    expected = components.project(np.array(store.features))
    np.testing.assert_allclose(refit.coordinates, expected, atol=1e-6)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "json", "version", "foreign"])
def test_a_damaged_map_is_an_error_and_never_made_anew(store: FeatureStore, damage: str) -> None:
    made = map_store(store)
    content = made.path.read_bytes()
    described = made.path.parent / "map-pca.map.json"
    values = json.loads(described.read_text())
    if damage == "flip":
        made.path.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
    elif damage == "cut":
        made.path.write_bytes(content[:-1])
    elif damage == "remove":
        made.path.unlink()
    elif damage == "json":
        described.write_text("{")
    elif damage == "version":
        described.write_text(json.dumps({**values, "version": 2}))
    else:
        values["file"]["name"] = "../../../other.npz"
        described.write_text(json.dumps(values))
    with pytest.raises(StoreDamagedError, match=r"start over with --refit"):
        map_store(store)
    assert map_store(store, refit=True).was_made
    assert not map_store(store).was_made


def test_a_store_that_cannot_be_written_has_its_map_in_the_cache(
    store: FeatureStore, cache: Path
) -> None:
    (store.path / "derived").write_text("in the way")
    made = map_store(store)
    assert cache in made.path.parents
    assert map_store(store).path == made.path
    (cache / "extractor" / "derived").rename(cache / "gone")
    (cache / "extractor" / "derived").write_text("in the way")
    with pytest.raises(StoreError, match="the map cannot be written"):
        map_store(store)


def test_of_a_map_in_the_store_and_one_in_the_cache_the_newer_counts(
    store: FeatureStore, cache: Path
) -> None:
    inside = map_store(store)
    derived = store.path / "derived"
    derived.rename(store.path / "away")
    derived.write_text("in the way")
    cached = map_store(store)
    derived.unlink()
    (store.path / "away").rename(derived)
    assert map_store(store).path == cached.path
    assert map_store(store, refit=True).path == inside.path
    assert map_store(store).path == inside.path


def test_a_map_that_cannot_be_read_is_an_error_in_the_store_and_none_in_the_cache(
    store: FeatureStore, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    map_store(store)
    refused = store.path

    def read(entry: Path) -> Any:
        if refused in entry.parents:
            raise PermissionError(13, "Permission denied")
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(kept.MapEntry, "read", read)
    with pytest.raises(StoreError, match=r"cannot read .*map-pca.map.json: Permission denied"):
        map_store(store)
    refused = cache
    assert map_store(store).was_made


def test_a_damaged_map_in_the_cache_does_not_block_that_of_the_store(
    store: FeatureStore, cache: Path
) -> None:
    (store.path / "derived").write_text("in the way")
    cached = map_store(store)
    (store.path / "derived").unlink()
    (cached.path.parent / "map-pca.map.json").write_text("{")
    with pytest.raises(StoreDamagedError, match="describes no map"):
        map_store(store)
    made = map_store(store, refit=True)
    assert map_store(store).path == made.path


def test_rows_with_nan_are_left_out(tmp_path: Path, write_store: WriteStore) -> None:
    rows = two_clusters(12)
    clean = map_store(write_store(tmp_path / "clean", [rows]))
    holes = np.insert(rows, [0, 5], np.nan, axis=0)
    found = map_store(write_store(tmp_path / "holes", [holes]))
    assert (found.fitted, found.left_out) == (12, 2)
    finite = [row for row in range(14) if row not in (0, 6)]
    assert found.rows.tolist() == finite
    np.testing.assert_allclose(found.coordinates[finite], clean.coordinates, atol=1e-6)
    assert np.isnan(found.coordinates[[0, 6]]).all()
    assert map_store(tmp_path / "holes").placed == 0
    nothing = write_store(tmp_path / "nothing", [np.full((3, 4), np.inf, np.float32)])
    with pytest.raises(StoreError, match="all rows hold NaN or infinity"):
        map_store(nothing)


@pytest.mark.parametrize("count", [1, 2])
def test_few_rows_have_a_pca_and_no_umap(
    tmp_path: Path, write_store: WriteStore, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.5")
    out = write_store(tmp_path / "out", [np.eye(4, dtype=np.float32)[:count]])
    points = map_store(out).coordinates
    expected = [[0.0, 0.0]] if count == 1 else [[0.5**0.5, 0.0], [-(0.5**0.5), 0.0]]
    np.testing.assert_allclose(np.abs(points), np.abs(expected), atol=1e-6)
    with pytest.raises(UsageError, match=rf"got {count} rows?, a UMAP needs 10"):
        map_store(out, "umap")


def test_wrong_arguments_are_named(
    store: FeatureStore, tmp_path: Path, write_store: WriteStore
) -> None:
    with pytest.raises(UsageError, match="method: got 'tsne', expected one of pca, umap"):
        map_store(store, "tsne")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="store: got Selection, expected a FeatureStore"):
        map_store(store.select([1]))  # type: ignore[arg-type]
    empty = write_store(tmp_path / "empty", [])
    with pytest.raises(StoreError, match="empty holds no rows, so there is nothing to map"):
        map_store(empty)


def test_without_umap_learn_the_error_names_the_extra(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(InstallationError, match=r"pip install 'backbone-extractor\[map\]'"):
        map_store(store, "umap")


def test_a_new_row_is_placed_among_its_neighbors() -> None:
    angles = np.array([0.0, 0.1, 0.2, 1.5])
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    known = np.array([[0, 0], [2, 0], [0, 4], [100, 100]], np.float32)
    copy = rows[1:2]
    np.testing.assert_array_equal(place_beside(rows, 3 * copy, known), [[2, 0]])
    # Cosine distances beyond that of the nearest, over their mean, weigh the points.
    far = 1 - np.cos(np.abs(angles - 0.12))
    beyond = far - far.min()
    weights = np.exp(-beyond / (beyond.sum() / 3))
    expected = weights @ known / weights.sum()
    new = np.array([[np.cos(0.12), np.sin(0.12)]])
    np.testing.assert_allclose(place_beside(rows, new, known), [expected], rtol=1e-4)
    one = place_beside(rows[:1], new, known[:1])
    np.testing.assert_array_equal(one, known[:1])


@pytest.mark.slow
def test_a_umap_keeps_clusters_apart_and_its_points(growing: Growing) -> None:
    pytest.importorskip("umap")
    growing.add(*[(255, shade, 0) for shade in range(0, 60, 4)])
    growing.add(*[(0, shade, 255) for shade in range(0, 60, 4)])
    for color in COLORS:
        growing.remove(color)
    store = growing.run()
    made = map_store(store, "umap")
    assert (made.was_made, made.fitted, made.explained) == (True, 30, None)
    centers = []
    for start in ("255-", "0-"):
        rows = [row for row, path in enumerate(store.paths) if path.startswith(start)]
        centers.append(made.coordinates[rows].mean(axis=0))
        assert made.coordinates[rows].std(axis=0).max() < 3
    assert np.linalg.norm(centers[0] - centers[1]) > 6
    refit = map_store(store, "umap", refit=True)
    np.testing.assert_array_equal(refit.coordinates, made.coordinates)

    growing.add((255, 30, 0), (0, 30, 255))
    grown = map_store(growing.run(), "umap")
    assert (grown.was_made, grown.placed) == (False, 2)
    points = by_path(grown)
    assert {path: points[path] for path in store.paths} == by_path(made)
    for center, path in zip(centers, ("255-30-0.png", "0-30-255.png"), strict=True):
        far = [np.linalg.norm(points[path] - each) for each in centers]
        assert np.argmin(far) == [np.array_equal(center, each) for each in centers].index(True)
