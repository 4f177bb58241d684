"""A store opens with numpy alone, maps its rows, and names what is wrong with it."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from extractor.errors import StoreError, UsageError
from extractor.reading.reader import FeatureStore
from extractor.store.claim import ClaimedFolder

WriteStore = Callable[..., Path]


@pytest.fixture
def out(tmp_path: Path, parts: list[np.ndarray], write_store: WriteStore) -> Path:
    """A finished store of 7 rows in two shards, and a failure."""
    return write_store(tmp_path / "out", parts, failures=[(b"9.jpg", "empty", "no bytes")])


@pytest.fixture
def whole(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts)


def edit(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((out / "store.json").read_text())
    change(content)
    (out / "store.json").write_text(json.dumps(content))


LAZY = """
import sys
from extractor.reading.reader import FeatureStore

heavy = ("torch", "torchvision", "timm", "PIL", "pyarrow", "pandas")

def loaded():
    return [name for name in heavy if name in sys.modules]

store = FeatureStore.open(sys.argv[1])
assert store.features[2:6].sum() + store[0].sum() > 0
assert store.failures[0]["error"] == "empty"
assert loaded() == [], loaded()
assert store.paths[0] == "0/0.jpg"
assert "pyarrow" in loaded()
assert not {"torch", "torchvision", "timm", "PIL"} & set(loaded()), loaded()
print("done")
"""


def test_reading_rows_needs_only_numpy(out: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LAZY, str(out)], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert done.stdout == "done\n"


def test_rows_equal_what_was_written(out: Path, whole: np.ndarray) -> None:
    store = FeatureStore.open(out)
    assert store.features.shape == (7, 3)
    assert store.dim == 3
    assert len(store) == 7
    assert store.features.dtype == np.float32
    assert np.array_equal(np.asarray(store.features), whole)


def test_float16_stays_float16(tmp_path: Path, write_store: WriteStore) -> None:
    rows = np.random.default_rng(1).normal(size=(5, 2)).astype(np.float16)
    store = FeatureStore.open(write_store(tmp_path / "out", [rows]))
    assert store[:].dtype == np.float16
    assert np.array_equal(store[:], rows)


def test_indexing_a_store_returns_rows(out: Path, whole: np.ndarray) -> None:
    store = FeatureStore.open(out)
    for index in (0, 6, -1, slice(1, 3), slice(2, 6), slice(None, None, -2), [6, 0, 3]):
        found = store[index]
        assert found.shape == whole[index].shape
        assert np.array_equal(found, whole[index])
    with pytest.raises(IndexError, match="row 7 is out of range for 7 rows"):
        store[7]


def test_rows_are_memory_mapped(out: Path) -> None:
    store = FeatureStore.open(out)
    for index in (0, slice(0, 4), slice(4, 7)):
        base: Any = store[index]
        while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            store[index][...] = 0


@pytest.mark.parametrize("kind", [str, Path, os.fspath])
def test_folder_may_be_str_or_path(out: Path, kind: Any) -> None:
    store = FeatureStore.open(kind(out))
    assert store.path == out
    assert len(store.paths) == 7


def test_folder_may_be_relative(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(out.parent)
    assert len(FeatureStore.open("out").paths) == 7


@pytest.mark.parametrize("name", ["size=3", "a b%20c", "s3:x", "ä", os.fsdecode(b"\xff")])
def test_folder_may_have_any_name(
    tmp_path: Path, parts: list[np.ndarray], write_store: WriteStore, name: str
) -> None:
    try:
        (tmp_path / name).mkdir()
    except OSError:
        pytest.skip("the file system does not take this name")
    store = FeatureStore.open(write_store(tmp_path / name, parts))
    assert store.features.shape == (7, 3)
    assert store.column("size") == [100, 101, 102, 103, 100, 101, 102]
    assert store.paths[4:] == ["1/0.jpg", "1/1.jpg", "1/2.jpg"]


def test_columns_match_the_rows(out: Path) -> None:
    store = FeatureStore.open(out)
    assert store.paths == [*(f"0/{row}.jpg" for row in range(4)), "1/0.jpg", "1/1.jpg", "1/2.jpg"]
    assert store.column("path") == store.paths
    assert store.column("size") == [100, 101, 102, 103, 100, 101, 102]
    assert store.column("mtime_ns")[5] == 10**18 + 1
    assert store.column("width") == [20, 21, 22, 23, 20, 21, 22]
    assert store.column("height") == [30, 31, 32, 33, 30, 31, 32]


def test_unknown_column_is_rejected(out: Path) -> None:
    with pytest.raises(UsageError, match=r"column: got 'color', expected one of path, size, .* id"):
        FeatureStore.open(out).column("color")


@pytest.mark.parametrize("root", ["/photos", "/photos/"])
def test_index_of_accepts_relative_and_full_paths(
    tmp_path: Path, parts: list[np.ndarray], write_store: WriteStore, root: str
) -> None:
    store = FeatureStore.open(write_store(tmp_path / "out", parts, root=root))
    assert store.root == root
    for row, path in enumerate(store.paths):
        for name in (path, Path(path), path.encode(), f"/photos/{path}", Path("/photos") / path):
            assert store.index_of(name) == row


def test_root_may_be_the_file_system_root(
    tmp_path: Path, parts: list[np.ndarray], write_store: WriteStore
) -> None:
    store = FeatureStore.open(write_store(tmp_path / "out", parts, root="/"))
    assert store.index_of("1/2.jpg") == store.index_of("/1/2.jpg") == 6


@pytest.mark.parametrize("name", ["9.jpg", "", "0", "/photos", "/other/0/0.jpg", "/photos0/0.jpg"])
def test_image_without_a_row_raises_key_error(out: Path, name: str) -> None:
    with pytest.raises(KeyError, match="has no row in"):
        FeatureStore.open(out).index_of(name)


def test_failures_are_listed(out: Path) -> None:
    assert FeatureStore.open(out).failures == [
        {"path": "9.jpg", "error": "empty", "message": "no bytes", "size": -1, "mtime_ns": -1}
    ]


def test_repr_names_folder_shape_and_model(out: Path) -> None:
    assert repr(FeatureStore.open(out)) == (
        f"FeatureStore({str(out)!r}: 7 x 3, timm:tiny (a1, sha256 0123456789ab))"
    )


# ---- what is wrong -------------------------------------------------------------------------------


def test_missing_or_empty_folder_is_not_a_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    reasons = {"": r" \(store.json is missing\)", "nowhere": ": there is no such folder"}
    for name, reason in {**reasons, "file": ": it is a file"}.items():
        with pytest.raises(StoreError, match=f"{tmp_path / name} is not a store{reason}"):
            FeatureStore.open(tmp_path / name)


def test_store_that_may_be_meant_is_named(
    tmp_path: Path, parts: list[np.ndarray], write_store: Callable[..., Path]
) -> None:
    for name in ("b", "a"):
        write_store(tmp_path / name, parts)
    message = f"{tmp_path} is not a store but holds 2 stores: a, b; try {tmp_path}/a"
    with pytest.raises(StoreError, match=message):
        FeatureStore.open(tmp_path)
    message = f"{tmp_path}/a/features is a part of a store; try {tmp_path}/a"
    with pytest.raises(StoreError, match=message):
        FeatureStore.open(tmp_path / "a" / "features")


def test_unfinished_store_is_reported_as_unfinished(
    tmp_path: Path, parts: list[np.ndarray], fill: Callable[..., Any]
) -> None:
    out = tmp_path / "out"
    with ClaimedFolder(out) as claim:
        fill(claim, parts)
        with pytest.raises(StoreError, match="out is not finished: a run is writing it"):
            FeatureStore.open(out)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"store\.json is not JSON"),
        (b"", r"store\.json is not JSON"),
        (b'{"format": "extractor-store", "root": "\xff"}', r"store\.json is not JSON"),
        (b"[1]", r"store\.json is not the manifest"),
        (b'{"format": "zarr"}', r"store\.json is not the manifest"),
        (
            b'{"format": "extractor-store", "version": 3}',
            "has format version 3; .*reads versions 1",
        ),
        (b'{"format": "extractor-store", "version": 1}', r"store\.json is damaged: KeyError"),
    ],
)
def test_unknown_manifest_is_rejected(out: Path, content: bytes, message: str) -> None:
    (out / "store.json").write_bytes(content)
    with pytest.raises(StoreError, match=message):
        FeatureStore.open(out)


def test_manifest_that_is_a_folder_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "store.json").mkdir()
    with pytest.raises(StoreError, match=r"cannot read .*store\.json: Is a directory"):
        FeatureStore.open(tmp_path)


@pytest.mark.parametrize("key", ["shards", "counts", "embedding", "root", "failures", "created"])
def test_store_with_an_incomplete_manifest_is_rejected(out: Path, key: str) -> None:
    edit(out, lambda content: content.pop(key))
    with pytest.raises(StoreError, match=rf"store\.json is damaged: KeyError '{key}'"):
        FeatureStore.open(out)


@pytest.mark.parametrize("name", ["features/00001.npy", "images/00000.parquet"])
def test_missing_file_is_named(out: Path, name: str) -> None:
    (out / name).unlink()
    with pytest.raises(StoreError, match=f"{name} is missing from the store"):
        FeatureStore.open(out)


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("name", ["features/00001.npy", "images/00000.parquet"])
def test_file_of_wrong_size_is_named(out: Path, name: str, change: int) -> None:
    content = (out / name).read_bytes()
    (out / name).write_bytes((content + b"\0")[: len(content) + change])
    with pytest.raises(
        StoreError, match=f"{name} has {len(content) + change} bytes, expected {len(content)}"
    ):
        FeatureStore.open(out)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 4), np.float32), r"holds \(3, 4\) float32, expected \(4, 3\) float32"),
        (np.zeros(12, np.float32), r"holds \(12,\) float32, expected \(4, 3\) float32"),
        (np.zeros((4, 3), np.int32), r"holds \(4, 3\) int32, expected \(4, 3\) float32"),
        (np.zeros((4, 6), np.float16), r"holds \(4, 6\) float16, expected \(4, 3\) float32"),
    ],
)
def test_shard_of_wrong_shape_or_type_is_rejected(
    out: Path, array: np.ndarray, message: str
) -> None:
    size = (out / "features/00000.npy").stat().st_size
    np.save(out / "features/00000.npy", array)
    assert (out / "features/00000.npy").stat().st_size == size
    with pytest.raises(StoreError, match=rf"00000\.npy {message}"):
        FeatureStore.open(out)


@pytest.mark.parametrize("start", [b"\0" * 128, b"PK\x03\x04", b"\x80\x04"], ids=repr)
def test_shard_that_is_not_npy_is_rejected(out: Path, start: bytes) -> None:
    name = out / "features/00000.npy"
    name.write_bytes(start + name.read_bytes()[len(start) :])
    with pytest.raises(StoreError, match=r"00000\.npy is damaged"):
        FeatureStore.open(out)


def test_damaged_header_raises_only_store_error(out: Path, whole: np.ndarray) -> None:
    name = out / "features/00000.npy"
    good = name.read_bytes()
    refused = 0
    for offset in range(128):
        for value in (0, ord("("), ord("'"), ord("#"), 0xFF):
            name.write_bytes(good[:offset] + bytes([value]) + good[offset + 1 :])
            try:
                store = FeatureStore.open(out)
            except StoreError as error:
                assert "00000.npy" in str(error)  # noqa: PT017
                refused += 1
            else:  # a change that means nothing, such as one in the padding
                assert np.array_equal(store.features, whole)
    assert refused > 250


def test_index_that_is_not_parquet_is_rejected(out: Path) -> None:
    name = out / "images/00001.parquet"
    name.write_bytes(b"\0" * name.stat().st_size)
    store = FeatureStore.open(out)
    assert store[0].shape == (3,)
    with pytest.raises(StoreError, match=r"images/00001\.parquet cannot be read: .*[Pp]arquet"):
        store.paths  # noqa: B018


def test_index_of_wrong_length_is_rejected(out: Path) -> None:
    name = out / "images/00000.parquet"
    pq.write_table(pq.ParquetFile(name).read().slice(0, 3), name)

    def adapt(content: dict[str, Any]) -> None:
        content["shards"][0]["index"]["bytes"] = name.stat().st_size

    edit(out, adapt)
    with pytest.raises(StoreError, match=r"00000\.parquet has 3 rows, expected 4"):
        FeatureStore.open(out).paths  # noqa: B018


def test_missing_failures_file_is_named(out: Path) -> None:
    store = FeatureStore.open(out)
    (out / "failures.jsonl").unlink()
    with pytest.raises(StoreError, match=r"failures\.jsonl is missing"):
        store.failures  # noqa: B018


# ---- a store that is replaced --------------------------------------------------------------------


def test_store_replaced_after_opening_returns_no_paths(
    out: Path, whole: np.ndarray, parts: list[np.ndarray], write_store: WriteStore
) -> None:
    store = FeatureStore.open(out)
    write_store(out, [part + 100 for part in parts], overwrite=True)
    for ask in (lambda: store.paths, lambda: store.column("size"), lambda: store.failures):
        with pytest.raises(
            StoreError, match=r"was replaced or removed since it was opened; .*call reopen"
        ):
            ask()
    # The rows that were mapped stay what they were.
    assert np.array_equal(np.asarray(store.features), whole)
    assert np.array_equal(np.asarray(FeatureStore.open(out).features), whole + 100)


def test_paths_read_before_a_replacement_stay(
    out: Path, parts: list[np.ndarray], write_store: WriteStore
) -> None:
    store = FeatureStore.open(out)
    assert store.index_of("1/2.jpg") == 6
    write_store(out, parts[1:], overwrite=True)
    assert store.index_of("1/2.jpg") == 6
    assert len(store.paths) == len(store) == 7


def test_store_removed_after_opening_returns_no_paths(out: Path) -> None:
    store = FeatureStore.open(out)
    (out / "store.json").unlink()
    with pytest.raises(StoreError, match="replaced or removed since it was opened"):
        store.paths  # noqa: B018


@pytest.mark.parametrize("shard", [0, 1])
def test_store_replaced_during_opening_is_never_mixed(
    out: Path,
    whole: np.ndarray,
    parts: list[np.ndarray],
    write_store: WriteStore,
    monkeypatch: pytest.MonkeyPatch,
    shard: int,
) -> None:
    plain_open = builtins.open
    moments: list[Any] = []

    def late(file: Any, *args: Any, **options: Any) -> Any:
        if str(file).endswith(f"{shard:05d}.npy") and not moments:
            moments.append(file)
            write_store(out, [part + 100 for part in parts], overwrite=True)
        return plain_open(file, *args, **options)

    monkeypatch.setattr(builtins, "open", late)
    try:
        store = FeatureStore.open(out)
    except StoreError as error:
        assert "replaced" in str(error)  # noqa: PT017
    else:  # it may have begun again
        assert np.array_equal(np.asarray(store.features), whole + 100)
        assert len(store.paths) == 7
    assert len(moments) == 1


def test_store_removed_during_opening_is_rejected(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_open = builtins.open

    def late(file: Any, *args: Any, **options: Any) -> Any:
        if str(file).endswith("00001.npy"):
            (out / "store.json").unlink(missing_ok=True)  # what a writer does first
        return plain_open(file, *args, **options)

    monkeypatch.setattr(builtins, "open", late)
    with pytest.raises(StoreError, match=r"is not a store .store.json is missing"):
        FeatureStore.open(out)


def test_store_replaced_during_reading_is_never_mixed(
    out: Path, parts: list[np.ndarray], write_store: WriteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet_file = pq.ParquetFile
    new = [[b"0/%d.new" % row for row in range(4)], [b"1/%d.new" % row for row in range(3)]]
    old = FeatureStore.open(out).paths
    store = FeatureStore.open(out)
    calls = []

    def late(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            write_store(out, parts, names=new, overwrite=True)
        return parquet_file(*args, **options)

    monkeypatch.setattr(pq, "ParquetFile", late)
    try:
        assert store.paths == old
    except StoreError as error:
        assert "replaced or removed since it was opened" in str(error)  # noqa: PT017
    assert len(calls) == 2


def test_manifest_that_is_a_fifo_is_refused(
    tmp_path: Path, write_store: Callable[..., Path]
) -> None:
    out = write_store(tmp_path / "out", [np.eye(3, dtype=np.float32)])
    (out / "store.json").unlink()
    os.mkfifo(out / "store.json")
    with pytest.raises(StoreError, match="not a regular file"):
        FeatureStore.open(out)
