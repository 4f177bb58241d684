"""A store is published whole or not at all, and its bytes are those that the format promises."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import extractor.store.writer as writer_module
from extractor.errors import StoreError
from extractor.store.claim import ClaimedFolder
from extractor.store.failures import FailureRecord
from extractor.store.format import STAGING, Description
from extractor.store.index import ImageRecord
from extractor.store.job import Job
from extractor.store.publish import finish_publishing, publish_staged
from extractor.store.reader import FeatureStore
from extractor.store.writer import InterruptedRun, StoreRun, rewrite, take_up

Tree = Callable[[Path], dict[str, "bytes | None"]]
Checked = Callable[[Path], "np.ndarray | None"]
Fill = Callable[..., StoreRun]
WriteStore = Callable[..., Path]
MakeRecords = Callable[..., list[ImageRecord]]


def saved(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


@pytest.fixture
def fixed_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every store is made at the same instant."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            assert tz is timezone.utc
            return datetime(2024, 1, 2, 3, 4, 5, 678, tz)

    monkeypatch.setattr(writer_module, "datetime", Clock)


# ---- the files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (2, 3), (9, 10), (10, 999), (101, 1000)])
def test_a_shard_has_the_bytes_that_numpy_saves(
    tmp_path: Path, write_store: WriteStore, dtype: str, rows: int, dim: int
) -> None:
    whole = np.random.default_rng(3).normal(size=(rows, dim)).astype(dtype)
    write_store(tmp_path / "out", [whole])
    assert (tmp_path / "out/features/00000.npy").read_bytes() == saved(whole)


def test_rows_of_another_type_or_layout_are_cast_as_numpy_casts(
    tmp_path: Path, describe_store: Callable[..., Description], make_records: MakeRecords
) -> None:
    rows = np.random.default_rng(4).normal(size=(3, 4))
    with ClaimedFolder(tmp_path / "out") as claim:
        run = rewrite(claim, Job(describe_store(dim=3, dtype="float16"), 6, "0" * 64))
        with run.shard(0) as shard:
            shard.append(rows.T, make_records([b"a", b"b", b"c", b"d"]))  # Fortran order, float64
            shard.append(rows.T[:0], [])
            shard.append(rows.T[::-2].astype(">f4"), make_records([b"e", b"f"]))
            shard.finish()
        run.publish()
    expected = np.ascontiguousarray(np.concatenate([rows.T, rows.T[::-2]]), np.float16)
    assert (tmp_path / "out/features/00000.npy").read_bytes() == saved(expected)


def test_the_header_has_one_length_for_every_number_of_rows(
    tmp_path: Path, write_store: WriteStore
) -> None:
    starts = set()
    for rows in (1, 9, 10, 999, 10_000):
        out = write_store(tmp_path / str(rows), [np.zeros((rows, 1), np.float16)])
        starts.add((out / "features/00000.npy").stat().st_size - rows * 2)
    assert starts == {128}


def test_rows_that_do_not_fit_their_records_are_refused(
    tmp_path: Path, describe_store: Callable[..., Description], make_records: MakeRecords
) -> None:
    with (
        ClaimedFolder(tmp_path / "out") as claim,
        rewrite(claim, Job(describe_store(dim=3), 1, "0" * 64)).shard(0) as shard,
    ):
        with pytest.raises(
            ValueError, match=r"got rows of shape \(2, 3\) for 1 records of shape \(3,\)"
        ):
            shard.append(np.zeros((2, 3), np.float32), make_records([b"a"]))
        with pytest.raises(
            ValueError, match=r"got rows of shape \(1, 4\) for 1 records of shape \(3,\)"
        ):
            shard.append(np.zeros((1, 4), np.float32), make_records([b"a"]))


GOLDEN_FEATURES = (
    # magic, version 1.0, length of the header that follows: 0x0076 = 118
    b"\x93NUMPY\x01\x00\x76\x00"
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }"
    + b" " * 58
    + b"\n"
    + bytes.fromhex("00000000 0000803f 000000c0 0000003f 00007f47 cdcccc3d")
)

GOLDEN_MANIFEST = """\
{
  "format": "extractor-store",
  "version": 1,
  "created": "2024-01-02T03:04:05+00:00",
  "backbone": {
    "model": "timm:tiny",
    "tag": "a1",
    "sha256": "0123456789abcdef"
  },
  "embedding": {
    "definition": "pre-logits",
    "dim": 3,
    "shape": [
      3
    ],
    "dtype": "float32",
    "normalised": false
  },
  "preprocess": {
    "size": [
      8,
      8
    ]
  },
  "computation": {
    "precision": "float32",
    "device": "cpu",
    "batch_size": 2
  },
  "root": "/K\\u00e4se/\\udcff",
  "shard_images": 4,
  "software": {
    "extractor": "0.0.0"
  },
  "counts": {
    "images": 3,
    "rows": 2,
    "failures": 1,
    "retired": 0
  },
  "listing": "0000000000000000000000000000000000000000000000000000000000000000",
  "shards": [
    {
      "shard": 0,
      "images": 2,
      "rows": 2,
      "features": {
        "name": "features/00000.npy",
        "bytes": 152,
        "sha256": "FEATURES_SHA256"
      },
      "index": {
        "name": "images/00000.parquet",
        "bytes": INDEX_BYTES,
        "sha256": "INDEX_SHA256"
      },
      "retired": ""
    }
  ],
  "failures": {
    "name": "failures.jsonl",
    "bytes": 60,
    "sha256": "FAILURES_SHA256"
  },
  "checksum": ""
}
"""

GOLDEN_FAILURES = (
    b'{"path": "b\\udcff.jpg", "error": "empty", "message": "0 \\u00b5", '
    b'"size": -1, "mtime_ns": -1}\n'
)


@pytest.mark.usefixtures("fixed_time")
def test_the_bytes_of_a_store_do_not_change(tmp_path: Path, write_store: WriteStore) -> None:
    rows = np.array([[0, 1, -2], [0.5, 65280, 0.1]], np.float32)
    out = write_store(
        tmp_path / "out",
        [rows],
        root="/Käse/\udcff",
        failures=[(b"b\xff.jpg", "empty", "0 µ")],
    )
    index = (out / "images/00000.parquet").read_bytes()  # its bytes are up to pyarrow
    manifest = (
        GOLDEN_MANIFEST.replace("FEATURES_SHA256", hashlib.sha256(GOLDEN_FEATURES).hexdigest())
        .replace("INDEX_BYTES", str(len(index)))
        .replace("INDEX_SHA256", hashlib.sha256(index).hexdigest())
        .replace("FAILURES_SHA256", hashlib.sha256(GOLDEN_FAILURES).hexdigest())
        .replace('"bytes": 60', f'"bytes": {len(GOLDEN_FAILURES)}')
    )
    assert (out / "features/00000.npy").read_bytes() == GOLDEN_FEATURES
    assert (out / "failures.jsonl").read_bytes() == GOLDEN_FAILURES
    digest = hashlib.sha256(manifest.encode()).hexdigest()
    manifest = manifest.replace('"checksum": ""', f'"checksum": "{digest}"')
    assert (out / "store.json").read_bytes().decode("ascii") == manifest


def test_the_index_has_columns_of_fixed_types(
    tmp_path: Path, parts: list[np.ndarray], write_store: WriteStore
) -> None:
    out = write_store(tmp_path / "out", parts[:1])
    table = pq.ParquetFile(out / "images/00000.parquet").read()
    assert table.schema.names == ["path", "size", "mtime_ns", "width", "height", "sha256"]
    kinds = [pa.string(), pa.int64(), pa.int64(), pa.int32(), pa.int32(), pa.binary(32)]
    assert table.schema.types == kinds
    assert table.to_pydict() == {
        "path": ["0/0.jpg", "0/1.jpg", "0/2.jpg", "0/3.jpg"],
        "size": [100, 101, 102, 103],
        "mtime_ns": [10**18, 10**18 + 1, 10**18 + 2, 10**18 + 3],
        "width": [20, 21, 22, 23],
        "height": [30, 31, 32, 33],
        "sha256": [hashlib.sha256(b"x" * size).digest() for size in (100, 101, 102, 103)],
    }


def test_names_that_are_no_utf8_come_back_unchanged(
    tmp_path: Path, parts: list[np.ndarray], write_store: WriteStore
) -> None:
    names = [[b"a/\xff.jpg", b"b/\xc3\xa4.jpg", b"c\\d", b"d\n"], [b"e", "\u00e9".encode(), b"g g"]]
    out = write_store(tmp_path / "out", parts, names=names, root="/photos/\udcfe")
    kinds = [pq.read_schema(out / f"images/{n:05d}.parquet").field("path").type for n in range(2)]
    assert kinds == [pa.binary(), pa.string()]
    store = FeatureStore.open(out)
    flat = list(itertools.chain.from_iterable(names))
    assert [os.fsencode(path) for path in store.paths] == flat
    for row, name in enumerate(flat):
        assert store.index_of(name) == row
        assert store.index_of(os.fsdecode(name)) == row
        assert store.index_of(b"/photos/\xfe/" + name) == row


def test_failures_are_one_json_object_a_line_in_the_order_of_their_paths(
    tmp_path: Path, parts: list[np.ndarray], write_store: WriteStore
) -> None:
    failures = [
        (b"z.jpg", "truncated", "got 3 bytes\nexpected 9", 3, 10**18),
        (b"a\xff.jpg", "not-an-image", "a \u201ctext\u201d"),
    ]
    out = write_store(tmp_path / "out", parts, failures=failures)
    content = (out / "failures.jsonl").read_bytes()
    assert content.isascii()
    lines = [json.loads(line) for line in content.split(b"\n")[:-1]]
    assert content.endswith(b"\n")
    assert lines == [
        {
            "path": "a\udcff.jpg",
            "error": "not-an-image",
            "message": "a \u201ctext\u201d",
            "size": -1,
            "mtime_ns": -1,
        },
        {
            "path": "z.jpg",
            "error": "truncated",
            "message": "got 3 bytes\nexpected 9",
            "size": 3,
            "mtime_ns": 10**18,
        },
    ]
    assert FeatureStore.open(out).failures == lines


def test_a_store_without_rows_is_a_store(
    tmp_path: Path, write_store: WriteStore, tree: Tree
) -> None:
    out = write_store(tmp_path / "out", [])
    assert set(tree(out)) == {"failures.jsonl", "features", "images", "store.json"}
    store = FeatureStore.open(out)
    assert store.features.shape == (0, 3)
    assert store.paths == []
    assert store.failures == []


def test_a_shard_without_rows_has_no_file_and_leaves_a_gap(
    tmp_path: Path,
    parts: list[np.ndarray],
    describe_store: Callable[..., Description],
    tree: Tree,
    make_records: MakeRecords,
) -> None:
    out = tmp_path / "out"
    with ClaimedFolder(out) as claim:
        run = rewrite(claim, Job(describe_store(), 12, "0" * 64))
        for number, part in enumerate([parts[0], parts[0][:0], parts[1]]):
            with run.shard(number) as shard:
                failures = [FailureRecord(b"bad", "empty", "")] * (4 - len(part))
                names = [b"%d" % row for row in range(len(part))]
                shard.append(part, make_records(names), failures)
                entry = shard.finish()
                assert (entry is None) == (number == 1)
        manifest = run.publish()
    assert [(s.shard, s.images, s.rows) for s in manifest.shards] == [(0, 4, 4), (2, 4, 3)]
    assert (manifest.images, manifest.rows, manifest.failed) == (12, 7, 5)
    assert sorted(name for name in tree(out) if "/" in name) == [
        "features/00000.npy",
        "features/00002.npy",
        "images/00000.parquet",
        "images/00002.parquet",
    ]
    assert np.array_equal(FeatureStore.open(out).features, np.concatenate(parts))


def test_a_shard_that_was_not_finished_is_not_in_the_store(
    tmp_path: Path, parts: list[np.ndarray], fill: Fill, make_records: MakeRecords, tree: Tree
) -> None:
    out = tmp_path / "out"
    with ClaimedFolder(out) as claim:
        run = fill(claim, parts[:1])
        with run.shard(1) as shard:
            shard.append(parts[1], make_records([b"a", b"b", b"c"]))
        run.publish()
    assert [name for name in tree(out) if name.startswith("features/")] == ["features/00000.npy"]
    assert len(FeatureStore.open(out)) == 4


def test_the_manifest_agrees_with_the_files(
    tmp_path: Path, parts: list[np.ndarray], write_store: WriteStore, tree: Tree
) -> None:
    out = write_store(tmp_path / "out", parts, failures=[(b"x", "empty", "no bytes")])
    manifest = json.loads((out / "store.json").read_bytes())
    entries = [shard[kind] for shard in manifest["shards"] for kind in ("features", "index")]
    entries.append(manifest["failures"])
    files = {name: content for name, content in tree(out).items() if content is not None}
    del files["store.json"]
    assert sorted(entry["name"] for entry in entries) == sorted(files)
    for entry in entries:
        content = files[entry["name"]]
        assert entry["bytes"] == len(content)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()


def test_created_is_the_time_of_publishing_in_utc(
    tmp_path: Path, parts: list[np.ndarray], write_store: WriteStore
) -> None:
    before = datetime.now(timezone.utc).replace(microsecond=0)
    out = write_store(tmp_path / "out", parts)
    created = datetime.fromisoformat(FeatureStore.open(out).manifest.created)
    assert before <= created <= datetime.now(timezone.utc)
    assert created.utcoffset() is not None


def test_the_same_rows_make_the_same_files(
    tmp_path: Path, parts: list[np.ndarray], write_store: WriteStore, tree: Tree
) -> None:
    one, two = (tree(write_store(tmp_path / name, parts)) for name in ("one", "two"))
    del one["store.json"], two["store.json"]  # has the time in it
    assert one == two


# ---- publishing ----------------------------------------------------------------------------------


def test_nothing_but_a_hidden_folder_is_seen_before_publish(
    tmp_path: Path, parts: list[np.ndarray], fill: Fill, tree: Tree
) -> None:
    out = tmp_path / "out"
    with ClaimedFolder(out) as claim:
        assert os.listdir(out) == [STAGING]
        run = fill(claim, parts, failures=[(b"x", "empty", "")])
        assert os.listdir(out) == [STAGING]
        assert STAGING.startswith(".")
        run.publish()
    assert sorted(os.listdir(out)) == ["failures.jsonl", "features", "images", "store.json"]
    assert not [name for name in tree(out) if "partial" in name]


@pytest.mark.parametrize("there", ["", "a", "a/b/out"])
def test_leaving_without_publish_leaves_what_was_not_there_absent(
    tmp_path: Path, parts: list[np.ndarray], fill: Fill, tree: Tree, there: str
) -> None:
    (tmp_path / there).mkdir(parents=True, exist_ok=True)
    before = tree(tmp_path)
    with ClaimedFolder(tmp_path / "a/b/out") as claim:
        fill(claim, parts, failures=[(b"x", "empty", "")])
    assert tree(tmp_path) == before


def test_an_error_before_publish_passes_through_and_leaves_nothing(
    tmp_path: Path, parts: list[np.ndarray], fill: Fill, tree: Tree
) -> None:
    def stopped() -> None:
        with ClaimedFolder(tmp_path / "a/out") as claim:
            fill(claim, parts)
            raise KeyError("stopped")

    with pytest.raises(KeyError, match="stopped"):
        stopped()
    assert tree(tmp_path) == {}


def test_leaving_without_publish_leaves_the_old_store_intact(
    tmp_path: Path, parts: list[np.ndarray], fill: Fill, write_store: WriteStore, tree: Tree
) -> None:
    out = write_store(tmp_path / "out", parts)
    before = tree(out)
    with ClaimedFolder(out, overwrite=True) as claim:
        run = fill(claim, [parts[1] + 1], failures=[(b"x", "empty", "")])
        now = tree(out)
        assert {name: now[name] for name in before} == before
        assert {name.split("/")[0] for name in set(now) - set(before)} == {STAGING}
        assert np.array_equal(FeatureStore.open(out).features, np.concatenate(parts))
    assert run.job.images == 4
    assert tree(out) == before


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_an_overwrite_leaves_the_new_store_and_no_stale_files(
    tmp_path: Path,
    parts: list[np.ndarray],
    write_store: WriteStore,
    checked: Checked,
    tree: Tree,
    count: int,
) -> None:
    out = write_store(tmp_path / "out", [*parts, parts[0]])
    new = [np.full((2, 3), number, np.float32) for number in range(count)]
    write_store(out, new, overwrite=True)
    assert np.array_equal(checked(out), np.concatenate([*new, np.empty((0, 3))]))
    expected = {"failures.jsonl", "features", "images", "store.json"}
    for number in range(count):
        expected |= {f"features/{number:05d}.npy", f"images/{number:05d}.parquet"}
    assert set(tree(out)) == expected


def test_an_overwrite_leaves_foreign_files_alone(
    tmp_path: Path, parts: list[np.ndarray], write_store: WriteStore, checked: Checked, tree: Tree
) -> None:
    out = write_store(tmp_path / "out", parts)
    foreign = {"notes.txt": b"mine", "deep/er/x.npy": b"\x00"}
    for name, content in foreign.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    write_store(out, parts[:1], overwrite=True)
    assert np.array_equal(checked(out), parts[0])
    now = tree(out)
    assert {name: now[name] for name in foreign} == foreign


@pytest.mark.parametrize("name", ["features/mine.npy", "images/00007.parquet", "features/a/b"])
def test_a_store_with_foreign_files_in_its_folders_is_not_replaced(
    tmp_path: Path, parts: list[np.ndarray], write_store: WriteStore, tree: Tree, name: str
) -> None:
    out = write_store(tmp_path / "out", parts)
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_bytes(b"mine")
    before = tree(out)
    with pytest.raises(StoreError, match="holds files that are not part of the store"):
        write_store(out, parts[:1], overwrite=True)
    assert tree(out) == before


def test_foreign_files_that_come_while_a_run_works_stop_it_from_publishing(
    tmp_path: Path,
    parts: list[np.ndarray],
    write_store: WriteStore,
    tree: Tree,
    describe_store: Callable[..., Description],
) -> None:
    out = write_store(tmp_path / "out", parts)
    before = tree(out)
    with ClaimedFolder(out, overwrite=True) as claim:
        run = rewrite(claim, Job(describe_store(), 0, "0" * 64))
        (out / "features" / "00009.npy").write_bytes(b"mine")
        before["features/00009.npy"] = b"mine"
        with pytest.raises(StoreError, match=r"not part of the store \(features/00009\.npy\)"):
            run.publish()
    assert tree(out) == before


@pytest.mark.parametrize("folder", ["features", ".extractor-partial"])
def test_no_link_is_written_or_cleared_through(
    tmp_path: Path, parts: list[np.ndarray], write_store: WriteStore, tree: Tree, folder: str
) -> None:
    out = write_store(tmp_path / "out", parts)
    if (out / folder).exists():
        (out / folder).rename(tmp_path / "outside")
    else:
        (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "00000.npy").write_bytes(b"mine")
    (out / folder).symlink_to(tmp_path / "outside")
    before = tree(tmp_path / "outside")
    with pytest.raises(
        StoreError, match=r"is a link, expected|was not left by a run of this program"
    ):
        write_store(out, parts[:1], overwrite=True)
    assert tree(tmp_path / "outside") == before


def test_a_staging_folder_that_is_not_ours_is_left_alone(
    tmp_path: Path, parts: list[np.ndarray], write_store: WriteStore, tree: Tree
) -> None:
    (tmp_path / "out" / ".extractor-partial").mkdir(parents=True)
    (tmp_path / "out" / ".extractor-partial" / "mine").write_bytes(b"mine")
    with pytest.raises(StoreError, match="was not left by a run of this program"):
        write_store(tmp_path / "out", parts)
    assert tree(tmp_path / "out")[".extractor-partial/mine"] == b"mine"


def test_a_link_that_leads_nowhere_is_no_place_for_a_store(
    tmp_path: Path, parts: list[np.ndarray], write_store: WriteStore
) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="is a broken link"):
        write_store(tmp_path / "out", parts)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_store_appears_comes_too_late(
    tmp_path: Path,
    parts: list[np.ndarray],
    write_store: WriteStore,
    checked: Checked,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    out = write_store(tmp_path / "out", parts)
    replace = os.replace

    def signalled(source: Path, target: Path) -> None:
        if Path(source).name == "store.json":
            signal.raise_signal(number)
        replace(source, target)

    handler = signal.getsignal(number)
    monkeypatch.setattr(os, "replace", signalled)
    write_store(out, parts[:1], overwrite=True)
    assert np.array_equal(checked(out), parts[0])
    assert signal.getsignal(number) is handler
    assert not (out / ".extractor-partial").exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["notes.txt", "features/00000.npy", ".hidden"])
def test_a_folder_with_other_files_is_refused_and_untouched(
    tmp_path: Path, tree: Tree, name: str, overwrite: bool
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"mine")
    before = tree(tmp_path)
    with pytest.raises(StoreError, match=r"is not empty and holds no store; .*another --out"):
        ClaimedFolder(tmp_path, overwrite=overwrite).__enter__()
    assert tree(tmp_path) == before


def test_an_empty_folder_is_taken(
    tmp_path: Path, parts: list[np.ndarray], write_store: WriteStore, checked: Checked
) -> None:
    write_store(tmp_path, parts)
    assert np.array_equal(checked(tmp_path), np.concatenate(parts))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_the_place_of_the_store_is_refused(
    tmp_path: Path, tree: Tree, overwrite: bool
) -> None:
    (tmp_path / "out").write_bytes(b"mine")
    with pytest.raises(StoreError, match="out is a file, expected a folder"):
        ClaimedFolder(tmp_path / "out", overwrite=overwrite).__enter__()
    with pytest.raises(StoreError, match=r"out is a file, expected a folder"):
        ClaimedFolder(tmp_path / "out/deeper/still", overwrite=overwrite).__enter__()
    assert tree(tmp_path) == {"out": b"mine"}


def test_a_finished_store_is_not_replaced_unasked(
    tmp_path: Path, parts: list[np.ndarray], write_store: WriteStore, tree: Tree
) -> None:
    out = write_store(tmp_path / "out", parts)
    before = tree(out)
    with pytest.raises(
        StoreError,
        match=r"finished store: 7 rows of timm:tiny \(a1, sha256 0123456789ab\); .*--overwrite",
    ):
        ClaimedFolder(out).__enter__()
    assert tree(out) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"format": "extractor-store", "version": 2}', "has format version 2; .*reads version 1"),
        (b'{"format": "other"}', "is not the manifest of a store"),
        (b"{", "is not JSON"),
    ],
)
def test_a_manifest_that_is_not_understood_is_not_replaced(
    tmp_path: Path, tree: Tree, content: bytes, message: str, overwrite: bool
) -> None:
    (tmp_path / "store.json").write_bytes(content)
    with pytest.raises(StoreError, match=message):
        ClaimedFolder(tmp_path, overwrite=overwrite).__enter__()
    assert tree(tmp_path) == {"store.json": content}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_may_not_be_written_is_refused(tmp_path: Path, tree: Tree) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StoreError, match=r"cannot write the store .*Permission denied"):
            ClaimedFolder(tmp_path / "a/out").__enter__()
        assert tree(tmp_path) == {}
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("failing", ["b", STAGING, "features"])
def test_folders_that_were_made_go_again_when_one_cannot_be_made(
    tmp_path: Path,
    tree: Tree,
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
    parts: list[np.ndarray],
    fill: Fill,
) -> None:
    mkdir = Path.mkdir

    def full(path: Path, *args: Any, **options: Any) -> None:
        if path.name == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        mkdir(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", full)
    with (
        pytest.raises(StoreError, match=r"cannot write the store .*No space left on device"),
        ClaimedFolder(tmp_path / "a/b") as claim,
    ):
        fill(claim, parts)
    assert tree(tmp_path) == {}


def test_what_a_dead_run_left_is_cleared(
    tmp_path: Path, parts: list[np.ndarray], write_store: WriteStore, checked: Checked, tree: Tree
) -> None:
    out = tmp_path / "out"
    for name in ("lock", "features/00000.npy", "features/00001.npy.partial", "store.json.partial"):
        (out / STAGING / name).parent.mkdir(parents=True, exist_ok=True)
        (out / STAGING / name).write_bytes(b"half")
    write_store(out, parts[:1])
    assert np.array_equal(checked(out), parts[0])
    assert not (out / STAGING).exists()


# ---- no room -------------------------------------------------------------------------------------


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 64 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("dim", [3, 4096])  # fails when the buffer is flushed, or at once
def test_a_shard_that_cannot_be_written_leaves_the_old_store(
    tmp_path: Path,
    parts: list[np.ndarray],
    write_store: WriteStore,
    tree: Tree,
    small_files: None,
    dim: int,
) -> None:
    out = write_store(tmp_path / "out", parts)
    before = tree(out)
    too_big = np.zeros((2**16 // (4 * dim) + 1, dim), np.float32)
    with pytest.raises(StoreError, match=r"cannot write the store .*out: File too large"):
        write_store(out, [parts[0], too_big] if dim == 3 else [too_big], overwrite=True)
    assert tree(out) == before
    with pytest.raises(StoreError, match=r"cannot write the store .*new: File too large"):
        write_store(tmp_path / "new", [too_big])
    assert not (tmp_path / "new").exists()


def test_failures_that_cannot_be_written_leave_the_old_store(
    tmp_path: Path, parts: list[np.ndarray], write_store: WriteStore, tree: Tree, small_files: None
) -> None:
    out = write_store(tmp_path / "out", parts)
    before = tree(out)
    failures = [(b"x", "empty", "m" * 2**10)] * 70
    with pytest.raises(StoreError, match=r"cannot write the store .*File too large"):
        write_store(out, parts, failures=failures, overwrite=True)
    assert tree(out) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB, where the user may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("cannot mount a file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_leaves_the_old_store(
    small_disk: Path, parts: list[np.ndarray], write_store: WriteStore, tree: Tree
) -> None:
    out = write_store(small_disk / "out", parts)
    before = tree(small_disk)
    with pytest.raises(StoreError, match=r"cannot write the store .*No space left on device"):
        write_store(out, [np.zeros((200, 300), np.float32)], overwrite=True)
    assert tree(small_disk) == before
    write_store(out, parts[:1], overwrite=True)
    assert len(FeatureStore.open(out)) == 4


# ---- dying ---------------------------------------------------------------------------------------

DIED = 77
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


def in_child(action: Callable[[], object], at_step: Callable[[int], None]) -> bool:
    """Run ``action`` in a process of its own; True if ``at_step`` made it exit with ``DIED``.

    ``at_step`` is called with 1, 2, 3, ... before each step that changes the file system. The
    process shares no memory with ours, so nothing of ours is cleaned up by accident.
    """
    child = os.fork()
    if child == 0:
        try:
            steps = itertools.count(1)
            fsync = os.fsync

            def hook(event: str, arguments: tuple[Any, ...]) -> None:
                written = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
                if written or event in CHANGES:
                    at_step(next(steps))

            def synced(descriptor: int) -> None:
                at_step(next(steps))
                fsync(descriptor)

            os.fsync = synced
            sys.addaudithook(hook)
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, DIED)
    return code == DIED


def die(when: int) -> Callable[[int], None]:
    def at_step(step: int) -> None:
        if step == when:
            os._exit(DIED)

    return at_step


def abandon(claim: ClaimedFolder) -> None:
    """Release a folder as the kernel does when the process dies."""
    assert claim._lock._descriptor is not None
    os.close(claim._lock._descriptor)


def ready_run(out: Path, fill: Fill, parts: list[np.ndarray]) -> tuple[ClaimedFolder, StoreRun]:
    claim = ClaimedFolder(out, overwrite=True)
    claim.__enter__()
    return claim, fill(claim, parts, failures=[(b"x", "empty", "no bytes")])


def leave(out: Path) -> None:
    """What the next run does first, and no more."""
    with ClaimedFolder(out, overwrite=True):
        pass


OLD = {
    "no old store": [],
    "old store": [4, 3, 2],  # begins with shards of the same shape as the new one
}


@pytest.fixture(params=OLD.values(), ids=OLD.keys())
def old(request: pytest.FixtureRequest) -> list[np.ndarray]:
    """Shards of the old store; no number of theirs is in the new one."""
    return [np.full((rows, 3), -1 - rows, np.float32) for rows in request.param]


def place_with(out: Path, template: Path) -> Path:
    if template.exists():
        shutil.copytree(template, out)
    return out


def is_same(found: np.ndarray | None, shards: list[np.ndarray]) -> bool:
    if found is None or not shards:
        return found is None and not shards
    return np.array_equal(found, np.concatenate(shards))


def names_of(shards: list[np.ndarray]) -> set[str]:
    names = {"failures.jsonl", "features", "images", "store.json"} if shards else set()
    for number in range(len(shards)):
        names |= {f"features/{number:05d}.npy", f"images/{number:05d}.parquet"}
    return names


def test_a_crash_at_any_step_of_publish_leaves_one_whole_store(
    tmp_path: Path,
    old: list[np.ndarray],
    parts: list[np.ndarray],
    fill: Fill,
    tree: Tree,
    write_store: WriteStore,
    checked: Checked,
) -> None:
    template = tmp_path / "template"
    if old:
        write_store(template, old)
    outcomes = []
    for when in itertools.count(1):
        out = place_with(tmp_path / str(when), template)
        claim, run = ready_run(out, fill, parts)

        def publish_and_leave(claim: ClaimedFolder = claim, run: StoreRun = run) -> None:
            run.publish()
            claim.__exit__(None, None, None)

        died = in_child(publish_and_leave, die(when))
        abandon(claim)

        found = checked(out)
        is_new, is_old = is_same(found, parts), is_same(found, old)
        staged = (out / STAGING / "store.json").is_file()
        assert is_new or (is_old and not staged), when  # a reader always finds one of them
        outcomes.append((died, staged, is_new))
        expected = parts if staged or is_new else old

        copy = place_with(tmp_path / f"{when} copy", out)
        publish_staged(copy)
        assert is_same(checked(copy), expected), when
        leave(out)
        assert is_same(checked(out), expected), when
        assert set(tree(out)) == names_of(expected), when
        if not died:
            break
    # All three stages were met, in this order, and then the work was done.
    assert len(outcomes) > 20
    assert [stage for stage, _ in itertools.groupby(outcomes)] == [
        (True, False, False),
        (True, True, True),
        (True, False, True),
        (False, False, True),
    ]


def test_publish_writes_no_file_under_its_final_name(
    tmp_path: Path, parts: list[np.ndarray], fill: Fill, checked: Checked
) -> None:
    claim, run = ready_run(tmp_path / "out", fill, parts)
    written: list[str] = []  # in the child

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR):
            written.append(os.fspath(args[0]))

    def publish() -> None:
        sys.addaudithook(watch)
        run.publish()
        names = ["failures.jsonl.partial", "store.json.partial"]
        if written == [str(tmp_path / "out" / STAGING / name) for name in names]:
            os._exit(DIED)

    assert in_child(publish, lambda step: None)
    abandon(claim)
    assert is_same(checked(tmp_path / "out"), parts)


def test_a_crash_at_any_step_of_the_recovery_leaves_one_whole_store(
    tmp_path: Path,
    old: list[np.ndarray],
    parts: list[np.ndarray],
    fill: Fill,
    tree: Tree,
    write_store: WriteStore,
    checked: Checked,
) -> None:
    template = tmp_path / "template"
    if old:
        write_store(template, old)
    claim, run = ready_run(template, fill, parts)

    def stop_when_staged(step: int) -> None:
        if (template / STAGING / "store.json").is_file():
            os._exit(DIED)

    assert in_child(lambda: run.publish(), stop_when_staged)
    abandon(claim)
    assert is_same(checked(template), parts)

    for when in itertools.count(1):
        out = place_with(tmp_path / str(when), template)
        died = in_child(lambda out=out: leave(out), die(when))
        found = checked(out)
        assert is_same(found, parts)
        leave(out)
        assert is_same(checked(out), parts), when
        assert set(tree(out)) == names_of(parts), when
        if not died:
            break
    assert when > 20


def test_a_crash_at_any_step_before_the_first_shard_changes_nothing(
    tmp_path: Path, old: list[np.ndarray], write_store: WriteStore, checked: Checked, tree: Tree
) -> None:
    template = tmp_path / "template"
    if old:
        write_store(template, old)
    for when in itertools.count(1):
        out = place_with(tmp_path / str(when), template)
        died = in_child(lambda out=out: leave(out), die(when))
        assert is_same(checked(out), old), when
        leave(out)
        assert is_same(checked(out), old), when
        assert set(tree(out) if out.exists() else ()) == names_of(old), when
        if not died:
            break
    assert when > 5


def test_a_recovered_store_is_not_replaced_unasked(
    tmp_path: Path, parts: list[np.ndarray], fill: Fill, checked: Checked
) -> None:
    out = tmp_path / "out"
    claim, run = ready_run(out, fill, parts)

    def stop_halfway(step: int) -> None:
        if (out / "features/00000.npy").is_file():
            os._exit(DIED)

    assert in_child(lambda: run.publish(), stop_halfway)
    abandon(claim)
    assert not (out / "store.json").exists()
    assert is_same(checked(out), parts)  # a reader finds what is on its way
    with pytest.raises(StoreError, match="finished store: 7 rows of timm:tiny"):
        ClaimedFolder(out).__enter__()
    assert is_same(checked(out), parts)


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_an_error_at_any_step_of_publish_loses_no_store(
    tmp_path: Path,
    old: list[np.ndarray],
    parts: list[np.ndarray],
    fill: Fill,
    write_store: WriteStore,
    checked: Checked,
    kind: type[BaseException],
) -> None:
    template = tmp_path / "template"
    if old:
        write_store(template, old)
    lost = []
    for when in itertools.count(1):
        out = place_with(tmp_path / str(when), template)
        claim, run = ready_run(out, fill, parts)
        fired: list[int] = []  # in the child

        def publish(
            claim: ClaimedFolder = claim, run: StoreRun = run, fired: list[int] = fired
        ) -> None:
            with contextlib.suppress(StoreError, KeyboardInterrupt):
                try:
                    run.publish()
                finally:
                    claim.__exit__(None, None, None)
            os._exit(DIED if fired else 0)

        def fail(step: int, when: int = when, fired: list[int] = fired) -> None:
            if step == when:
                fired.append(step)
                raise kind(errno.EIO, os.strerror(errno.EIO))

        failed = in_child(publish, fail)
        abandon(claim)
        try:
            leave(out)
        except StoreError as error:
            lost.append(f"step {when}: {error}")
        else:
            found = checked(out)
            if not (is_same(found, old) or is_same(found, parts)):
                lost.append(f"step {when}: no store left")
        if not failed:
            break
    assert when > 15
    assert not lost, "\n".join(lost)


# ---- going on ------------------------------------------------------------------------------------


def run_job(out: Path, job: Job, records: list[ImageRecord]) -> None:
    """What a pipeline does: batches of two images, shards of four; image 5 has no row."""
    finish_publishing(out)
    if (out / "store.json").exists():
        return
    with ClaimedFolder(out) as claim:
        existing = take_up(claim, job.description)
        if isinstance(existing, InterruptedRun):
            run = existing.resume(job)
            assert run is not None
        else:
            run = existing.begin(job)
        for number in range(3):
            if run.is_finished(number):
                continue
            with run.shard(number) as shard:
                for start in range(4 * number, min(4 * number + 4, len(records)), 2):
                    if start < run.resumed:
                        continue
                    batch = records[start : start + 2]
                    kept = [record for record in batch if record.path != b"5"]
                    rows = np.array([[int(record.path), 1, 2] for record in kept], np.float32)
                    failures = [FailureRecord(b"5", "empty", "")] if len(kept) < len(batch) else []
                    shard.append(rows.reshape(-1, 3), kept, failures)
                shard.finish()
        run.publish()


@pytest.mark.usefixtures("fixed_time")
def test_a_crash_at_any_step_of_a_run_is_gone_on_from(
    tmp_path: Path,
    describe_store: Callable[..., Description],
    make_records: MakeRecords,
    tree: Tree,
) -> None:
    records = make_records([b"%d" % place for place in range(10)])
    job = Job(describe_store(), len(records), "0" * 64)
    run_job(tmp_path / "undisturbed", job, records)
    expected = tree(tmp_path / "undisturbed")
    assert len([name for name in expected if name.endswith(".npy")]) == 3

    for when in itertools.count(1):
        out = tmp_path / str(when)
        died = in_child(lambda out=out: run_job(out, job, records), die(when))
        if died:
            run_job(out, job, records)
        assert tree(out) == expected, when
        if not died:
            break
    assert when > 40


@pytest.mark.usefixtures("fixed_time")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_an_error_at_any_step_of_a_run_is_gone_on_from(
    tmp_path: Path,
    describe_store: Callable[..., Description],
    make_records: MakeRecords,
    tree: Tree,
    code: int,
) -> None:
    records = make_records([b"%d" % place for place in range(10)])
    job = Job(describe_store(), len(records), "0" * 64)
    run_job(tmp_path / "undisturbed", job, records)
    expected = tree(tmp_path / "undisturbed")

    for when in itertools.count(1):
        out = tmp_path / str(when)
        fired: list[int] = []  # in the child

        def fail(step: int, when: int = when, fired: list[int] = fired) -> None:
            if step == when:
                fired.append(step)
                raise OSError(code, os.strerror(code))

        def run(out: Path = out, fired: list[int] = fired) -> None:
            with contextlib.suppress(StoreError):
                run_job(out, job, records)
            os._exit(DIED if fired else 0)

        failed = in_child(run, fail)
        run_job(out, job, records)
        assert tree(out) == expected, when
        if not failed:
            break
    assert when > 40


def test_two_crashes_one_after_the_other_are_gone_on_from(
    tmp_path: Path, describe_store: Callable[..., Description], make_records: MakeRecords
) -> None:
    records = make_records([b"%d" % place for place in range(10)])
    job = Job(describe_store(), len(records), "0" * 64)
    for first, second in itertools.product(range(5, 60, 7), range(1, 30, 5)):
        out = tmp_path / f"{first}-{second}"
        in_child(lambda out=out: run_job(out, job, records), die(first))
        if not (out / "store.json").exists():
            in_child(lambda out=out: run_job(out, job, records), die(second))
        if not (out / "store.json").exists():
            run_job(out, job, records)
        store = FeatureStore.open(out)
        assert store.features[:, 0].tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]
        assert store.paths == ["0", "1", "2", "3", "4", "6", "7", "8", "9"]
        assert [failure["path"] for failure in store.failures] == ["5"]
