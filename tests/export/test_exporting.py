"""``export_store()``: what it refuses, what it changes about rows, and what it follows."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.pictures import noise

from extractor import (
    FeatureStore,
    StoreBusyError,
    StoreError,
    UnknownTokenError,
    UsageError,
    export_store,
    extract,
)
from extractor.export import blocks, tables
from extractor.store.lock import Lock
from extractor.upkeep.compact import compact

WriteStore = Callable[..., Path]
Tree = Callable[[Path], dict[str, bytes | None]]
ROWS = np.array([[3, 4, 0], [0, 0, 0], [70000, 0, 0], [0, -1, 0]], np.float32)


@pytest.fixture
def store(tmp_path: Path, write_store: WriteStore) -> FeatureStore:
    return FeatureStore.open(write_store(tmp_path / "store", [ROWS]))


def rows_of(folder: Path) -> np.ndarray:
    return np.array(pq.read_table(folder)["embedding"].to_pylist())


def test_unit_length_keeps_rows_of_zeros(store: FeatureStore, tmp_path: Path) -> None:
    export_store(store, tmp_path / "to", normalize=True)
    np.testing.assert_allclose(
        rows_of(tmp_path / "to"), [[0.6, 0.8, 0], [0, 0, 0], [1, 0, 0], [0, -1, 0]], rtol=1e-6
    )
    assert json.loads((tmp_path / "to" / "_export.json").read_text())["normalized"] is True


def test_value_too_large_for_float16_is_refused(store: FeatureStore, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="got float16, but a value is too large for it"):
        export_store(store, tmp_path / "to", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    export_store(store, tmp_path / "to", dtype="float16", normalize=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "tsv"}, "format: got 'tsv', expected one of npy, parquet"),
        ({"column": "path"}, "column: got 'path', expected a name other than id, path"),
        ({"column": "a.b"}, "without periods"),
        ({"dtype": "int8"}, "dtype: got 'int8', expected one of float32, float16"),
        ({"format": "faiss", "dtype": "float16"}, "dtype: faiss holds float32"),
        ({"to": "store/table"}, r"is in the store .*; export to a folder beside it"),
        ({"to": "store"}, "is in the store"),
        ({"to": "."}, "holds files that are not part of an export"),
        ({"to": "file/table"}, "file is a file, expected a folder"),
        ({"to": "file"}, "is a file, expected a folder for this format"),
        ({"to": "file", "format": "csv"}, "file exists; replace it with --overwrite"),
        ({"to": "folder", "format": "csv"}, "folder is a folder, expected a file"),
        ({"to": "folder"}, "holds files that are not part of an export"),
        ({"to": "folder", "overwrite": True}, "holds files that are not part of an export"),
    ],
)
def test_bad_argument_changes_nothing(
    store: FeatureStore, tmp_path: Path, tree: Tree, arguments: dict, message: str
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    before = tree(tmp_path)
    to = tmp_path / arguments.pop("to", "to")
    with pytest.raises(UsageError, match=message):
        export_store(store, to, **arguments)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["to", "to.csv"])
def test_export_is_replaced_only_if_asked(
    store: FeatureStore, tmp_path: Path, tree: Tree, name: str
) -> None:
    export_store(store, tmp_path / name)
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="replace it with --overwrite"):
        export_store(store, tmp_path / name)
    assert tree(tmp_path) == before
    export_store(store, tmp_path / name, overwrite=True)
    assert tree(tmp_path) == before  # the same store gives the same bytes


def test_replaced_folder_keeps_no_file_of_the_old_export(
    store: FeatureStore, tmp_path: Path
) -> None:
    export_store(store, tmp_path / "to", "npy")
    export_store(store, tmp_path / "to", "parquet", overwrite=True)
    assert sorted(p.name for p in (tmp_path / "to").iterdir()) == [
        "_export.json",
        "part-00000.parquet",
    ]


def test_file_that_a_user_added_to_an_export_is_kept(store: FeatureStore, tmp_path: Path) -> None:
    export_store(store, tmp_path / "to")
    (tmp_path / "to" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"not part of an export \('notes.txt'\)"):
        export_store(store, tmp_path / "to", overwrite=True)
    assert (tmp_path / "to" / "notes.txt").exists()


def test_empty_folder_is_filled(store: FeatureStore, tmp_path: Path) -> None:
    (tmp_path / "to").mkdir()
    export_store(store, tmp_path / "to")
    assert len(rows_of(tmp_path / "to")) == 4


def test_full_disk_leaves_the_old_export(
    store: FeatureStore, tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_store(store, tmp_path / "to")
    before = tree(tmp_path)

    def append(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tables.ParquetWriter, "append", append)
    with pytest.raises(StoreError, match=r"cannot write .*to: No space left on device"):
        export_store(store, tmp_path / "to", overwrite=True)
    assert tree(tmp_path) == before


def test_leftovers_of_a_killed_export_are_cleared(store: FeatureStore, tmp_path: Path) -> None:
    staging = tmp_path / ".to.partial"
    (staging / "to").mkdir(parents=True)
    (staging / "to" / "part-00000.parquet").write_text("half")
    export_store(store, tmp_path / "to")
    assert not staging.exists()
    assert len(rows_of(tmp_path / "to")) == 4


def test_export_that_died_between_two_renames_is_restored(
    store: FeatureStore, tmp_path: Path
) -> None:
    export_store(store, tmp_path / "to")
    (tmp_path / ".to.partial").mkdir()
    (tmp_path / "to").rename(tmp_path / ".to.partial" / "replaced")
    with pytest.raises(UsageError, match="too large"):
        export_store(store, tmp_path / "to", dtype="float16")
    assert len(rows_of(tmp_path / "to")) == 4


def test_failed_rename_leaves_the_old_export(
    store: FeatureStore, tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_store(store, tmp_path / "to")
    before = tree(tmp_path)
    rename = os.replace

    def replace(source: Path, destination: Path) -> None:
        if Path(source).name == "to" and Path(destination) == tmp_path / "to":
            raise OSError(errno.EIO, "Input/output error")
        rename(source, destination)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(StoreError, match=r"cannot write .*to: Input/output error"):
        export_store(store, tmp_path / "to", "npy", overwrite=True)
    assert tree(tmp_path) == before


def test_foreign_folder_in_the_way_is_kept(store: FeatureStore, tmp_path: Path) -> None:
    (tmp_path / ".to.partial").mkdir()
    (tmp_path / ".to.partial" / "mine").write_text("mine")
    with pytest.raises(UsageError, match=r"\.to\.partial was not left by an export"):
        export_store(store, tmp_path / "to")
    assert (tmp_path / ".to.partial" / "mine").exists()


def test_two_exports_to_one_folder_are_refused(store: FeatureStore, tmp_path: Path) -> None:
    (tmp_path / ".to.partial").mkdir()
    with (
        Lock(tmp_path / ".to.partial" / "lock"),
        pytest.raises(StoreBusyError, match="to is being written by another export"),
    ):
        export_store(store, tmp_path / "to")
    export_store(store, tmp_path / "to")


def test_blocks_are_cut_anywhere(
    tmp_path: Path, write_store: WriteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.arange(33, dtype=np.float32).reshape(11, 3)
    store = write_store(tmp_path / "store", [rows[:4], rows[4:8], rows[8:]])
    for block in (1, 3, 100):
        for file in (1, 5):
            monkeypatch.setattr(blocks, "BLOCK_ROWS", block)
            monkeypatch.setattr(tables, "FILE_ROWS", file)
            export_store(store, tmp_path / "to", overwrite=True)
            np.testing.assert_array_equal(rows_of(tmp_path / "to"), rows)
            assert len(list((tmp_path / "to").glob("*.parquet"))) == -(-11 // file)


def test_unknown_state_asks_for_a_full_sync(store: FeatureStore, tmp_path: Path) -> None:
    with pytest.raises(UnknownTokenError, match="full sync"):
        export_store(store, tmp_path / "to", since="abc")


def follow(database: dict[int, tuple[str, list[float]]], folder: Path) -> str:
    """Bring a database in step with what an export says; return the token for the next one."""
    sidecar = json.loads((folder / "_export.json").read_text())
    for number in sidecar["removed"]:
        del database[number]
    table = pq.read_table(folder)
    for number, path, row in zip(
        table["id"].to_pylist(),
        table["path"].to_pylist(),
        table["embedding"].to_pylist(),
        strict=True,
    ):
        database[number] = (path, row)
    return sidecar["token"]


def test_database_that_follows_the_exports_equals_the_store(tmp_path: Path) -> None:
    images = tmp_path / "images"
    for number in range(5):
        (images / "cats").mkdir(parents=True, exist_ok=True)
        noise(number, 40, 40).save(images / "cats" / f"{number}.png")
    database: dict[int, tuple[str, list[float]]] = {}
    token = ""

    def grow() -> FeatureStore:
        return extract(
            images, "test_resnet", tmp_path / "store", weights="random", device="cpu", retire=True
        ).store

    def sync(step: int) -> int:
        nonlocal token
        report = export_store(tmp_path / "store", tmp_path / f"step{step}", since=token)
        token = follow(database, report.path)
        store = FeatureStore.open(tmp_path / "store")
        assert sorted(database) == sorted(store.ids.tolist())
        for row, number in enumerate(store.ids.tolist()):
            assert database[number] == (store.paths[row], store.features[row].tolist())
        return report.rows

    grow()
    assert sync(0) == 5
    (images / "cats" / "0.png").unlink()  # removed
    noise(9, 40, 40).save(images / "cats" / "1.png")  # changed
    (images / "cats" / "2.png").rename(images / "moved.png")
    noise(10, 40, 40).save(images / "new.png")
    store = grow()
    assert store.manifest.retired >= 2
    assert sync(1) <= 4
    full = export_store(store, tmp_path / "full")
    assert pq.read_table(full.path)["path"].to_pylist() == store.paths
    np.testing.assert_array_equal(
        pq.read_table(full.path)["embedding"].to_pylist(), store.features[:]
    )
    compact(tmp_path / "store")
    assert sync(2) == 0


def test_progress_counts_the_rows_that_are_written(store: FeatureStore, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    export_store(store, tmp_path / "rows.csv", progress=lambda *step: seen.append(step))
    counts = list(np.cumsum([part.shape[0] for part in store.features.parts]))
    assert seen == [("writing", done, len(store)) for done in counts]


@pytest.mark.parametrize(
    ("name", "format"),
    [
        (b"table\xff", "parquet"),
        (b"file\xff.parquet", None),
        (b"clip\xff", "clip-retrieval"),
        (b"rows\xff.csv", None),
        (b"rows\xff.faiss", None),
        (b"arrays\xff", "npy"),
    ],
)
def test_the_name_of_a_target_need_not_be_utf8(
    store: FeatureStore, tmp_path: Path, name: bytes, format: str | None
) -> None:
    target = tmp_path / os.fsdecode(name)
    assert export_store(store, target, format).rows == len(store)
    assert target.exists()


@pytest.mark.parametrize(("root", "is_text"), [("/r\xfc", True), ("/r\udcfc", False)])
def test_root_that_is_not_utf8_makes_the_paths_of_clip_retrieval_bytes(
    root: str, is_text: bool, tmp_path: Path, write_store: WriteStore
) -> None:
    write_store(tmp_path / "store", [ROWS], root=root)
    export_store(tmp_path / "store", tmp_path / "clip", "clip-retrieval")
    first = pq.read_table(tmp_path / "clip/metadata")["image_path"][0].as_py()
    assert first == (f"{root}/0/0.jpg" if is_text else os.fsencode(f"{root}/0/0.jpg"))
