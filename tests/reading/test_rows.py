"""A store as an array and as a mapping: paths, selections, blocks, tables, tensors, pickles."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from extractor.errors import (
    StoreDamagedError,
    StoreError,
    StoreNotFoundError,
    StoreReplacedError,
    UsageError,
)
from extractor.reading.reader import FeatureStore

WriteStore = Callable[..., Path]
NAMES = [[b"a/1.jpg", b"a/2.jpg", b"b/1.jpg", b"b/\xff.jpg"], [b"c/1.jpg", b"c/2.jpg", b"d.jpg"]]


@pytest.fixture
def out(tmp_path: Path, parts: list[np.ndarray], write_store: WriteStore) -> Path:
    """A store of 7 rows of 3 numbers, in two shards."""
    return write_store(tmp_path / "out", parts, names=NAMES)


@pytest.fixture
def store(out: Path) -> FeatureStore:
    return FeatureStore.open(out)


@pytest.fixture
def whole(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts)


def test_path_in_store_asks_for_a_row(store: FeatureStore) -> None:
    assert "b/1.jpg" in store
    assert Path("/photos/c/2.jpg") in store
    assert os.fsdecode(b"b/\xff.jpg") in store
    assert "b/3.jpg" not in store
    assert "/elsewhere/c/2.jpg" not in store
    assert 3 not in store


def test_path_indexes_its_row(store: FeatureStore, whole: np.ndarray) -> None:
    np.testing.assert_array_equal(store["b/1.jpg"], whole[2])
    np.testing.assert_array_equal(store[Path("/photos/d.jpg")], whole[6])
    np.testing.assert_array_equal(store[["d.jpg", "a/1.jpg"]], whole[[6, 0]])
    with pytest.raises(KeyError, match=r"'x\.jpg' has no row in"):
        store["x.jpg"]


def test_full_path_starts_at_the_root(store: FeatureStore) -> None:
    assert store.full_path(1) == "/photos/a/2.jpg"


@pytest.mark.parametrize("size", [1, 12, 13, 24, 60, 10**9])
def test_batches_cover_all_rows_in_blocks(
    store: FeatureStore, whole: np.ndarray, size: int
) -> None:
    blocks = list(store.batches(bytes=size))
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), whole)
    assert all(block.nbytes <= max(size, 12) for _, block in blocks)
    assert all(len(block) == rows.stop - rows.start for rows, block in blocks)


@pytest.mark.parametrize(
    ("which", "rows"),
    [
        ("a/*", [0, 1]),
        ("*1.jpg", [0, 2, 4]),
        ("*", list(range(7))),
        ("none", []),
        ([6, 0, 0], [6, 0, 0]),
        ([], []),
        (np.arange(7) % 2 == 1, [1, 3, 5]),
        (range(2, 4), [2, 3]),
        ([-1], [6]),
    ],
)
def test_selection_holds_its_rows(
    store: FeatureStore, whole: np.ndarray, which: Any, rows: list[int]
) -> None:
    selected = store.select(which)
    assert len(selected) == len(rows)
    np.testing.assert_array_equal(selected.features[:], whole[rows].reshape(-1, 3))
    assert selected.paths == [store.paths[row] for row in rows]
    assert selected.ids.tolist() == [store.ids[row] for row in rows]
    assert selected.rows.tolist() == rows
    if rows:
        np.testing.assert_array_equal(selected[selected.paths[-1]], whole[rows[-1]])
        assert selected.full_path(0) == store.full_path(rows[0])
        assert store.full_path(rows[-1]) in selected
        assert selected.column("size") == [store.column("size")[row] for row in rows]


def test_selection_of_a_selection_refers_to_its_own_rows(
    store: FeatureStore, whole: np.ndarray
) -> None:
    inner = store.select([5, 3, 1]).select([2, 0])
    np.testing.assert_array_equal(inner.features[:], whole[[1, 5]])
    np.testing.assert_array_equal(inner.features[:, 1], whole[[1, 5], 1])
    assert "a/1.jpg" not in inner


@pytest.mark.parametrize("which", [3, None, 1.5, ["a", "b"], [[1]], [[1], [2, 3]], {"a": 1}])
def test_selection_of_something_else_is_refused(store: FeatureStore, which: Any) -> None:
    with pytest.raises(UsageError, match=r"select: got .*, expected a glob, a mask or a list"):
        store.select(which)


@pytest.mark.parametrize("which", [[7], [-8], np.ones(6, bool)])
def test_selection_out_of_range_is_an_index_error(store: FeatureStore, which: Any) -> None:
    with pytest.raises(IndexError, match=r"out of bounds|did not match"):
        store.select(which)


@pytest.mark.parametrize("path", [5, None, 1.5, ["a/1.jpg"]])
def test_row_of_something_else_than_a_path_is_refused(store: FeatureStore, path: Any) -> None:
    with pytest.raises(UsageError, match=r"path: got \w+, expected the path of an image"):
        store.index_of(path)
    with pytest.raises(UsageError, match="path: got int, expected the path of an image"):
        store[["a/1.jpg", 5]]


@pytest.mark.parametrize("size", [0, -1, "64", 1.5, None])
def test_blocks_of_no_size_are_refused(store: FeatureStore, size: Any) -> None:
    with pytest.raises(UsageError, match=r"bytes: got .*, expected a positive integer"):
        next(store.batches(bytes=size))


def test_rows_of_ids_are_found_in_any_order(store: FeatureStore) -> None:
    ids = store.ids[[4, 0, 4]]
    assert store.rows_of(ids).tolist() == [4, 0, 4]
    assert store.select([6, 2]).rows_of([store.ids[2]]).tolist() == [1]
    with pytest.raises(KeyError, match="id 999 has no row"):
        store.rows_of([0, 999])
    with pytest.raises(KeyError, match="id 1 has no row"):
        store.select([]).rows_of([1])


@pytest.mark.parametrize("ids", [[1.7], ["a/1.jpg"], [True]])
def test_ids_that_are_no_integers_are_refused(store: FeatureStore, ids: list[Any]) -> None:
    with pytest.raises(UsageError, match=r"ids: got .*, expected integers"):
        store.rows_of(ids)


def test_frame_holds_every_column(store: FeatureStore, whole: np.ndarray) -> None:
    table = store.frame()
    assert table.schema.names == [
        "id", "path", "size", "mtime_ns", "width", "height", "sha256", "embedding",
    ]  # fmt: skip
    assert table.column("id").to_pylist() == store.ids.tolist()
    assert table.column("path").to_pylist() == [name for shard in NAMES for name in shard]
    np.testing.assert_array_equal(np.stack(table.column("embedding").to_pylist()), whole)
    assert table.column("sha256").to_pylist() == store.column("sha256")


def test_frame_of_a_selection_has_text_paths(store: FeatureStore) -> None:
    table = store.select("a/*").frame(embeddings=False)
    assert table.column("path").to_pylist() == ["a/1.jpg", "a/2.jpg"]
    assert "embedding" not in table.schema.names


def test_frame_names_what_is_missing_for_pandas(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pandas is not installed; pip install pandas"):
        store.frame("pandas")
    with pytest.raises(UsageError, match="frame: got 'polars', expected one of arrow, pandas"):
        store.frame("polars")  # type: ignore[arg-type]


def test_tensor_is_a_copy_without_a_warning(store: FeatureStore, whole: np.ndarray) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = store.torch()
        some = store.torch([6, 0])
        item = store.torch(3)
    np.testing.assert_array_equal(tensor.numpy(), whole)
    np.testing.assert_array_equal(some.numpy(), whole[[6, 0]])
    assert item.shape == (3,)
    tensor += 1  # writable, and not the file
    np.testing.assert_array_equal(store.features[:], whole)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_dataset_feeds_a_data_loader(store: FeatureStore, whole: np.ndarray, workers: int) -> None:
    labels = np.arange(7) * 10
    loader: Any = DataLoader(
        store.dataset(labels),  # type: ignore[arg-type]
        batch_size=3,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not writable")
        batches = list(loader)
    np.testing.assert_array_equal(torch.cat([rows for rows, _ in batches]).numpy(), whole)
    assert torch.cat([values for _, values in batches]).tolist() == labels.tolist()


def test_dataset_without_labels_yields_rows(store: FeatureStore, whole: np.ndarray) -> None:
    dataset = store.select([4, 2]).dataset()
    np.testing.assert_array_equal(dataset[0].numpy(), whole[4])
    assert len(dataset) == 2
    with pytest.raises(UsageError, match="labels: got 3 for 7 rows"):
        store.dataset([1, 2, 3])


@pytest.mark.parametrize(
    "labels", [5, "ab", {"a": 1}, iter([0] * 7)], ids=lambda labels: type(labels).__name__
)
def test_labels_that_are_no_sequence_are_refused(store: FeatureStore, labels: Any) -> None:
    with pytest.raises(
        UsageError, match=r"labels: got \w+, expected a list or an array, one value"
    ):
        store.dataset(labels)


@pytest.mark.parametrize("other", [str, lambda out: f"{out}/", lambda out: out / "../out"])
def test_group_refuses_a_folder_that_it_has(out: Path, other: Callable[[Path], Any]) -> None:
    with pytest.raises(UsageError, match=r"stores: got .*out twice, expected each folder once"):
        FeatureStore.open([out, other(out)])


def test_pickle_holds_no_vectors(
    tmp_path: Path, write_store: WriteStore, whole: np.ndarray
) -> None:
    rows = np.zeros((2000, 64), np.float32)
    names = [[f"{i:05d}.jpg".encode() for i in range(2000)]]
    store = FeatureStore.open(write_store(tmp_path / "big", [rows], names=names))
    content = pickle.dumps(store.dataset())
    assert len(content) < 1000
    assert len(pickle.loads(content)) == 2000


def test_pickled_selection_comes_back(store: FeatureStore, whole: np.ndarray) -> None:
    again = pickle.loads(pickle.dumps(store.select("c/*")))
    np.testing.assert_array_equal(again.features[:], whole[4:6])


def test_store_that_changed_is_not_unpickled(
    store: FeatureStore, out: Path, parts: list[np.ndarray], write_store: WriteStore
) -> None:
    content = pickle.dumps(store)
    write_store(out, parts[:1], overwrite=True)
    with pytest.raises(StoreReplacedError, match="changed since it was pickled"):
        pickle.loads(content)


def test_store_tells_whether_it_is_current(
    store: FeatureStore, out: Path, parts: list[np.ndarray], write_store: WriteStore
) -> None:
    assert store.is_current()
    assert store.reopen().token == store.token
    write_store(out, parts[:1], names=NAMES[:1], overwrite=True)
    assert not store.is_current()
    assert len(store.reopen()) == 4
    assert store.reopen().is_current()
    shutil.rmtree(out)
    assert not store.is_current()
    with pytest.raises(StoreNotFoundError, match="is not a store"):
        store.reopen()


def test_copy_of_the_manifest_is_the_same_state(store: FeatureStore, out: Path) -> None:
    content = (out / "store.json").read_bytes()
    (out / "store.json").unlink()
    (out / "store.json").write_bytes(content)
    assert store.is_current()


def test_deleted_store_serves_what_is_mapped_or_read(
    store: FeatureStore, out: Path, whole: np.ndarray
) -> None:
    assert store.paths[0] == "a/1.jpg"
    shutil.rmtree(out)
    np.testing.assert_array_equal(store.features[:], whole)
    np.testing.assert_array_equal(store["d.jpg"], whole[6])
    with pytest.raises(StoreReplacedError, match="was replaced or removed since it was opened"):
        store.column("width")


def test_missing_and_damaged_stores_have_errors_of_their_own(out: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match="is not a store"):
        FeatureStore.open(tmp_path / "none")
    (out / "features" / "00001.npy").write_bytes(b"short")
    with pytest.raises(StoreDamagedError, match="has 5 bytes, expected"):
        FeatureStore.open(out)
    (out / "store.json").write_bytes(b"{")
    with pytest.raises(StoreDamagedError, match="is not JSON"):
        FeatureStore.open(out)


def test_info_is_what_the_manifest_says(store: FeatureStore) -> None:
    info = store.info
    assert (info.model, info.weights_tag) == ("timm:tiny", "a1")
    assert info.weights_sha256 == "0123456789abcdef"
    assert (info.dim, info.shape, info.dtype, info.normalized) == (3, (3,), "float32", False)
    assert (info.precision, info.device, info.batch_size) == ("float32", "cpu", 2)
    assert (info.rows, info.failed, info.retired, info.root) == (7, 0, 0, "/photos")
    assert info.layers == ()


def test_info_of_joined_backbones_names_each(
    tmp_path: Path, parts: list[np.ndarray], write_store: WriteStore
) -> None:
    part = {"library": "timm", "weights": "hub", "tag": "x", "sha256": "1", "heads": ["fc"]}
    backbone = {
        "model": "timm:a+timm:b",
        "weights": "x+y",
        "sha256": "9",
        "parts": [{**part, "model": "timm:a"}, {**part, "model": "timm:b", "tag": "y"}],
    }
    info = FeatureStore.open(write_store(tmp_path / "out", parts, backbone=backbone)).info
    assert (info.model, info.weights_tag, info.weights_sha256) == ("timm:a+timm:b", "x+y", "9")
    assert (info.library, info.weights, info.heads) == ("timm", "hub", ("fc", "fc"))


# ---------------------------------------------------------------------------------------------
# Several stores


@pytest.fixture
def other(tmp_path: Path, parts: list[np.ndarray], write_store: WriteStore) -> FeatureStore:
    """A second store of the same backbone: images e/0.jpg and e/1.jpg."""
    names = [[b"e/0.jpg", b"e/1.jpg"]]
    return FeatureStore.open(write_store(tmp_path / "other", [parts[0][:2] + 50], names=names))


def test_several_stores_follow_each_other(
    store: FeatureStore, other: FeatureStore, whole: np.ndarray
) -> None:
    group = FeatureStore.open([store.path, other.path])
    np.testing.assert_array_equal(group.features[:], np.concatenate([whole, whole[:2] + 50]))
    assert group.paths == [*store.paths, *other.paths]
    assert group.origin(7)[1] == 0
    assert group.origin(-1)[0].path == other.path
    assert group.full_path(8) == "/photos/e/1.jpg"
    np.testing.assert_array_equal(group["e/1.jpg"], whole[1] + 50)
    np.testing.assert_array_equal(group["/photos/e/0.jpg"], whole[0] + 50)
    assert len(group.select("*/1.jpg")) == 4
    again = pickle.loads(pickle.dumps(group))
    np.testing.assert_array_equal(again.features[:], group.features[:])
    with pytest.raises(StoreError, match="ids belong to one store"):
        _ = group.ids
    assert "id" not in group.frame().schema.names
    assert group.select("*/1.jpg").frame().num_rows == 4
    with pytest.raises(IndexError, match="row 9 is out of range for 9 rows"):
        group.origin(9)


def test_stores_under_different_roots_have_absolute_paths(
    store: FeatureStore, tmp_path: Path, parts: list[np.ndarray], write_store: WriteStore
) -> None:
    path = write_store(tmp_path / "third", parts, names=NAMES, root="/elsewhere")
    group = FeatureStore.open([store.path, path])
    assert group.paths[0] == "/photos/a/1.jpg"
    assert group.paths[7] == "/elsewhere/a/1.jpg"
    assert group.index_of("/elsewhere/a/1.jpg") == 7


@pytest.mark.parametrize(
    ("described", "named"),
    [
        ({"backbone": {"model": "timm:tiny", "tag": "a1", "sha256": "f" * 16}}, "backbone.sha256"),
        ({"preprocess": {"size": [9, 9]}}, "preprocess.size"),
        ({"dtype": "float16"}, "embedding.dtype"),
    ],
)
def test_stores_made_differently_are_not_opened_as_one(
    store: FeatureStore,
    tmp_path: Path,
    parts: list[np.ndarray],
    write_store: WriteStore,
    described: dict[str, Any],
    named: str,
) -> None:
    if "dtype" in described:
        parts, described = [part.astype(np.float16) for part in parts], {}
    path = write_store(tmp_path / "third", parts, **described)
    with pytest.raises(StoreError, match=f"made differently .*{named}"):
        FeatureStore.open([store.path, path])


def test_no_store_and_no_path_are_refused(store: FeatureStore) -> None:
    with pytest.raises(UsageError, match="expected at least one folder"):
        FeatureStore.open([])
    with pytest.raises(UsageError, match="path: got Selection, expected one whole store or its"):
        FeatureStore.open(store.select("*"))  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="path: got int, expected the folder of a store"):
        FeatureStore.open(3)  # type: ignore[call-overload]


def test_join_holds_images_with_the_same_path_and_content(
    store: FeatureStore, tmp_path: Path, parts: list[np.ndarray], write_store: WriteStore
) -> None:
    # The fixture's digests follow from shard and position: only equal ones are the same content.
    names = [[b"a/1.jpg", b"a/9.jpg", b"b/1.jpg", b"b/\xff.jpg"]]
    wide = np.arange(8, dtype=np.float32).reshape(4, 2)
    backbone = {"model": "timm:other", "tag": "b2", "sha256": "f" * 16}
    path = write_store(tmp_path / "wide", [wide], names=names, backbone=backbone)
    second = FeatureStore.open(path)
    mine, theirs = (
        list(zip(each.paths, each.column("sha256"), strict=True)) for each in (store, second)
    )
    expected = [row for row, image in enumerate(mine) if image in theirs]
    both = FeatureStore.join(store, path, unit_parts=False)
    assert both.paths == [store.paths[row] for row in expected]
    assert len(both) == len(expected) > 0
    assert both.left_out == (7 - len(expected), 4 - len(expected))
    assert both.features.shape == (len(expected), 5)
    for row, name in enumerate(both.paths):
        joined = np.concatenate([store[name], second[name]])
        np.testing.assert_array_equal(both[row], joined)
        np.testing.assert_array_equal(both[name], joined)
    np.testing.assert_array_equal(both.features[:, 3:], second[list(both.paths)])
    assert both.ids.tolist() == store.ids[expected].tolist()
    again = pickle.loads(pickle.dumps(both))
    np.testing.assert_array_equal(again.features[:], both.features[:])


def test_join_scales_each_part_to_unit_length(store: FeatureStore) -> None:
    both = FeatureStore.join(store, store)
    lengths = np.linalg.norm(both.features[:].reshape(-1, 2, 3), axis=2)
    np.testing.assert_allclose(lengths, 1, rtol=1e-6)


def test_join_needs_two_stores_with_images_in_common(
    store: FeatureStore, other: FeatureStore
) -> None:
    with pytest.raises(UsageError, match="join: got 1 store, expected at least two"):
        FeatureStore.join(store)
    with pytest.raises(StoreError, match=r"no image is in .* under the same path"):
        FeatureStore.join(store, other)


def test_reading_needs_no_torch(out: Path) -> None:
    script = (
        "import sys\nfrom extractor import FeatureStore\n"
        "store = FeatureStore.open(sys.argv[1])\n"
        "store.info, store.ids, store.select('a/*').paths, store.frame(), store.is_current()\n"
        "list(store.batches())\n"
        "FeatureStore.open([sys.argv[1]]), FeatureStore.join(store, store)[0]\n"
        "assert not {'torch', 'timm', 'PIL'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script, os.fspath(out)], check=True)
