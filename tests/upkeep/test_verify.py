"""Every kind of damage to a store is found."""

from __future__ import annotations

import json
import os
import random
import shutil
import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from extractor.cli import main as cli
from extractor.errors import StoreError, StoreReplacedError
from extractor.store.format import HISTORY, STAGING, FileEntry, Manifest, with_checksum
from extractor.store.history import HistoryEntry, history_lines
from extractor.store.index import index_bytes
from extractor.upkeep.compact import compact
from extractor.upkeep.verify import verify, verify_images

MUTATIONS = int(os.environ.get("EXTRACTOR_TEST_MUTATIONS", "150"))


@pytest.fixture
def store(tmp_path: Path, write_store: Callable[..., Path]) -> Path:
    """Three shards, of which the second has no rows, and failures."""
    random = np.random.default_rng(0)
    parts = [random.normal(size=(rows, 5)).astype(np.float32) for rows in (7, 4)]
    failures = [(b"bad\xff.jpg", "empty", "no bytes"), (b"z.jpg", "corrupt", "\u00b5")]
    out = write_store(tmp_path / "store", parts, failures=failures)
    (out / "run.json").write_text(with_checksum('{\n  "process": 7,\n  "checksum": ""\n}\n'))
    return out


def problems(folder: Path) -> list[str]:
    return list(verify(folder))


def test_untouched_store_verifies(store: Path) -> None:
    assert problems(store) == []


def test_flipped_bytes_and_cut_tails_are_found(store: Path, tmp_path: Path) -> None:
    files = sorted(path.relative_to(store) for path in store.rglob("*") if path.is_file())
    assert len(files) == 8
    draw = random.Random(0)
    for turn in range(MUTATIONS):
        copy = tmp_path / "copy"
        shutil.copytree(store, copy)
        path = copy / files[turn % len(files)]
        data = bytearray(path.read_bytes())
        if draw.random() < 0.8:
            offset = draw.randrange(len(data))
            data[offset] ^= 1 << draw.randrange(8)
            what = f"{path.name}: bit of byte {offset} flipped"
        else:
            del data[draw.randrange(len(data)) :]
            what = f"{path.name}: cut to {len(data)} bytes"
        path.write_bytes(data)
        try:
            found = problems(copy)
        except StoreError as error:  # a manifest that cannot be read at all
            found = [str(error)]
            assert path.name == "store.json", what
        assert found, what
        if path.name != "store.json":
            assert any(path.name in problem for problem in found), (what, found)
        shutil.rmtree(copy)


@pytest.mark.parametrize(
    "name", ["features/00000.npy", "images/00001.parquet", "failures.jsonl", "features", "images"]
)
def test_missing_files_are_named(store: Path, name: str) -> None:
    path = store / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert any(name in problem for problem in problems(store))


@pytest.mark.parametrize(
    "name", ["features/00009.npy", "images/notes.txt", "extra", "features/.hidden"]
)
def test_foreign_files_are_named(store: Path, name: str) -> None:
    (store / name).write_text("x")
    assert problems(store) == [f"{name!a}: is not part of the store"]


def test_half_a_report_of_a_run_that_died_is_no_problem(store: Path) -> None:
    (store / "run.json.partial").write_text("{")
    assert problems(store) == []


def test_pipe_in_place_of_the_report_is_found(store: Path) -> None:
    (store / "run.json").unlink()
    os.mkfifo(store / "run.json")
    assert problems(store) == ["run.json: no regular file"]


def test_link_in_place_of_a_file_is_found(store: Path, tmp_path: Path) -> None:
    os.rename(store / "features/00000.npy", tmp_path / "elsewhere.npy")
    (store / "features/00000.npy").symlink_to(tmp_path / "elsewhere.npy")
    assert problems(store) == ["features/00000.npy: is not a regular file"]


def test_nonfinite_values_are_reported_by_row(
    tmp_path: Path, write_store: Callable[..., Path]
) -> None:
    rows = np.ones((9000, 2), np.float16)
    rows[8, 1], rows[5000, 0] = np.nan, np.inf
    names = [[b"%04d" % row for row in range(9000)]]
    store = write_store(tmp_path / "store", [rows], names=names)
    assert problems(store) == [
        "features/00000.npy: row 8 holds NaN or infinity",
        "features/00000.npy: row 5000 holds NaN or infinity",
    ]


def test_path_with_two_rows_is_found(tmp_path: Path, write_store: Callable[..., Path]) -> None:
    parts = [np.ones((2, 3), np.float32)] * 2
    names = [[b"a", b"b"], [b"b", b"c"]]
    store = write_store(tmp_path / "store", parts, names=names)
    assert problems(store) == ["images/00001.parquet: 'b' already has a row in shard 0"]


def test_paths_whose_hashes_are_equal_differ(
    store: Path, tmp_path: Path, write_store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def equal(paths: Iterable[bytes]) -> np.ndarray:
        return np.zeros(len(list(paths)), np.int64)

    monkeypatch.setattr("extractor.upkeep.verify._digests", equal)
    monkeypatch.setattr("extractor.upkeep.verify.hash", lambda path: 0, raising=False)
    assert problems(store) == []
    names, failures = [[b"a", b"b"], [b"c", b"b"]], [(b"c", "empty", "no bytes")]
    parts = [np.ones((2, 3), np.float32)] * 2
    twice = write_store(tmp_path / "twice", parts, names=names, failures=failures)
    assert problems(twice) == [
        "images/00001.parquet: 'b' already has a row in shard 0",
        "failures.jsonl: 'c' has a row in shard 1",
    ]


@pytest.mark.parametrize("check", [verify, compact])
def test_large_index_needs_little_memory(
    check: Callable[[Path], object], tmp_path: Path, write_store: Callable[..., Path]
) -> None:
    shards, rows = 10, 3000
    parts = [np.ones((rows, 1), np.float32)] * shards
    names = [[b"%02d/%0100d" % (-shard, row) for row in range(rows)] for shard in range(shards)]
    store = write_store(tmp_path / "store", parts, names=names)
    result = check(store)  # what is loaded once does not count
    tracemalloc.start()
    try:
        result = check(store)
        if check is verify:
            assert list(result) == []
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak / (shards * rows) < 123


def test_paths_of_a_shard_need_no_order_but_differ(
    tmp_path: Path, write_store: Callable[..., Path]
) -> None:
    part = np.ones((2, 3), np.float32)
    assert problems(write_store(tmp_path / "moved", [part], names=[[b"b", b"a"]])) == []
    store = write_store(tmp_path / "store", [part], names=[[b"b", b"b"]])
    assert problems(store) == ["images/00000.parquet: 'b' already has a row in shard 0"]


@pytest.mark.parametrize("is_published", [False, True])
def test_store_that_a_run_publishes_meanwhile_is_not_called_damaged(
    store: Path, is_published: bool
) -> None:
    def publish(*_: object) -> None:
        (store / "failures.jsonl").write_bytes(b"")
        manifest = store / ("store.json" if is_published else f"{STAGING}/store.json")
        manifest.parent.mkdir(exist_ok=True)
        manifest.write_text("{}")

    with pytest.raises(StoreReplacedError, match="was changed while it was verified; verify it"):
        list(verify(store, publish))


def test_verifying_an_empty_folder_fails(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"is not a store \(store.json is missing\)"):
        problems(tmp_path)


def test_changed_and_missing_images_are_found(
    tmp_path: Path, write_store: Callable[..., Path]
) -> None:
    for name, size in (("0", 100), ("1", 3), ("2", 102)):
        path = tmp_path / "in/0" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((b"y" if name == "2" else b"x") * size)
        os.utime(path, ns=(10**18, 10**18 + int(name)))
    parts = [np.ones((4, 3), np.float32)]
    store = write_store(tmp_path / "store", parts, root=str(tmp_path / "in"))
    assert list(verify_images(store)) == [
        "image '0/1.jpg': has 3 bytes, had 101 when it was read",
        "image '0/2.jpg': its content changed since it was read",
        "image '0/3.jpg': No such file or directory",
    ]
    (tmp_path / "in").rename(tmp_path / "moved")
    (problem,) = verify_images(store)
    assert problem == (
        f"'{tmp_path}/in': no such folder of images; if the images were moved, name their folder "
        "with --root"
    )
    assert len(list(verify_images(store, str(tmp_path / "moved")))) == 3
    (problem,) = verify_images(store, str(tmp_path / "nowhere"))
    assert problem == f"'{tmp_path}/nowhere': no such folder of images"


def test_verify_command_prints_problems(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(store)]) == 0
    assert "OK (11 rows, 2 failures)" in capsys.readouterr().out
    with (store / "features/00001.npy").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert cli.main(["verify", str(store)]) == 1
    assert "features/00001.npy: content changed" in capsys.readouterr().out
    assert cli.main(["verify", str(store / "features")]) == 1
    assert "features is a part of a store; try" in capsys.readouterr().err
    assert cli.main(["verify", str(store), "--recompute", "0"]) == 2


def test_info_command_prints_the_manifest(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", str(store), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads((store / "store.json").read_bytes())
    assert cli.main(["info", str(store)]) == 0
    page = capsys.readouterr().out
    for word in ("timm:tiny", "pre-logits, 5, float32", "13: 11 rows, 2 failures", "/photos"):
        assert word in page


def with_history(store: Path, content: bytes) -> Path:
    """Exchange the history of a store, so that all its checksums are right."""
    (store / HISTORY).write_bytes(content)
    manifest = Manifest.read(store / "store.json")
    manifest = replace(manifest, history=FileEntry.of(store / HISTORY, HISTORY))
    (store / "store.json").write_text(manifest.to_json())
    return store


@pytest.mark.parametrize(
    ("history", "problem"),
    [
        ([("", {"added": range(12)})], "id 11 was added, but its row does not count"),
        ([("", {"added": range(6)})], "adds 6 ids to an empty store, expected 11"),
        ([("a", {"removed": [3]})], "id 3 was removed, but its row counts"),
        ([("a", {"moved": [10, 20]})], "id 20 was added, but its row does not count"),
        ([("a", {}), ("a", {})], "holds the same state twice"),
        ([("a", {}), ("", {})], "holds the same state twice"),
        ([], "is empty, expected at least one state"),
    ],
)
def test_history_that_does_not_fit_the_ids_is_found(
    tmp_path: Path, write_store: Callable[..., Path], history: list[Any], problem: str
) -> None:
    parts = [np.ones((7, 3), np.float32), np.ones((4, 3), np.float32)]
    store = write_store(tmp_path / "store", parts)  # ids 0 to 10
    assert problems(store) == []
    entries = [HistoryEntry.of(since, "", **ids) for since, ids in history]
    assert f"history.jsonl: {problem}" in problems(with_history(store, history_lines(entries)))


def test_history_that_is_no_json_is_found(store: Path) -> None:
    (problem,) = problems(with_history(store, b"{\n"))
    assert problem.startswith("history.jsonl: ")
    assert "is damaged" in problem


@pytest.mark.parametrize(
    ("ids", "problem"),
    [
        ([0, 1, 1], "images: id 1 belongs to several rows"),
        ([0, 1, 9], "images/00000.parquet: holds ids outside of 0 to 2"),
        ([-1, 1, 2], "images/00000.parquet: holds ids outside of 0 to 2"),
        ([0, 1], "has 2 ids, expected 3"),
        (None, "has no column id"),
    ],
)
def test_wrong_ids_of_an_index_are_found(
    tmp_path: Path,
    write_store: Callable[..., Path],
    make_records: Callable[..., Any],
    ids: list[int] | None,
    problem: str,
) -> None:
    store = write_store(tmp_path / "store", [np.ones((3, 2), np.float32)])
    manifest = Manifest.read(store / "store.json")
    index = store / "images/00000.parquet"
    records = make_records([b"a", b"b", b"c"])[: len(ids or [0, 1, 2])]
    index.write_bytes(index_bytes(records, None if ids is None else np.array(ids, np.int64)))
    entry = replace(
        manifest.shards[0], first_id=None, index=FileEntry.of(index, manifest.shards[0].index.name)
    )
    (store / "store.json").write_text(replace(manifest, shards=(entry,)).to_json())
    assert any(problem in found for found in problems(store))


def test_progress_counts_the_rows_of_every_shard(store: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    list(verify(store, lambda *step: seen.append(step)))
    assert seen == [("reading", 7, 11), ("reading", 11, 11)]
    seen.clear()
    (store / "root").mkdir()
    list(verify_images(store, str(store / "root"), lambda *step: seen.append(step)))
    assert seen == [("images", done, 11) for done in range(1, 12)]
