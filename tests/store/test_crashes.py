"""A run that dies or fails at any step loses no store, and the next run resumes it."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.dying import DIED, die, in_child

from extractor.errors import StoreError
from extractor.reading.reader import FeatureStore
from extractor.store.atomic import write_atomically
from extractor.store.claim import ClaimedFolder
from extractor.store.failures import FailureRecord
from extractor.store.format import STAGING, Description
from extractor.store.index import ImageRecord
from extractor.store.job import Job
from extractor.store.publish import finish_publishing, publish_staged
from extractor.store.writer import InterruptedRun, StoreRun, take_up

Tree = Callable[[Path], dict[str, "bytes | None"]]
Checked = Callable[[Path], Any]  # rows of a store, or None
Fill = Callable[..., StoreRun]
WriteStore = Callable[..., Path]
MakeRecords = Callable[..., list[ImageRecord]]


STRIDE = int(os.environ.get("EXTRACTOR_TEST_STRIDE", "3"))  # from one step to die at to the next


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


def test_file_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tree: Tree
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "run.json", b"{}")
    assert tree(tmp_path) == {}


OLD = {
    "no old store": [],
    "old store": [4, 3, 2],  # begins with shards of the same shape as the new one
}


@pytest.fixture(params=[*OLD.values()], ids=[*OLD])
def old(request: pytest.FixtureRequest) -> list[np.ndarray]:
    """Shards of the old store; no number of theirs is in the new one."""
    return [np.full((rows, 3), -1 - rows, np.float32) for rows in request.param]


def copy_of(out: Path, template: Path) -> Path:
    if template.exists():
        shutil.copytree(template, out)
    return out


def is_same(found: np.ndarray | None, shards: list[np.ndarray]) -> bool:
    if found is None or not shards:
        return found is None and not shards
    return np.array_equal(found, np.concatenate(shards))


def names_of(shards: list[np.ndarray]) -> set[str]:
    names = (
        {"failures.jsonl", "features", "history.jsonl", "images", "store.json"} if shards else set()
    )
    for number in range(len(shards)):
        names |= {f"features/{number:05d}.npy", f"images/{number:05d}.parquet"}
    return names


def test_crash_at_any_step_of_publishing_leaves_one_complete_store(
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
        out = copy_of(tmp_path / str(when), template)
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

        copy = copy_of(tmp_path / f"{when} copy", out)
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


def test_publishing_writes_no_file_under_its_final_name(
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
        names = ["failures.jsonl.partial", "history.jsonl.partial", "store.json.partial"]
        if written == [str(tmp_path / "out" / STAGING / name) for name in names]:
            os._exit(DIED)

    assert in_child(publish, lambda step: None)
    abandon(claim)
    assert is_same(checked(tmp_path / "out"), parts)


def test_crash_at_any_step_of_recovery_leaves_one_complete_store(
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
        out = copy_of(tmp_path / str(when), template)
        died = in_child(lambda out=out: leave(out), die(when))
        found = checked(out)
        assert is_same(found, parts)
        leave(out)
        assert is_same(checked(out), parts), when
        assert set(tree(out)) == names_of(parts), when
        if not died:
            break
    assert when > 20


def test_crash_at_any_step_before_the_first_shard_changes_nothing(
    tmp_path: Path, old: list[np.ndarray], write_store: WriteStore, checked: Checked, tree: Tree
) -> None:
    template = tmp_path / "template"
    if old:
        write_store(template, old)
    for when in itertools.count(1):
        out = copy_of(tmp_path / str(when), template)
        died = in_child(lambda out=out: leave(out), die(when))
        assert is_same(checked(out), old), when
        leave(out)
        assert is_same(checked(out), old), when
        assert set(tree(out) if out.exists() else ()) == names_of(old), when
        if not died:
            break
    assert when > 5


def test_recovered_store_is_not_replaced_without_overwrite(
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
def test_error_at_any_step_of_publishing_loses_no_store(
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
    for when in itertools.count(1, STRIDE):
        out = copy_of(tmp_path / str(when), template)
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
def test_run_resumes_after_a_crash_at_any_step(
    tmp_path: Path,
    describe_store: Callable[..., Description],
    make_records: MakeRecords,
    tree: Tree,
) -> None:
    records = make_records([b"%d" % i for i in range(10)])
    job = Job(describe_store(), len(records), "0" * 64)
    run_job(tmp_path / "undisturbed", job, records)
    expected = tree(tmp_path / "undisturbed")
    assert len([name for name in expected if name.endswith(".npy")]) == 3

    for when in itertools.count(1, STRIDE):
        out = tmp_path / str(when)
        died = in_child(lambda out=out: run_job(out, job, records), die(when))
        if died:
            run_job(out, job, records)
        assert tree(out) == expected, when
        if not died:
            break
    assert when > 40


@pytest.mark.usefixtures("fixed_time")
@pytest.mark.parametrize(
    "code",
    [
        errno.ENOSPC,
        pytest.param(errno.EIO, marks=pytest.mark.slow),
        pytest.param(errno.EROFS, marks=pytest.mark.slow),
    ],
)
def test_run_resumes_after_an_error_at_any_step(
    tmp_path: Path,
    describe_store: Callable[..., Description],
    make_records: MakeRecords,
    tree: Tree,
    code: int,
) -> None:
    records = make_records([b"%d" % i for i in range(10)])
    job = Job(describe_store(), len(records), "0" * 64)
    run_job(tmp_path / "undisturbed", job, records)
    expected = tree(tmp_path / "undisturbed")

    for when in itertools.count(1, STRIDE):
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


def test_run_resumes_after_two_crashes(
    tmp_path: Path, describe_store: Callable[..., Description], make_records: MakeRecords
) -> None:
    records = make_records([b"%d" % i for i in range(10)])
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
