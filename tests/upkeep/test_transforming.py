"""``transform_store``: what it makes of rows, what it keeps, what it refuses."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.dying import DIED, die, in_child
from support.networks import mean_pixel
from support.pictures import noise
from support.stores import content

from extractor import FeatureStore, Searcher, evaluate_store, export_store, extract, transform_store
from extractor.errors import (
    StoreDamagedError,
    StoreError,
    StoreNotFoundError,
    UsageError,
)
from extractor.reading.transform import Transform, read_transform
from extractor.store.format import STAGING, FileEntry, Manifest
from extractor.store.shard import ShardWriter
from extractor.upkeep import transforming
from extractor.upkeep.compact import compact
from extractor.upkeep.verify import verify

WriteStore = Callable[..., Path]

ROWS = (np.random.default_rng(2).normal(size=(60, 8)) @ np.diag(np.arange(1.0, 9))).astype("f4") + 2
ALL: dict[str, Any] = {"normalize": True, "pca": 3, "whiten": True}


@pytest.fixture
def source(tmp_path: Path, write_store: WriteStore) -> Path:
    parts = [ROWS[:25], ROWS[25:50], ROWS[50:]]
    return write_store(tmp_path / "source", parts, failures=[(b"x.jpg", "empty", "no bytes")])


def unit(rows: np.ndarray) -> np.ndarray:
    lengths: np.ndarray = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)


def reference(
    rows: np.ndarray, normalize: bool, pca: int | None, whiten: bool, fit: np.ndarray
) -> np.ndarray:
    """What the documentation says, in a few lines of numpy; signs of columns are free."""
    rows, fit = rows.astype(float), fit.astype(float)
    if normalize:
        rows, fit = unit(rows), unit(fit)
    if pca is not None:
        _, singular, directions = np.linalg.svd(fit - fit.mean(0), full_matrices=False)
        rows = (rows - fit.mean(0)) @ directions[:pca].T
        if whiten:
            rows = rows / (singular[:pca] / np.sqrt(len(fit) - 1))
        rows = unit(rows) if normalize else rows
    return rows


def assert_same_but_signs(found: np.ndarray, expected: np.ndarray, atol: float) -> None:
    signs = np.sign((found * expected).sum(0))
    np.testing.assert_allclose(found * signs, expected, atol=atol, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("pca", [None, 3, 8])
@pytest.mark.parametrize("normalize", [False, True])
def test_rows_equal_those_of_an_independent_reference(
    tmp_path: Path, source: Path, normalize: bool, pca: int | None, whiten: bool, dtype: str
) -> None:
    out = tmp_path / "out"
    report = transform_store(source, out, normalize=normalize, pca=pca, whiten=whiten, dtype=dtype)
    dims = 8 if pca is None and whiten else pca
    expected = reference(ROWS, normalize, dims, whiten, ROWS)
    store = FeatureStore.open(out)
    rows = np.asarray(store.features, np.float64)
    assert_same_but_signs(rows, expected, 1e-6 if dtype == "float32" else 2e-2)
    assert (report.added, report.rows, report.removed) == (60, 60, 0)
    assert report.is_fitted == (dims is not None)
    assert (store.info.dtype, store.info.normalized) == (dtype, normalize)
    assert store.features.dtype == dtype
    assert list(verify(out)) == []


def test_progress_counts_the_rows_of_both_phases(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transforming, "BLOCK_BYTES", 25 * 8 * 8)
    seen: list[tuple[str, int, int]] = []

    def noted(phase: str, done: int, total: int) -> None:
        seen.append((phase, done, total))

    transform_store(source, tmp_path / "out", pca=2, progress=noted)
    fitting = [("fitting", done, 60) for done in (0, 25, 50, 60)]
    assert seen == [*fitting, *(("writing", done, 60) for done in (0, 25, 50, 60))]
    seen.clear()
    transform_store(source, tmp_path / "out", progress=noted)
    assert seen == []


def test_whitened_rows_have_covariance_one(tmp_path: Path, source: Path) -> None:
    transform_store(source, tmp_path / "out", whiten=True)
    rows = FeatureStore.open(tmp_path / "out").features[:]
    np.testing.assert_allclose(np.cov(rows.T.astype(float)), np.eye(8), atol=1e-5)


def test_index_failures_and_order_of_rows_carry_over(tmp_path: Path, source: Path) -> None:
    transform_store(source, tmp_path / "out", **ALL)
    before, after = FeatureStore.open(source), FeatureStore.open(tmp_path / "out")
    for name in ("path", "size", "mtime_ns", "width", "height", "sha256"):
        assert after.column(name) == before.column(name)
    assert after.failures == before.failures
    assert after.root == before.root
    manifest = after.manifest
    assert (manifest.images, manifest.rows) == (61, 60)
    assert manifest.listing == before.manifest.listing


def test_manifest_says_what_was_done_to_which_source(tmp_path: Path, source: Path) -> None:
    transform_store(source, tmp_path / "out", **ALL, dtype="float16")
    store = FeatureStore.open(tmp_path / "out")
    made = store.info.transform
    assert made is not None
    token = FeatureStore.open(source).token
    assert {name: made[name] for name in ("normalize", "pca", "whiten")} == ALL
    assert made["source"] == {"store": str(source), "token": token}
    assert made["fit"] == {"store": str(source), "token": token, "rows": 60}
    assert made["of"] == {"dim": 8, "shape": [8], "dtype": "float32", "normalized": False}
    names = ["transform_mean.npy", "transform_components.npy", "transform_scales.npy"]
    assert [entry["name"] for entry in made["files"]] == names
    shapes = [np.load(tmp_path / "out" / name).shape for name in names]
    assert shapes == [(8,), (3, 8), (3,)]
    before = store.manifest.description.before_transform
    assert before.differences(FeatureStore.open(source).manifest.description) == []


def test_same_source_gives_the_same_bytes(tmp_path: Path, source: Path, fixed_time: None) -> None:
    for name in ("one", "two"):
        transform_store(source, tmp_path / name, **ALL)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_row_does_not_depend_on_the_rows_beside_it() -> None:
    """So that a query, and a row of a later run, come out as in the first run."""
    rng = np.random.default_rng(3)
    transform = Transform(True, rng.normal(size=200), rng.normal(size=(40, 200)), None)
    rows = rng.normal(size=(700, 200)).astype("f4")
    whole = transform.apply(rows)
    for some in ([0], [699], [13, 255, 256, 511], list(range(255, 300))):
        assert transform.apply(rows[some]).tobytes() == whole[some].tobytes()


@pytest.mark.parametrize("normalize", [False, True])
def test_gain_bounds_how_an_error_of_a_row_grows(normalize: bool) -> None:
    rng = np.random.default_rng(4)
    scales = np.array([0.1, 5.0, 100.0])
    directions = np.linalg.qr(rng.normal(size=(20, 20)))[0][:3]
    transform = Transform(normalize, rng.normal(size=20), directions, scales)
    row = rng.normal(size=20)
    before = transform.apply(row[None])[0]
    largest = 0.0
    for error in rng.normal(size=(200, 20)):
        error *= 1e-7 * np.linalg.norm(row) / np.linalg.norm(error)
        change = np.linalg.norm(transform.apply((row + error)[None])[0] - before)
        largest = max(largest, float(change / np.linalg.norm(before)) / 1e-7)
    assert 0.02 * transform.gain(row) < largest <= 1.001 * transform.gain(row)
    assert Transform(True).gain(row) == 1


def test_rows_of_zeros_stay_finite(tmp_path: Path, write_store: WriteStore) -> None:
    """A row of zeros has no direction: normalization leaves it, the PCA subtracts the mean."""
    rows = ROWS.copy()
    rows[7] = 0
    source = write_store(tmp_path / "source", [rows])
    transform_store(source, tmp_path / "unit", normalize=True)
    found = FeatureStore.open(tmp_path / "unit").features[:]
    assert (found[7] == 0).all()
    np.testing.assert_allclose(np.delete(found, 7, 0), np.delete(unit(rows), 7, 0), atol=1e-7)
    transform_store(source, tmp_path / "out", **ALL)
    found = FeatureStore.open(tmp_path / "out").features[:]
    assert_same_but_signs(found, reference(rows, True, 3, True, rows), 1e-6)
    np.testing.assert_allclose(np.linalg.norm(found[7]), 1, atol=1e-6)


@pytest.mark.parametrize("steps", [{"normalize": True}, {"pca": 3}])
def test_rows_that_are_not_finite_are_refused(
    tmp_path: Path, source: Path, steps: dict[str, Any]
) -> None:
    file = source / "features" / "00001.npy"
    rows = np.load(file)
    rows[3, 2] = np.nan
    np.save(file, rows)
    with pytest.raises(StoreDamagedError, match="row 28 holds NaN or infinity"):
        transform_store(source, tmp_path / "out", **steps)
    assert not (tmp_path / "out" / "store.json").exists()


def test_paths_that_are_not_utf8_carry_over(tmp_path: Path, write_store: WriteStore) -> None:
    names = [[b"b.jpg", b"c/\xff.jpg"], [b"a.jpg", b"d.jpg"]]  # in no order
    source = write_store(tmp_path / "source", [ROWS[:2], ROWS[2:4]], names=names, root="/\udcff")
    transform_store(source, tmp_path / "out", normalize=True)
    store = FeatureStore.open(tmp_path / "out")
    assert [os.fsencode(path) for path in store.paths] == [*names[0], *names[1]]
    np.testing.assert_allclose(store.features[:], unit(ROWS[:4]), atol=1e-7)
    assert not transform_store(source, tmp_path / "out").is_changed


def test_fit_on_another_store(tmp_path: Path, source: Path, write_store: WriteStore) -> None:
    other = write_store(tmp_path / "other", [ROWS[::-2] ** 2], root="/elsewhere")
    transform_store(source, tmp_path / "out", **ALL, fit=other)
    store = FeatureStore.open(tmp_path / "out")
    expected = reference(ROWS, True, 3, True, ROWS[::-2] ** 2)
    assert_same_but_signs(store.features[:], expected, 1e-6)
    assert store.info.transform is not None
    assert store.info.transform["fit"]["store"] == str(other)
    assert store.info.transform["fit"]["rows"] == 30
    # Both were made by one transform, so their rows can be compared.
    transform_store(other, tmp_path / "both", **ALL, fit=other)
    group = FeatureStore.open([tmp_path / "out", tmp_path / "both"])
    assert group.features.shape == (90, 3)


def test_rows_of_two_transforms_are_not_one_group(tmp_path: Path, source: Path) -> None:
    transform_store(source, tmp_path / "one", pca=3)
    transform_store(source, tmp_path / "two", pca=3, whiten=True)
    with pytest.raises(StoreError, match=r"embedding\.transform\.files"):
        FeatureStore.open([tmp_path / "one", tmp_path / "two"])
    with pytest.raises(StoreError, match=r"embedding\.dim"):
        FeatureStore.open([source, tmp_path / "one"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "got no step, expected one of normalize"),
        ({"pca": 0}, "pca: got 0, expected an integer of at least 1"),
        ({"pca": True}, "pca: got True, expected an integer"),
        ({"pca": 9}, "pca: got 9, expected at most 8, the dim of"),
        ({"normalize": 1}, "normalize: got 1, expected True or False"),
        ({"dtype": "float64"}, "dtype: got 'float64', expected one of float32, float16"),
        ({"normalize": True, "fit": "source"}, "only a PCA is fitted"),
    ],
)
def test_arguments_without_sense_are_refused(
    tmp_path: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        transform_store(source, "out", **arguments)
    assert not Path("out").exists()


def test_result_may_not_be_what_is_read(
    tmp_path: Path, source: Path, write_store: WriteStore
) -> None:
    other = write_store(tmp_path / "other", [ROWS])
    for out in (source, other):
        with pytest.raises(UsageError, match="which is the store to read"):
            transform_store(source, out, pca=2, fit=other, overwrite=True)


def test_more_dimensions_than_the_rows_vary_in_are_refused(
    tmp_path: Path, write_store: WriteStore
) -> None:
    source = write_store(tmp_path / "source", [ROWS[:5]])
    with pytest.raises(UsageError, match=r"the 5 rows of .* vary in 4; try --pca 4"):
        transform_store(source, tmp_path / "out", pca=6)
    assert transform_store(source, tmp_path / "out", pca=4).shape == (4,)


def test_values_beyond_float16_are_refused(tmp_path: Path, write_store: WriteStore) -> None:
    source = write_store(tmp_path / "source", [ROWS * 1e6])
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="too large for it; use float32, or normalize"):
        transform_store(source, out, pca=3, dtype="float16")
    assert not out.exists()
    transform_store(source, out, pca=3, whiten=True, dtype="float16")
    assert FeatureStore.open(out).features.dtype == np.float16


def test_maps_are_normalized_and_not_projected(tmp_path: Path, write_store: WriteStore) -> None:
    embedding = {"definition": "layer", "dim": 8, "shape": [2, 2, 2], "dtype": "float32"}
    source = write_store(
        tmp_path / "source",
        [ROWS[:6].reshape(6, 2, 2, 2)],
        embedding={**embedding, "normalized": False},
    )
    transform_store(source, tmp_path / "out", normalize=True)
    found = FeatureStore.open(tmp_path / "out").features[:]
    assert found.shape == (6, 2, 2, 2)
    np.testing.assert_allclose(found.reshape(6, 8), unit(ROWS[:6]), atol=1e-6)
    with pytest.raises(UsageError, match=r"of shape \(2, 2, 2\), expected vectors"):
        transform_store(source, tmp_path / "pca", pca=2)


def test_stores_that_do_not_fit_are_refused(
    tmp_path: Path, source: Path, write_store: WriteStore
) -> None:
    out = tmp_path / "out"
    with pytest.raises(StoreNotFoundError, match="no such folder"):
        transform_store(tmp_path / "none", out, pca=2)
    empty = write_store(tmp_path / "empty", [], failures=[(b"x", "empty", "no bytes")])
    with pytest.raises(StoreError, match="holds no rows, so there is nothing to transform"):
        transform_store(empty, out, pca=2)
    other = write_store(tmp_path / "other", [ROWS], backbone={"model": "timm:b", "sha256": "1"})
    with pytest.raises(StoreError, match=r"made differently .*backbone\.model.*fit on a store"):
        transform_store(source, out, pca=2, fit=other)
    transform_store(source, out, pca=2)
    with pytest.raises(UsageError, match="got a list, expected one store"):
        transform_store([source, other], out, pca=2)  # type: ignore[arg-type]
    for arguments in ({"store": out, "out": "x"}, {"store": source, "out": "x", "fit": out}):
        with pytest.raises(StoreError, match="was made by extract transform; transform its source"):
            transform_store(**arguments, pca=1)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="and no transform made its rows; choose another --out"):
        transform_store(source, other, pca=2)
    with pytest.raises(StoreError, match=f"was made from {source}, got {other}"):
        transform_store(other, out, pca=2)
    assert not Path("x").exists()


# ---------------------------------------------------------------------------------------------
# A source that grows


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(9):
        noise(i, 30 + i, 20).save(folder / f"{i}.png")
    return folder


def embed(images: Path, out: Path) -> FeatureStore:
    return extract(images, mean_pixel(), out, device="cpu", batch_size=4).store


def grow(images: Path) -> None:
    """Add two images, change one, remove one, and rename one."""
    noise(20, 31, 20).save(images / "10.png")  # its path sorts between old ones
    noise(21, 32, 20).save(images / "new.png")
    noise(22, 33, 20).save(images / "3.png")
    (images / "4.png").unlink()
    (images / "5.png").rename(images / "moved.png")


def test_grown_source_brings_the_result_up_to_date(tmp_path: Path, images: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    embed(images, source)
    transform_store(source, out, normalize=True, pca=2, whiten=True)
    before = FeatureStore.open(out)
    files = {path.name: path.read_bytes() for path in out.glob("**/*.npy")}
    assert not transform_store(source, out).is_changed
    assert FeatureStore.open(out).token == before.token
    grow(images)
    (images / "bad.png").write_bytes(b"no image")
    now = embed(images, source)
    report = transform_store(source, out)
    assert (report.added, report.removed, report.rows) == (3, 2, 10)
    assert (report.is_fitted, report.is_changed) == (False, True)
    store = FeatureStore.open(out)
    assert store.paths == now.paths
    assert store.failures == now.failures
    assert len(store.failures) == 1
    transform = read_transform(out, store.manifest.description)
    assert transform is not None
    expected = transform.apply(np.asarray(now.features)).astype("f4")
    assert np.array_equal(store.features[:], expected)
    for name, old in files.items():  # rows of before, and the transform
        assert (out.glob(f"**/{name}").__next__()).read_bytes() == old
    changes = store.changes_since(before.token)
    assert (len(changes.added), len(changes.removed), len(changes.moved)) == (3, 2, 1)
    assert list(verify(out)) == []
    assert store.info.transform is not None
    assert store.info.transform["source"]["token"] == now.token
    assert not transform_store(source, out, **{**ALL, "pca": 2}).is_changed


def test_content_that_changed_alone_is_transformed_again(tmp_path: Path, images: Path) -> None:
    """A file with the size and the time of before is found by its SHA-256."""
    source, out = tmp_path / "source", tmp_path / "out"
    file = images / "0.png"
    file.write_bytes(file.read_bytes().ljust(9000, b"\0"))
    embed(images, source)
    transform_store(source, out, normalize=True)
    status = file.stat()
    noise(30, 30, 20).save(file)
    file.write_bytes(file.read_bytes().ljust(9000, b"\0"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    extract(images, mean_pixel(), source, device="cpu", batch_size=4, check="content")
    report = transform_store(source, out)
    assert (report.added, report.removed) == (1, 1)
    now = FeatureStore.open(source)
    np.testing.assert_allclose(
        FeatureStore.open(out)["0.png"], unit(now["0.png"][None].astype(float))[0], atol=1e-6
    )


def test_source_without_growth_order_becomes_a_result_in_its_order(
    tmp_path: Path, images: Path
) -> None:
    source = tmp_path / "source"
    embed(images, source)
    grow(images)
    now = embed(images, source)
    assert now.paths != sorted(now.paths)
    transform_store(source, tmp_path / "out", normalize=True)
    store = FeatureStore.open(tmp_path / "out")
    assert store.paths == now.paths
    assert_same_but_signs(store.features[:], unit(now.features[:].astype(float)), 1e-6)
    assert "moved.png" in store
    compact(source)
    assert not transform_store(source, tmp_path / "out").is_changed
    compact(tmp_path / "out")
    assert FeatureStore.open(tmp_path / "out").paths == FeatureStore.open(source).paths


def test_rows_of_a_list_carry_over(tmp_path: Path, images: Path) -> None:
    listed = [images / name for name in ("3.png", "1.png", "3.png", "2.png")]
    source = tmp_path / "source"
    extract(listed, mean_pixel(), source, device="cpu", keep_order=True)
    transform_store(source, tmp_path / "out", normalize=True)
    assert FeatureStore.open(tmp_path / "out").list_rows.tolist() == [2, 0, 2, 1]
    assert not transform_store(source, tmp_path / "out").is_changed


def test_other_options_are_refused_and_none_repeat_the_earlier_ones(
    tmp_path: Path, source: Path, write_store: WriteStore
) -> None:
    out = tmp_path / "out"
    other = write_store(tmp_path / "other", [ROWS[:40]])
    transform_store(source, out, whiten=True, fit=other)
    for same in ({}, {"whiten": True}, {"pca": 8, "whiten": True}, {"fit": other}):
        assert not transform_store(source, out, **same).is_changed  # type: ignore[arg-type]
    different: list[dict[str, Any]] = [
        {"normalize": True},
        {"pca": 8},
        {"pca": 7, "whiten": True},
        {"whiten": True, "dtype": "float16"},
        {"whiten": True, "fit": source.parent / "third"},
    ]
    write_store(tmp_path / "third", [ROWS[:41]])
    for arguments in different:
        with pytest.raises(StoreError, match="was made with --pca 8 --whiten --dtype float32"):
            transform_store(source, out, **arguments)
    report = transform_store(source, out, pca=7, overwrite=True)
    assert (report.is_fitted, report.shape) == (True, (7,))
    assert not (out / "transform_scales.npy").exists()
    assert list(verify(out)) == []


def test_overwrite_replaces_a_result_by_embeddings_and_back(tmp_path: Path, images: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    embed(images, source)
    transform_store(source, out, pca=2)
    with pytest.raises(StoreError, match=f"a transform made from {source}; extend that store"):
        embed(images, out)
    extract(images, mean_pixel(), out, device="cpu", overwrite=True)
    assert FeatureStore.open(out).info.transform is None
    assert not list(out.glob("transform*"))
    transform_store(source, out, pca=2, overwrite=True)
    assert FeatureStore.open(out).features.shape == (9, 2)
    assert list(verify(out)) == []


def test_moved_source_is_accepted_and_another_one_is_not(
    tmp_path: Path, source: Path, write_store: WriteStore
) -> None:
    out = tmp_path / "out"
    transform_store(source, out, pca=2)
    moved = source.rename(tmp_path / "moved")
    assert not transform_store(moved, out).is_changed
    before = content(out)
    other = write_store(tmp_path / "other", [ROWS[:4]])
    with pytest.raises(StoreError, match=f"was made from {source}, got {other}"):
        transform_store(other, out)
    assert content(out) == before


def test_source_that_moved_and_grew_is_accepted(tmp_path: Path, images: Path) -> None:
    embed(images, tmp_path / "source")
    transform_store(tmp_path / "source", tmp_path / "out", pca=2)
    grow(images)
    embed(images, tmp_path / "source")
    moved = (tmp_path / "source").rename(tmp_path / "moved")
    assert transform_store(moved, tmp_path / "out").added == 3


def test_result_inside_a_store_is_refused(source: Path) -> None:
    before = content(source)
    for inside in (source / "small", source / "features" / "small"):
        with pytest.raises(UsageError, match=f"is in the store {source}; choose a folder beside"):
            transform_store(source, inside, pca=2)
    assert content(source) == before


def test_compact_keeps_the_transform(tmp_path: Path, images: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    embed(images, source)
    transform_store(source, out, pca=2)
    grow(images)
    embed(images, source)
    transform_store(source, out)
    rows = {path: row.tobytes() for path, row in zip(*_paths_and_rows(out), strict=True)}
    compact(out)
    assert list(verify(out)) == []
    assert {path: row.tobytes() for path, row in zip(*_paths_and_rows(out), strict=True)} == rows
    assert not transform_store(source, out).is_changed


def _paths_and_rows(out: Path) -> tuple[list[str], np.ndarray]:
    store = FeatureStore.open(out)
    return list(store.paths), np.asarray(store.features)


# ---------------------------------------------------------------------------------------------
# Files of the transform


def test_overwrite_replaces_a_result_whose_manifest_is_damaged(
    tmp_path: Path, source: Path
) -> None:
    out = tmp_path / "out"
    transform_store(source, out, **ALL)
    (out / "store.json").write_text("{")
    with pytest.raises(StoreDamagedError, match="start over with --overwrite"):
        transform_store(source, out)
    transform_store(source, out, pca=2, overwrite=True)
    assert FeatureStore.open(out).features.shape == (60, 2)
    assert not (out / "transform_scales.npy").exists()
    assert list(verify(out)) == []


@pytest.mark.parametrize("name", ["mean", "components", "scales"])
@pytest.mark.parametrize("harm", ["missing", "changed", "shorter", "fifo"])
def test_file_that_is_missing_or_changed_is_refused(
    tmp_path: Path, source: Path, name: str, harm: str
) -> None:
    out = tmp_path / "out"
    transform_store(source, out, **ALL)
    file = out / f"transform_{name}.npy"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.unlink()
    if harm == "fifo":
        os.mkfifo(file)
    elif harm != "missing":
        file.write_bytes(data if harm == "changed" else data[:-8])
    store = FeatureStore.open(out)
    message = "was changed: got SHA-256" if harm in ("changed", "shorter") else "cannot be read"
    with pytest.raises(StoreDamagedError, match=f"{file.name}, the transform .* {message}"):
        read_transform(out, store.manifest.description)
    with pytest.raises(StoreDamagedError, match=message):
        transform_store(source, out)
    with pytest.raises(StoreDamagedError, match=message):
        Searcher(store).search(noise(1, 30, 30), k=1)
    assert [problem for problem in verify(out) if file.name in problem]
    transform_store(source, out, **ALL, overwrite=True)
    assert list(verify(out)) == []


@pytest.mark.parametrize("names", [["../x.npy"], ["transform_scales.npy", "transform_mean.npy"]])
def test_manifest_may_name_no_other_files(tmp_path: Path, source: Path, names: list[str]) -> None:
    out = tmp_path / "out"
    transform_store(source, out, pca=2)
    text = json.loads((out / "store.json").read_text())
    entry = {"name": "", "bytes": 1, "sha256": "0" * 64}
    text["embedding"]["transform"]["files"] = [{**entry, "name": name} for name in names]
    (out / "store.json").write_text(json.dumps(text))
    with pytest.raises(StoreDamagedError, match="transform: files"):
        FeatureStore.open(out)


# ---------------------------------------------------------------------------------------------
# Other tools


def test_result_is_an_ordinary_store(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    transform_store(source, out, **ALL)
    store = FeatureStore.open(out)
    hits = store.search(store.features[[4, 30]], k=1)
    assert hits.rows.tolist() == [[4], [30]]
    assert evaluate_store(store, [i % 2 for i in range(60)], k=[1]).rows == 60
    export_store(out, tmp_path / "rows", "npy")
    assert np.array_equal(np.load(tmp_path / "rows" / "features.npy"), store.features[:])
    about = json.loads((tmp_path / "rows" / "_export.json").read_text())
    assert about["embedding"]["transform"]["pca"] == 3


# ---------------------------------------------------------------------------------------------
# Runs that die


@pytest.mark.slow
@pytest.mark.parametrize("is_grown", [False, True], ids=["new", "grown"])
def test_death_at_any_step_loses_no_store_and_the_next_call_completes_it(
    tmp_path: Path,
    images: Path,
    is_grown: bool,
    fixed_time: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transforming, "BLOCK_BYTES", 48)  # two rows
    source, template = tmp_path / "source", tmp_path / "template"
    steps = {"normalize": True, "pca": 2, "whiten": True}
    embed(images, source)
    transform_store(source, template, **steps)  # type: ignore[arg-type]
    old = content(template)
    if is_grown:
        grow(images)
        embed(images, source)
    expected = tmp_path / "expected"
    shutil.copytree(template, expected)
    transform_store(source, expected)
    for when in itertools.count(1, 5):
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        if is_grown:
            shutil.copytree(template, out)
        died = in_child(
            lambda out=out: transform_store(source, out, **steps),  # type: ignore[misc]
            die(when),
        )
        if is_grown and not (out / STAGING / "store.json").exists():
            assert (out / "store.json").exists()
        if (out / "store.json").exists() and not (out / STAGING / "store.json").exists():
            assert _shown(content(out)) in (_shown(old), _shown(content(expected)))
        transform_store(source, out, **steps)  # type: ignore[arg-type]
        assert content(out) == content(expected), when
        assert not (out / STAGING).exists()
        assert list(verify(out)) == []
        if not died:
            break
    assert when > 20


@pytest.mark.slow
def test_death_while_a_result_is_replaced_leaves_no_transform_of_another_store(
    tmp_path: Path, source: Path, write_store: WriteStore
) -> None:
    """The old and the new rows are the same bytes in float16; the directions are not."""
    almost = write_store(tmp_path / "almost", [ROWS + np.eye(60, 8, dtype="f4") * 1e-6])
    template, out = tmp_path / "template", tmp_path / "out"
    steps: dict[str, Any] = {"pca": 2, "dtype": "float16"}
    transform_store(source, template, **steps)
    for when in itertools.count(1):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(template, out)

        left = list(range(when))

        def die_publishing(step: int, left: list[int] = left) -> None:
            if (out / STAGING / "store.json").is_file() and not left.pop():
                os._exit(DIED)

        def replaced() -> None:
            transform_store(source, out, **steps, fit=almost, overwrite=True)

        died = in_child(replaced, die_publishing)
        store = FeatureStore.open(out)
        assert read_transform(out, store.manifest.description) is not None, when
        if (out / "store.json").is_file():  # for whoever does not look for a run
            for entry in Manifest.read(out / "store.json").description.transform_files:
                assert FileEntry.of(out / entry.name, entry.name) == entry, when
        if not died:
            break
    names = ["features/00000.npy", "transform_components.npy"]
    same = [(out / name).read_bytes() == (template / name).read_bytes() for name in names]
    assert same == [True, False]
    assert when > 10


def _shown(files: dict[str, object]) -> object:
    """Manifest of a store; files beside it may be leftovers of a run that died."""
    return files["store.json"]


def test_source_that_changed_meanwhile_is_planned_anew(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows that are done, and the fit, are kept."""
    monkeypatch.setattr(transforming, "BLOCK_BYTES", 48)
    source, out = tmp_path / "source", tmp_path / "out"
    embed(images, source)

    append = ShardWriter.append

    def stop_halfway(shard: ShardWriter, *batch: Any) -> None:
        if len(shard.entries) == 2:
            raise KeyboardInterrupt("Ctrl-C")
        append(shard, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "append", stop_halfway)
        with pytest.raises(KeyboardInterrupt, match="Ctrl-C"):
            transform_store(source, out, normalize=True, pca=2)
    file = out / STAGING / "transform_mean.npy"
    mean = file.read_bytes()
    file.write_bytes(mean[:-1])
    with pytest.raises(StoreDamagedError, match=r"transform_mean\.npy, .* was changed"):
        transform_store(source, out, normalize=True, pca=2)
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "append", stop_halfway)
        with pytest.raises(KeyboardInterrupt, match="Ctrl-C"):
            transform_store(source, out, normalize=True, pca=2, overwrite=True)
    assert file.read_bytes() == mean
    grow(images)
    now = embed(images, source)
    report = transform_store(source, out, normalize=True, pca=2)
    store = FeatureStore.open(out)
    assert not report.is_fitted
    assert (out / "transform_mean.npy").read_bytes() == mean
    assert sorted(store.paths) == sorted(now.paths)
    transform = read_transform(out, store.manifest.description)
    assert transform is not None
    for path in now.paths:
        expected = transform.apply(now[path][None])[0].astype("f4")
        assert store[path].tobytes() == expected.tobytes()
    assert list(verify(out)) == []


def test_no_dimension_is_advised_for_rows_that_do_not_vary(
    tmp_path: Path, write_store: Callable[..., Path]
) -> None:
    store = write_store(tmp_path / "store", [np.ones((1, 3), np.float32)])
    with pytest.raises(UsageError, match=r"got 1 dimension, .* vary in 0; fit on a store of more"):
        transform_store(store, tmp_path / "out", pca=1)
