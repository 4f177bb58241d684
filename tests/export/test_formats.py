"""What each format holds is what the store holds."""

from __future__ import annotations

import csv
import hashlib
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from extractor import FeatureStore, InstallationError, UsageError, export_store
from extractor.export import tables
from extractor.export.formats import format_for

WriteStore = Callable[..., Path]
NAMES = [[b"a/1.jpg", b"a/2, 3.jpg", "ü.jpg".encode(), b"c"], [b"d", b"e", b"f"]]
ROWS = (np.arange(21, dtype=np.float32).reshape(7, 3) - 8) / 3
PATHS = ["a/1.jpg", "a/2, 3.jpg", "ü.jpg", "c", "d", "e", "f"]


@pytest.fixture
def store(tmp_path: Path, write_store: WriteStore) -> FeatureStore:
    """Seven rows in two shards."""
    return FeatureStore.open(write_store(tmp_path / "store", [ROWS[:4], ROWS[4:]], names=NAMES))


@pytest.fixture
def odd_store(tmp_path: Path, write_store: WriteStore) -> FeatureStore:
    """Two shards; one path is not UTF-8."""
    names = [[b"\xff.jpg", b"b"], [b"c", b"d"]]
    return FeatureStore.open(write_store(tmp_path / "odd", [ROWS[:2], ROWS[2:4]], names=names))


def digests(sizes: list[int]) -> list[bytes]:
    """SHA-256 as the fixture makes it of files of these sizes."""
    return [hashlib.sha256(b"x" * size).digest() for size in sizes]


SIZES = [100, 101, 102, 103, 100, 101, 102]


def check_table(table: pa.Table, store: FeatureStore) -> None:
    assert table.column_names == ["id", "path", "embedding", "sha256", "width", "height"]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 3)
    assert table["id"].to_pylist() == store.ids.tolist()
    assert table["path"].to_pylist() == PATHS
    assert table["embedding"].to_pylist() == ROWS.tolist()
    assert table["sha256"].to_pylist() == digests(SIZES)
    assert table["width"].to_pylist() == [20, 21, 22, 23, 20, 21, 22]
    assert table["height"].to_pylist() == [30, 31, 32, 33, 30, 31, 32]
    provenance = json.loads(table.schema.metadata[b"extractor"])
    assert provenance["token"] == store.token
    assert (provenance["model"], provenance["rows"]) == ("timm:tiny", 7)


def test_parquet_folder_is_the_canonical_table(store: FeatureStore, tmp_path: Path) -> None:
    report = export_store(store, tmp_path / "table")
    assert (report.rows, report.format, report.token) == (7, "parquet", store.token)
    check_table(pq.read_table(tmp_path / "table"), store)


def test_name_that_ends_in_parquet_is_one_file(store: FeatureStore, tmp_path: Path) -> None:
    export_store(store, tmp_path / "table.parquet")
    check_table(pq.read_table(tmp_path / "table.parquet"), store)
    assert json.loads((tmp_path / "table.parquet.json").read_text())["token"] == store.token


def test_parquet_files_have_a_fixed_number_of_rows(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "FILE_ROWS", 3)
    export_store(store, tmp_path / "table")
    files = sorted((tmp_path / "table").glob("*.parquet"))
    assert [pq.read_metadata(file).num_rows for file in files] == [3, 3, 1]
    check_table(pq.read_table(tmp_path / "table"), store)


def test_column_and_type_are_options(store: FeatureStore, tmp_path: Path) -> None:
    export_store(store, tmp_path / "table", column="vector", dtype="float16")
    schema = pq.read_schema(tmp_path / "table" / "part-00000.parquet")
    assert schema.field("vector").type == pa.list_(pa.float16(), 3)


def test_paths_that_are_no_text_become_bytes_in_every_file(
    odd_store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "FILE_ROWS", 2)
    export_store(odd_store, tmp_path / "table")
    table = pq.read_table(tmp_path / "table")
    assert table["path"].to_pylist() == [b"\xff.jpg", b"b", b"c", b"d"]
    export_store(odd_store, tmp_path / "npy", "npy")
    assert (tmp_path / "npy" / "paths.txt").read_bytes() == b"\xff.jpg\nb\nc\nd\n"
    export_store(odd_store, tmp_path / "odd.csv")
    assert (tmp_path / "odd.csv").read_bytes().splitlines()[1].startswith(b"0,\xff.jpg,")
    export_store(odd_store, tmp_path / "clip", "clip-retrieval")
    metadata = pq.read_table(tmp_path / "clip" / "metadata" / "metadata_0.parquet")
    assert metadata["image_path"].to_pylist() == [b"/photos/\xff.jpg", b"/photos/b"]


def test_npy_is_one_array_with_a_line_per_row(store: FeatureStore, tmp_path: Path) -> None:
    export_store(store, tmp_path / "npy", "npy")
    features = np.load(tmp_path / "npy" / "features.npy")
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features, ROWS)
    assert (tmp_path / "npy" / "paths.txt").read_text("utf-8").splitlines() == PATHS
    assert np.load(tmp_path / "npy" / "ids.npy").tolist() == store.ids.tolist()
    assert sorted(p.name for p in (tmp_path / "npy").iterdir()) == [
        "_export.json",
        "features.npy",
        "ids.npy",
        "paths.txt",
    ]


def test_path_with_a_line_break_is_no_line(tmp_path: Path, write_store: WriteStore) -> None:
    store = write_store(tmp_path / "store", [ROWS[:2]], names=[[b"a\nb", b"c"]])
    with pytest.raises(UsageError, match=r"npy: b'a\\nb' has a line break"):
        export_store(store, tmp_path / "npy", "npy")
    assert not (tmp_path / "npy").exists()
    export_store(store, tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(newline="") as file:
        assert [line["path"] for line in csv.DictReader(file)] == ["a\nb", "c"]


def test_csv_gives_every_value_back(store: FeatureStore, tmp_path: Path) -> None:
    export_store(store, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["path"] for line in lines] == PATHS
    values = np.array([json.loads(line["embedding"]) for line in lines], np.float32)
    np.testing.assert_array_equal(values, ROWS)
    assert [bytes.fromhex(line["sha256"]) for line in lines] == digests(SIZES)


def test_clip_retrieval_has_whole_paths(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "FILE_ROWS", 6)
    export_store(store, tmp_path / "clip", "clip-retrieval")
    parts = [np.load(tmp_path / "clip" / "img_emb" / f"img_emb_{i}.npy") for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(parts), ROWS)
    tables_of = [
        pq.read_table(tmp_path / "clip" / "metadata" / f"metadata_{i}.parquet") for i in range(2)
    ]
    paths = [path for table in tables_of for path in table["image_path"].to_pylist()]
    assert paths == [f"/photos/{path}" for path in PATHS]


@pytest.mark.parametrize("normalize", [False, True])
def test_faiss_file_is_what_faiss_writes(
    store: FeatureStore, tmp_path: Path, normalize: bool
) -> None:
    faiss: Any = pytest.importorskip("faiss")
    export_store(store, tmp_path / "rows.faiss", normalize=normalize)
    rows = ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True) if normalize else ROWS
    flat = faiss.IndexFlatIP(3) if normalize else faiss.IndexFlatL2(3)
    expected = faiss.IndexIDMap(flat)
    expected.add_with_ids(rows.astype(np.float32), store.ids)
    index = faiss.read_index(str(tmp_path / "rows.faiss"))
    assert index.metric_type == expected.metric_type
    for mine, theirs in zip(index.search(rows, 4), expected.search(rows, 4), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)
    if not normalize:
        content = (tmp_path / "rows.faiss").read_bytes()
        assert content == faiss.serialize_index(expected).tobytes()


def test_hdf5_holds_a_dataset_per_column(
    store: FeatureStore, odd_store: FeatureStore, tmp_path: Path
) -> None:
    h5py: Any = pytest.importorskip("h5py")
    export_store(store, tmp_path / "rows.h5")
    with h5py.File(tmp_path / "rows.h5") as file:
        np.testing.assert_array_equal(file["embedding"][:], ROWS)
        assert file["path"].asstr()[:].tolist() == PATHS
        assert file["id"][:].tolist() == store.ids.tolist()
        assert file["sha256"][:].tobytes() == b"".join(digests(SIZES))
        assert json.loads(file.attrs["extractor"])["token"] == store.token
    export_store(odd_store, tmp_path / "odd.h5", column="vector")
    with h5py.File(tmp_path / "odd.h5") as file:
        assert file["path"][:].tolist() == [b"\xff.jpg", b"b", b"c", b"d"]
        assert file["vector"].shape == (4, 3)


def test_missing_package_names_the_extra(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(importlib.import_module("sys").modules, "h5py", None)
    with pytest.raises(InstallationError, match=r"h5py is not installed.*extractor\[export\]"):
        export_store(store, tmp_path / "rows.h5")
    assert not list(tmp_path.glob("*rows*"))


@pytest.mark.parametrize("format", ["npy", "parquet", "clip-retrieval", "faiss", "csv", "hdf5"])
def test_maps_keep_their_values(tmp_path: Path, write_store: WriteStore, format: str) -> None:
    if format == "hdf5":
        pytest.importorskip("h5py")
    embedding = {
        "definition": "layer",
        "dim": 12,
        "shape": [3, 2, 2],
        "dtype": "float32",
        "normalized": False,
    }
    maps = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)
    store = write_store(tmp_path / "store", [maps], embedding=embedding)
    to = export_store(store, tmp_path / "to", format).path
    if format == "npy":
        np.testing.assert_array_equal(np.load(to / "features.npy"), maps)
    elif format == "parquet":
        rows = np.array(pq.read_table(to)["embedding"].to_pylist())
        np.testing.assert_array_equal(rows, maps.reshape(2, 12))
    elif format == "clip-retrieval":
        np.testing.assert_array_equal(
            np.load(to / "img_emb" / "img_emb_0.npy"), maps.reshape(2, 12)
        )


@pytest.mark.parametrize("format", ["npy", "parquet", "clip-retrieval", "faiss", "csv", "hdf5"])
def test_export_of_nothing_can_be_read(store: FeatureStore, tmp_path: Path, format: str) -> None:
    if format == "hdf5":
        pytest.importorskip("h5py")
    report = export_store(store, tmp_path / "to", format, since=store.token)
    assert report.rows == 0
    if format == "npy":
        assert np.load(tmp_path / "to" / "features.npy").shape == (0, 3)
    elif format == "parquet":
        assert pq.read_table(tmp_path / "to").num_rows == 0
    elif format == "faiss":
        faiss: Any = pytest.importorskip("faiss")
        assert faiss.read_index(str(tmp_path / "to")).ntotal == 0


@pytest.mark.parametrize("name", ["rows.json", "rows.NPZ", "a.b.tsv", "rows.csv.gz"])
def test_ending_of_another_file_is_no_folder_of_parquet(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"would be a folder of Parquet files; .* ends with .par"):
        format_for(tmp_path / name, None)
    assert format_for(tmp_path / name, "csv").name == "csv"
    assert format_for(tmp_path / "rows.v2", None).name == "parquet"


def test_npy_ending_alone_is_no_folder_of_parquet(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"rows\.npy would be a folder of Parquet files"):
        format_for(tmp_path / "rows.npy", None)
    assert format_for(tmp_path / "rows.npy", "npy").name == "npy"
