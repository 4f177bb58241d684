"""The files of a store have the bytes and values that the format promises."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from extractor.reading.reader import FeatureStore

Tree = Callable[[Path], dict[str, "bytes | None"]]
WriteStore = Callable[..., Path]


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
  "version": 2,
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
    "normalized": false
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
      "retired": "",
      "first_id": 0
    }
  ],
  "failures": {
    "name": "failures.jsonl",
    "bytes": 60,
    "sha256": "FAILURES_SHA256"
  },
  "history": {
    "name": "history.jsonl",
    "bytes": HISTORY_BYTES,
    "sha256": "HISTORY_SHA256"
  },
  "next_id": 3,
  "checksum": ""
}
"""

GOLDEN_FAILURES = (
    b'{"path": "b\\udcff.jpg", "error": "empty", "message": "0 \\u00b5", '
    b'"size": -1, "mtime_ns": -1}\n'
)

GOLDEN_HISTORY = (
    b'{"since": "", "created": "2024-01-02T03:04:05+00:00", "added": "0-1", "removed": "", '
    b'"moved": "", "changed": []}\n'
)


@pytest.mark.usefixtures("fixed_time")
def test_store_bytes_match_the_golden_bytes(tmp_path: Path, write_store: WriteStore) -> None:
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
        .replace("HISTORY_BYTES", str(len(GOLDEN_HISTORY)))
        .replace("HISTORY_SHA256", hashlib.sha256(GOLDEN_HISTORY).hexdigest())
        .replace('"bytes": 60', f'"bytes": {len(GOLDEN_FAILURES)}')
    )
    assert (out / "features/00000.npy").read_bytes() == GOLDEN_FEATURES
    assert (out / "failures.jsonl").read_bytes() == GOLDEN_FAILURES
    assert (out / "history.jsonl").read_bytes() == GOLDEN_HISTORY
    digest = hashlib.sha256(manifest.encode()).hexdigest()
    manifest = manifest.replace('"checksum": ""', f'"checksum": "{digest}"')
    assert (out / "store.json").read_bytes().decode("ascii") == manifest


def test_index_columns_have_fixed_types(
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


def test_non_utf8_paths_survive_a_round_trip(
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


def test_failures_are_json_lines_sorted_by_path(
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


def test_store_without_rows_opens(tmp_path: Path, write_store: WriteStore, tree: Tree) -> None:
    out = write_store(tmp_path / "out", [])
    assert set(tree(out)) == {"failures.jsonl", "features", "history.jsonl", "images", "store.json"}
    store = FeatureStore.open(out)
    assert store.features.shape == (0, 3)
    assert store.paths == []
    assert store.failures == []


def test_manifest_agrees_with_the_files(
    tmp_path: Path, parts: list[np.ndarray], write_store: WriteStore, tree: Tree
) -> None:
    out = write_store(tmp_path / "out", parts, failures=[(b"x", "empty", "no bytes")])
    manifest = json.loads((out / "store.json").read_bytes())
    entries = [shard[kind] for shard in manifest["shards"] for kind in ("features", "index")]
    entries.extend(manifest[name] for name in ("failures", "history"))
    files = {name: content for name, content in tree(out).items() if content is not None}
    del files["store.json"]
    assert sorted(entry["name"] for entry in entries) == sorted(files)
    for entry in entries:
        content = files[entry["name"]]
        assert entry["bytes"] == len(content)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()


def test_created_is_the_publishing_time_in_utc(
    tmp_path: Path, parts: list[np.ndarray], write_store: WriteStore
) -> None:
    before = datetime.now(timezone.utc).replace(microsecond=0)
    out = write_store(tmp_path / "out", parts)
    created = datetime.fromisoformat(FeatureStore.open(out).manifest.created)
    assert before <= created <= datetime.now(timezone.utc)
    assert created.utcoffset() is not None


@pytest.mark.usefixtures("fixed_time")
def test_same_rows_make_the_same_files(
    tmp_path: Path, parts: list[np.ndarray], write_store: WriteStore, tree: Tree
) -> None:
    one, two = (tree(write_store(tmp_path / name, parts)) for name in ("one", "two"))
    del one["store.json"], two["store.json"]  # has the time in it
    assert one == two
