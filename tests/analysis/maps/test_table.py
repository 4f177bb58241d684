"""Tables of maps: one row for each row of the map, as embedding-atlas reads them."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from extractor import map_store
from extractor.analysis.maps import table as module
from extractor.analysis.maps.thumbnails import ImageCounts
from extractor.errors import UsageError

WriteStore = Callable[..., Path]


def test_a_table_holds_what_the_map_and_the_store_hold(pictures: Any, tmp_path: Path) -> None:
    store = pictures.run()
    store_map = map_store(store)
    done: list[tuple[int, int]] = []
    counts = store_map.write_table(
        tmp_path / "map.parquet", neighbors=3, progress=lambda *now: done.append(now)
    )
    assert counts == ImageCounts(shown=8)
    assert done == [(8, 8)]
    table = pq.read_table(tmp_path / "map.parquet")
    columns = ["id", "path", "x", "y", "label", "neighbors", "image"]
    assert table.schema.names == columns
    assert table.schema.field("neighbors").type == pa.struct(
        [("ids", pa.list_(pa.int64())), ("distances", pa.list_(pa.float32()))]
    )
    assert table.schema.field("image").type == pa.struct(
        [("bytes", pa.binary()), ("path", pa.string())]
    )
    assert table.column("id").to_pylist() == store.ids.tolist()
    assert table.column("path").to_pylist() == store.paths
    assert table.column("label").to_pylist() == ["blue"] * 4 + ["red"] * 4
    points = np.stack([table.column(name).to_numpy() for name in "xy"], axis=1)
    np.testing.assert_array_equal(points, store_map.coordinates)
    unit = np.array(store.features, np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    far = 1 - unit @ unit.T
    np.fill_diagonal(far, np.inf)
    for row, near in enumerate(table.column("neighbors").to_pylist()):
        np.testing.assert_allclose(near["distances"], np.sort(far[row])[:3], atol=1e-6)
        np.testing.assert_allclose(far[row][near["ids"]], near["distances"], atol=1e-6)
    for row, image in enumerate(table.column("image").to_pylist()):
        assert image["path"] == store.paths[row]
        with Image.open(io.BytesIO(image["bytes"])) as thumbnail:
            assert (thumbnail.format, thumbnail.size) == (
                "JPEG",
                (64, 128) if row < 4 else (128, 96),
            )


def test_neighbors_are_rows_of_the_table_where_rows_are_left_out(
    tmp_path: Path, write_store: WriteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GROUP_ROWS", 2)
    monkeypatch.setattr(module, "CHUNK", 3)
    angles = np.array([0, 1, np.nan, 0.1, 1.1, np.nan, 0.3])
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    out = write_store(tmp_path / "out", [rows[:4], rows[4:]])
    store_map = map_store(out)
    counts = store_map.write_table(tmp_path / "map.parquet", list("abcdefg"), neighbors=6)
    assert counts == ImageCounts(unreadable=5)
    table = pq.read_table(tmp_path / "map.parquet").to_pylist()
    kept = [0, 1, 3, 4, 6]
    assert [row["id"] for row in table] == store_map.store.ids[kept].tolist()
    assert [row["label"] for row in table] == ["a", "b", "d", "e", "g"]
    assert [row["image"] for row in table] == [None] * 5
    expected = [[2, 4, 1, 3], [3, 4, 2, 0], [0, 4, 1, 3], [1, 4, 2, 0], [2, 0, 1, 3]]
    assert [row["neighbors"]["ids"] for row in table] == expected


def test_columns_can_be_left_out(tmp_path: Path, write_store: WriteStore) -> None:
    rows = np.eye(4, dtype=np.float32)
    store_map = map_store(write_store(tmp_path / "out", [rows]))
    store_map.write_table(tmp_path / "map.parquet", neighbors=0, thumbnails=False)
    assert pq.read_schema(tmp_path / "map.parquet").names == ["id", "path", "x", "y"]
    single = map_store(write_store(tmp_path / "single", [rows[:1]]))
    single.write_table(tmp_path / "single.parquet", thumbnails=False)
    assert pq.read_table(tmp_path / "single.parquet").column("neighbors").to_pylist() == [
        {"ids": [], "distances": []}
    ]


def test_a_name_that_is_no_utf8_is_escaped(pictures: Any, tmp_path: Path) -> None:
    path = pictures.add("red/new.png", (9, 9, 9))
    os.rename(path, os.fsencode(path.parent) + b"/bad\xff.png")
    store_map = map_store(pictures.run())
    assert store_map.write_table(tmp_path / "map.parquet").shown == 9
    assert "red/bad\\udcff.png" in pq.read_table(tmp_path / "map.parquet")["path"].to_pylist()


def test_wrong_arguments_are_named_and_no_file_is_left(pictures: Any, tmp_path: Path) -> None:
    store_map = map_store(pictures.run())
    there = tmp_path / "there.parquet"
    there.write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"parquet: .*there.parquet exists; replace it with"):
        store_map.write_table(there)
    assert there.read_bytes() == b"mine"
    with pytest.raises(UsageError, match=r"parquet: got map.csv, expected .* \.parquet"):
        store_map.write_table("map.csv")
    for neighbors in (-1, True, 1.5):
        with pytest.raises(UsageError, match=r"neighbors: got .* expected an integer of at least"):
            store_map.write_table(tmp_path / "map.parquet", neighbors=neighbors)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        store_map.write_table(tmp_path / "map.parquet", progress=stop)
    with pytest.raises(UsageError, match=r"parquet: cannot write .*: Not a directory"):
        module.write_table(
            store_map, there / "map.parquet", None, neighbors=0, root=None, progress=None
        )
    assert sorted(path.name for path in tmp_path.glob("*.par*")) == ["there.parquet"]
    store_map.write_table(there, overwrite=True)
    assert len(pq.read_table(there)) == 8
