"""A shard has the bytes that numpy writes, and exists only once it is finished."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from extractor.reading.reader import FeatureStore
from extractor.store.claim import ClaimedFolder
from extractor.store.failures import FailureRecord
from extractor.store.format import Description
from extractor.store.index import ImageRecord
from extractor.store.job import Job
from extractor.store.writer import StoreRun, rewrite

Tree = Callable[[Path], dict[str, "bytes | None"]]
Fill = Callable[..., StoreRun]
WriteStore = Callable[..., Path]
MakeRecords = Callable[..., list[ImageRecord]]


def saved(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (2, 3), (9, 10), (10, 999), (101, 1000)])
def test_shard_has_the_bytes_of_numpy_save(
    tmp_path: Path, write_store: WriteStore, dtype: str, rows: int, dim: int
) -> None:
    whole = np.random.default_rng(3).normal(size=(rows, dim)).astype(dtype)
    write_store(tmp_path / "out", [whole])
    assert (tmp_path / "out/features/00000.npy").read_bytes() == saved(whole)


def test_rows_are_cast_as_numpy_casts(
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


def test_header_length_ignores_number_of_rows(tmp_path: Path, write_store: WriteStore) -> None:
    starts = set()
    for rows in (1, 9, 10, 999, 10_000):
        out = write_store(tmp_path / str(rows), [np.zeros((rows, 1), np.float16)])
        starts.add((out / "features/00000.npy").stat().st_size - rows * 2)
    assert starts == {128}


def test_rows_that_do_not_match_their_records_are_rejected(
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


def test_shard_without_rows_has_no_files_and_leaves_a_gap(
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
                entry = shard.finish().entry
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


def test_unfinished_shard_is_not_in_the_store(
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
