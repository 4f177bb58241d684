"""A large store answers like a small one, and reads only the shards that it needs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from extractor.errors import StoreReplacedError
from extractor.reading import lookup, reader
from extractor.reading.reader import FeatureStore
from extractor.store.index import read_column

WriteStore = Callable[..., Path]
# The second shard is not in order, as after images were moved, and lies inside the first one.
NAMES = (
    [b"a/0.jpg", b"a/1.jpg", b"c/0.jpg", b"z.jpg"],
    [b"c/9.jpg", b"b/\xff.jpg", b"b/1.jpg"],
    [b"zz/0.jpg"],
)
RETIRED = (b"a/1.jpg", b"c/9.jpg")


@pytest.fixture
def out(tmp_path: Path, write_store: WriteStore) -> Path:
    """A store of 8 rows in three shards, of which two are retired."""
    parts = [np.arange(len(names) * 3).reshape(-1, 3) for names in NAMES]
    out = write_store(tmp_path / "out", [p.astype(np.float32) for p in parts], names=NAMES)
    content = json.loads((out / "store.json").read_text())
    content["shards"][0]["retired"], content["shards"][1]["retired"] = "1", "0"
    content["counts"]["rows"] -= 2
    (out / "store.json").write_text(json.dumps(content))
    return out


@pytest.fixture
def large(out: Path, monkeypatch: pytest.MonkeyPatch) -> FeatureStore:
    """The same store, taken for a large one."""
    monkeypatch.setattr(reader, "LARGE", 0)
    return FeatureStore.open(out)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the indexes that were read."""
    names: list[str] = []

    def noted(path: Path, name: str) -> list[Any]:
        names.append(path.name)
        return read_column(path, name)

    monkeypatch.setattr(lookup, "read_column", noted)
    return names


KEPT = [os.fsdecode(name) for names in NAMES for name in names if name not in RETIRED]


def test_every_path_is_found_in_its_shard(large: FeatureStore) -> None:
    assert [large.index_of(path) for path in KEPT] == list(range(6))
    assert [large.index_of(large.full_path(row)) for row in range(6)] == list(range(6))
    assert large.full_path(-1) == f"{large.root}/zz/0.jpg"
    for path in (*RETIRED, b"0", b"b/0.jpg", b"zzz"):
        with pytest.raises(KeyError, match="has no row"):
            large.index_of(path)


def test_lookup_reads_only_shards_that_may_hold_the_path(
    large: FeatureStore, read: list[str]
) -> None:
    assert "zz/0.jpg" in large
    assert "y" not in large
    assert read == ["00002.parquet", "00000.parquet"]
    assert "a/0.jpg" in large
    assert len(read) == 2


def test_full_path_reads_one_shard(large: FeatureStore, read: list[str]) -> None:
    assert large.full_path(4) == f"{large.root}/b/1.jpg"
    assert read == ["00001.parquet"]
    with pytest.raises(IndexError, match="out of range"):
        large.full_path(6)


def test_glob_and_columns_of_a_selection_equal_those_of_a_small_store(
    large: FeatureStore, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    selections = [large.select(which) for which in ("*b/*", [5, 0, 4, 0], [])]
    assert [chosen.rows.tolist() for chosen in selections] == [[3, 4], [5, 0, 4, 0], []]
    columns = ("path", "size", "sha256", "id")
    found = [[chosen.column(name) for name in columns] for chosen in selections]
    assert [chosen.paths for chosen in selections] == [
        [KEPT[row] for row in chosen.rows] for chosen in selections
    ]
    monkeypatch.setattr(reader, "LARGE", lookup.LARGE)
    small = FeatureStore.open(out)
    same = [small.select(chosen.rows) for chosen in selections]
    assert found == [[chosen.column(name) for name in columns] for chosen in same]


def test_lookup_in_a_replaced_store_is_an_error(
    large: FeatureStore, out: Path, write_store: WriteStore
) -> None:
    write_store(out, [np.ones((4, 3), np.float32)], overwrite=True)
    for find in (lambda: large.index_of("z.jpg"), lambda: large.select("*")):
        with pytest.raises(StoreReplacedError, match="was replaced or removed"):
            find()
