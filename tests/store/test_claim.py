"""Claiming a folder harms nothing in it; leaving restores it unless a store was published."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.disks import small_disk_at

from extractor.errors import StoreError
from extractor.reading.reader import FeatureStore
from extractor.store.claim import ClaimedFolder
from extractor.store.format import IN_FLIGHT, STAGING, WORKERS, Description
from extractor.store.job import Job
from extractor.store.writer import StoreRun, rewrite

Tree = Callable[[Path], dict[str, "bytes | None"]]
Checked = Callable[[Path], Any]  # rows of a store, or None
Fill = Callable[..., StoreRun]
WriteStore = Callable[..., Path]


def test_only_the_hidden_folder_exists_before_publishing(
    tmp_path: Path, parts: list[np.ndarray], fill: Fill, tree: Tree
) -> None:
    out = tmp_path / "out"
    with ClaimedFolder(out) as claim:
        assert os.listdir(out) == [STAGING]
        run = fill(claim, parts, failures=[(b"x", "empty", "")])
        assert os.listdir(out) == [STAGING]
        assert STAGING.startswith(".")
        run.publish()
    assert sorted(os.listdir(out)) == [
        "failures.jsonl",
        "features",
        "history.jsonl",
        "images",
        "store.json",
    ]
    assert not [name for name in tree(out) if "partial" in name]


@pytest.mark.parametrize("there", ["", "a", "a/b/out"])
def test_leaving_without_publishing_removes_new_folders(
    tmp_path: Path, parts: list[np.ndarray], fill: Fill, tree: Tree, there: str
) -> None:
    (tmp_path / there).mkdir(parents=True, exist_ok=True)
    before = tree(tmp_path)
    with ClaimedFolder(tmp_path / "a/b/out") as claim:
        fill(claim, parts, failures=[(b"x", "empty", "")])
    assert tree(tmp_path) == before


def test_error_before_publishing_propagates_and_leaves_nothing(
    tmp_path: Path, parts: list[np.ndarray], fill: Fill, tree: Tree
) -> None:
    def stopped() -> None:
        with ClaimedFolder(tmp_path / "a/out") as claim:
            fill(claim, parts)
            raise KeyError("stopped")

    with pytest.raises(KeyError, match="stopped"):
        stopped()
    assert tree(tmp_path) == {}


def test_leaving_without_publishing_keeps_the_old_store(
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
def test_overwriting_leaves_no_stale_files(
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
    expected = {"failures.jsonl", "features", "history.jsonl", "images", "store.json"}
    for number in range(count):
        expected |= {f"features/{number:05d}.npy", f"images/{number:05d}.parquet"}
    assert set(tree(out)) == expected


def test_overwriting_keeps_foreign_files(
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
def test_store_with_foreign_files_in_its_folders_is_not_replaced(
    tmp_path: Path, parts: list[np.ndarray], write_store: WriteStore, tree: Tree, name: str
) -> None:
    out = write_store(tmp_path / "out", parts)
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_bytes(b"mine")
    before = tree(out)
    with pytest.raises(StoreError, match="holds files that are not part of the store"):
        write_store(out, parts[:1], overwrite=True)
    assert tree(out) == before


def test_foreign_files_added_during_a_run_prevent_publishing(
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
def test_links_are_never_followed(
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


def test_foreign_staging_folder_is_not_touched(
    tmp_path: Path, parts: list[np.ndarray], write_store: WriteStore, tree: Tree
) -> None:
    (tmp_path / "out" / ".extractor-partial").mkdir(parents=True)
    (tmp_path / "out" / ".extractor-partial" / "mine").write_bytes(b"mine")
    with pytest.raises(StoreError, match="was not left by a run of this program"):
        write_store(tmp_path / "out", parts)
    assert tree(tmp_path / "out")[".extractor-partial/mine"] == b"mine"


def test_broken_link_is_rejected(
    tmp_path: Path, parts: list[np.ndarray], write_store: WriteStore
) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="is a broken link"):
        write_store(tmp_path / "out", parts)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_ignored_while_publishing(
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
def test_folder_with_other_files_is_rejected_and_unchanged(
    tmp_path: Path, tree: Tree, name: str, overwrite: bool
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"mine")
    before = tree(tmp_path)
    with pytest.raises(StoreError, match=r"is not empty and holds no store; .*another --out"):
        ClaimedFolder(tmp_path, overwrite=overwrite).__enter__()
    assert tree(tmp_path) == before


def test_empty_folder_is_accepted(
    tmp_path: Path, parts: list[np.ndarray], write_store: WriteStore, checked: Checked
) -> None:
    write_store(tmp_path, parts)
    assert np.array_equal(checked(tmp_path), np.concatenate(parts))


@pytest.mark.parametrize("overwrite", [False, True])
def test_file_as_output_folder_is_rejected(tmp_path: Path, tree: Tree, overwrite: bool) -> None:
    (tmp_path / "out").write_bytes(b"mine")
    with pytest.raises(StoreError, match="out is a file, expected a folder"):
        ClaimedFolder(tmp_path / "out", overwrite=overwrite).__enter__()
    with pytest.raises(StoreError, match=r"out is a file, expected a folder"):
        ClaimedFolder(tmp_path / "out/deeper/still", overwrite=overwrite).__enter__()
    assert tree(tmp_path) == {"out": b"mine"}


def test_finished_store_is_not_replaced_without_overwrite(
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
        (
            b'{"format": "extractor-store", "version": 3}',
            "has format version 3; .*reads versions 1",
        ),
        (b'{"format": "other"}', "is not the manifest of a store"),
        (b"{", "is not JSON"),
    ],
)
def test_unknown_manifest_is_not_replaced(
    tmp_path: Path, tree: Tree, content: bytes, message: str, overwrite: bool
) -> None:
    (tmp_path / "store.json").write_bytes(content)
    with pytest.raises(StoreError, match=message):
        ClaimedFolder(tmp_path, overwrite=overwrite).__enter__()
    assert tree(tmp_path) == {"store.json": content}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder_is_rejected(tmp_path: Path, tree: Tree) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StoreError, match=r"cannot write the store .*Permission denied"):
            ClaimedFolder(tmp_path / "a/out").__enter__()
        assert tree(tmp_path) == {}
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("failing", ["b", STAGING, "features"])
def test_made_folders_are_removed_if_one_cannot_be_made(
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


def test_leftovers_of_a_dead_run_are_cleared(
    tmp_path: Path, parts: list[np.ndarray], write_store: WriteStore, checked: Checked
) -> None:
    out = tmp_path / "out"
    for name in ("lock", "features/00000.npy", "features/00001.npy.partial", "store.json.partial"):
        (out / STAGING / name).parent.mkdir(parents=True, exist_ok=True)
        (out / STAGING / name).write_bytes(b"half")
    write_store(out, parts[:1])
    assert np.array_equal(checked(out), parts[0])
    assert not (out / STAGING).exists()


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 64 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("dim", [3, 4096])  # fails when the buffer is flushed, or at once
def test_unwritable_shard_keeps_the_old_store(
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


def test_unwritable_failures_keep_the_old_store(
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
    with small_disk_at(tmp_path / "disk", "128k") as disk:
        yield disk


def test_full_disk_keeps_the_old_store(
    small_disk: Path, parts: list[np.ndarray], write_store: WriteStore, tree: Tree
) -> None:
    out = write_store(small_disk / "out", parts)
    before = tree(small_disk)
    with pytest.raises(StoreError, match=r"cannot write the store .*No space left on device"):
        write_store(out, [np.zeros((200, 300), np.float32)], overwrite=True)
    assert tree(small_disk) == before
    write_store(out, parts[:1], overwrite=True)
    assert len(FeatureStore.open(out)) == 4


def test_crash_logs_of_dead_workers_are_kept_for_the_next_run(tmp_path: Path) -> None:
    with ClaimedFolder(tmp_path / "out") as claim:
        claim.keep_work()
        crash_log = claim.staging / WORKERS / "part-1-2" / f"{IN_FLIGHT}-0"
        crash_log.parent.mkdir(parents=True)
        crash_log.write_bytes(b"")
    assert crash_log.exists()
