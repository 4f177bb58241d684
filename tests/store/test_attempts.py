"""Shards may be finished in any order, by any process; of several attempts the first one counts."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from extractor.errors import ShardBusyError, StoreError
from extractor.reading.reader import FeatureStore
from extractor.store.claim import ClaimedFolder
from extractor.store.failures import FailureRecord
from extractor.store.format import STAGING, Description
from extractor.store.index import ImageRecord
from extractor.store.job import Job
from extractor.store.shard import ShardWriter
from extractor.store.writer import ExistingStore, InterruptedRun, StoreRun, take_up

Tree = Callable[[Path], dict[str, "bytes | None"]]

IMAGES = 23
SHARD = 4
SHARDS = 6  # the last one holds three images
NAMES = [b"%02d" % i for i in range(IMAGES)]
BAD = {5, 8, 9, 10, 11, 22}  # images without a row: all of shard 2


@pytest.fixture
def records(make_records: Callable[..., list[ImageRecord]]) -> list[ImageRecord]:
    """One record per image."""
    return make_records(NAMES)


@pytest.fixture
def job(describe_store: Callable[..., Description]) -> Job:
    """Job of all images."""
    return Job(describe_store(shard_images=SHARD), IMAGES, "0" * 64)


def append(shard: ShardWriter, records: list[ImageRecord], start: int, stop: int) -> None:
    """Append images in batches of one."""
    for i in range(start, stop):
        if i in BAD:
            shard.append(np.empty((0, 3), np.float32), [], [FailureRecord(NAMES[i], "empty", "")])
        else:
            shard.append(np.array([[i, i + 0.5, 1]], np.float32), records[i : i + 1])


def compute(
    writer: ShardWriter, number: int, records: list[ImageRecord], count: int = SHARD
) -> None:
    """Append the images of a shard that are not done, up to a count; finish a complete one."""
    expected = min(SHARD, IMAGES - SHARD * number)
    append(writer, records, SHARD * number + writer.images, SHARD * number + min(count, expected))
    if writer.images == expected:
        writer.finish()


def begin(claim: ClaimedFolder, job: Job) -> StoreRun:
    existing = take_up(claim, job.description)
    assert isinstance(existing, ExistingStore)
    return existing.begin(job)


def interrupted(claim: ClaimedFolder, job: Job) -> InterruptedRun:
    existing = take_up(claim, job.description)
    assert isinstance(existing, InterruptedRun)
    return existing


def undisturbed(out: Path, job: Job, records: list[ImageRecord]) -> None:
    with ClaimedFolder(out) as claim:
        run = begin(claim, job)
        for number in range(SHARDS):
            with run.shard(number) as shard:
                compute(shard, number, records)
        run.publish()


@pytest.mark.usefixtures("fixed_time")
@pytest.mark.parametrize("seed", range(25))
def test_run_resumes_from_any_subset_of_its_shards(
    tmp_path: Path, job: Job, records: list[ImageRecord], tree: Tree, seed: int
) -> None:
    undisturbed(tmp_path / "undisturbed", job, records)
    choose = random.Random(seed)
    done = [choose.choice([0, 0, 1, 3, SHARD]) for _ in range(SHARDS)]
    done[-1] = min(done[-1], 3)
    with ClaimedFolder(tmp_path / "out") as claim:
        begin(claim, job)
        for number in choose.sample(range(SHARDS), SHARDS):
            if done[number]:
                with ShardWriter(claim.staging, number, job.description) as shard:
                    compute(shard, number, records, done[number])
    with ClaimedFolder(tmp_path / "out") as claim:
        if any(done):
            existing = interrupted(claim, job)
            stored = existing.stored(planned=True, digests=False)
            paths = [path for images in stored.shards.values() for path in images.paths]
            known = {SHARD * number + i for number, count in enumerate(done) for i in range(count)}
            assert paths == [NAMES[i] for i in sorted(known - BAD)]
            assert sorted(f.path for f in stored.new_failures) == [
                NAMES[i] for i in sorted(known & BAD)
            ]
            run = existing.resume(job)
            assert run is not None
        else:
            run = begin(claim, job)
        assert run.resumed == sum(done)
        assert [run.done_in(number) for number in range(SHARDS)] == done
        for number in choose.sample(range(SHARDS), SHARDS):
            assert run.is_finished(number) == (done[number] == min(SHARD, IMAGES - SHARD * number))
            if not run.is_finished(number):
                with ShardWriter(claim.staging, number, job.description) as shard:
                    assert shard.images == done[number]
                    compute(shard, number, records)
                assert run.collect(number) == shard.finished
                assert run.is_finished(number)
        run.publish()
    assert tree(tmp_path / "out") == tree(tmp_path / "undisturbed")


@pytest.mark.parametrize("seed", range(10))
def test_sealed_run_with_gaps_keeps_rows_and_ids_apart(
    tmp_path: Path, job: Job, records: list[ImageRecord], seed: int
) -> None:
    choose = random.Random(seed)
    done = [choose.choice([0, 2, SHARD]) for _ in range(SHARDS - 1)]
    done[choose.randrange(SHARDS - 1)] = 1
    with ClaimedFolder(tmp_path / "out") as claim:
        begin(claim, job)
        for number, count in enumerate(done):
            with ShardWriter(claim.staging, number, job.description) as shard:
                compute(shard, number, records, count)
    known = {SHARD * number + i for number, count in enumerate(done) for i in range(count)}
    rest = [i for i in range(IMAGES) if i not in known]
    with ClaimedFolder(tmp_path / "out") as claim:
        sealed = interrupted(claim, job).seal()
        failures = sealed.stored(digests=False).new_failures
        assert sorted(failure.path for failure in failures) == [
            NAMES[i] for i in sorted(known & BAD)
        ]
        last = max(number for number, count in enumerate(done) if count)
        assert (sealed.first_shard, sealed.first_id) == (last + 1, SHARD * (last + 1))
        assert not list((claim.staging / "journal").glob("*.jsonl"))
        run = sealed.begin(Job(job.description, len(rest), "1" * 64, first=sealed.first_shard))
        for k, start in enumerate(range(0, len(rest), SHARD)):
            with run.shard(sealed.first_shard + k) as shard:
                for i in rest[start : start + SHARD]:
                    append(shard, records, i, i + 1)
                shard.finish()
        run.publish()
    store = FeatureStore.open(tmp_path / "out")
    rows = [i for i in [*sorted(known), *rest] if i not in BAD]
    assert store.features[:, 0].tolist() == rows
    assert [path.encode() for path in store.paths] == [NAMES[i] for i in rows]
    assert len(set(store.ids.tolist())) == len(rows)
    assert max(store.ids.tolist()) < store.manifest.next_id
    # Those of the sealed run reach the store with its plan.
    assert {f["path"].encode() for f in store.failures} == {NAMES[i] for i in BAD - known}


def test_lost_file_of_a_finished_shard_costs_that_shard_alone(
    tmp_path: Path, job: Job, records: list[ImageRecord]
) -> None:
    with ClaimedFolder(tmp_path / "out") as claim:
        run = begin(claim, job)
        for number in range(SHARDS):
            with run.shard(number) as shard:
                compute(shard, number, records)
    os.truncate(tmp_path / "out" / STAGING / "features/00001.npy", 130)
    (tmp_path / "out" / STAGING / "journal/00003.done").write_text("{")
    with ClaimedFolder(tmp_path / "out") as claim:
        resumed = interrupted(claim, job).resume(job)
        assert resumed is not None
        done = [resumed.done_in(number) for number in range(SHARDS)]
    assert done == [4, 0, 4, 0, 4, 3]


def test_shard_that_another_process_computes_is_busy(
    tmp_path: Path, job: Job, records: list[ImageRecord]
) -> None:
    message = rf"shard 2 of .*out is being computed by process {os.getpid()} on .*; wait for it"
    with ClaimedFolder(tmp_path / "out") as claim:
        begin(claim, job)
        with ShardWriter(claim.staging, 2, job.description) as shard:
            append(shard, records, 8, 10)
            with pytest.raises(ShardBusyError, match=message):
                ShardWriter(claim.staging, 2, job.description)
            with ShardWriter(claim.staging, 3, job.description):
                pass
        with ShardWriter(claim.staging, 2, job.description) as shard:
            assert shard.images == 2


def test_lock_of_a_shard_does_not_outlive_its_process(tmp_path: Path, job: Job) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom extractor.store.lock import ShardLock\n"
        "ShardLock(Path(sys.argv[1]), 2).__enter__()\nprint('ready', flush=True)\ntime.sleep(60)\n"
    )
    with ClaimedFolder(tmp_path / "out") as claim:
        begin(claim, job)
        command = [sys.executable, "-c", script, str(claim.staging)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "ready\n"
            with pytest.raises(ShardBusyError, match=f"by process {holder.pid} on"):
                ShardWriter(claim.staging, 2, job.description)
            holder.kill()
            holder.wait()
            with ShardWriter(claim.staging, 2, job.description) as shard:
                assert shard.images == 0


@pytest.mark.parametrize("first", ["original", "copy"])
def test_first_of_two_attempts_counts_and_their_files_do_not_mix(
    tmp_path: Path, job: Job, records: list[ImageRecord], first: str
) -> None:
    # In the copy, image 7 was too slow.
    slow = [FailureRecord(NAMES[7], "timeout", "")]
    with ClaimedFolder(tmp_path / "out") as claim:
        run = begin(claim, job)
        with (
            ShardWriter(claim.staging, 1, job.description) as original,
            ShardWriter(claim.staging, 1, job.description, is_copy=True) as copy,
        ):
            append(copy, records, 4, 7)
            append(original, records, 4, 8)
            copy.append(np.empty((0, 3), np.float32), [], slow)
            attempts = [original, copy] if first == "original" else [copy, original]
            counts, discarded = (attempt.finish() for attempt in attempts)
        assert discarded == counts
        assert [f.path for f in counts.failures] == [NAMES[5], NAMES[7]][: len(counts.failures)]
        assert len(counts.failures) == (1 if first == "original" else 2)
        assert run.collect(1) == counts
        left = {path.name for path in claim.staging.rglob("*") if path.is_file()}
        assert left == {"lock", "job.json", "00001.npy", "00001.parquet", "00001.done"}
        run.publish()
    assert (
        FeatureStore.open(tmp_path / "out").features[:, 0].tolist()
        == [4, 6, 7][: 4 - len(counts.failures)]
    )


def test_copy_does_not_resume_and_an_unfinished_one_leaves_nothing(
    tmp_path: Path, job: Job, records: list[ImageRecord]
) -> None:
    with ClaimedFolder(tmp_path / "out") as claim:
        begin(claim, job)
        with ShardWriter(claim.staging, 1, job.description) as original:
            append(original, records, 4, 6)
            before = set(claim.staging.rglob("*"))
            with ShardWriter(claim.staging, 1, job.description, is_copy=True) as copy:
                assert copy.images == 0
                append(copy, records, 4, 8)
            assert set(claim.staging.rglob("*")) == before


def test_finished_shard_is_taken_over_when_it_is_opened_again(
    tmp_path: Path, job: Job, records: list[ImageRecord]
) -> None:
    with ClaimedFolder(tmp_path / "out") as claim:
        begin(claim, job)
        with ShardWriter(claim.staging, 1, job.description) as shard:
            compute(shard, 1, records)
        for is_copy in (False, True):
            with ShardWriter(claim.staging, 1, job.description, is_copy=is_copy) as again:
                assert again.finished == shard.finished
                assert again.images == SHARD
                assert again.finish() == shard.finished
                with pytest.raises(ValueError, match="shard 1 is finished"):
                    append(again, records, 4, 5)


def test_files_of_dead_attempts_are_removed_by_the_next_run(
    tmp_path: Path, job: Job, records: list[ImageRecord]
) -> None:
    with ClaimedFolder(tmp_path / "out") as claim:
        begin(claim, job)
        dead = ShardWriter(claim.staging, 1, job.description)
        append(dead, records, 4, 6)
        dead_copy = ShardWriter(claim.staging, 2, job.description, is_copy=True)
        with ShardWriter(claim.staging, 1, job.description, is_copy=True) as copy:
            compute(copy, 1, records)
        with ShardWriter(claim.staging, 3, job.description) as shard:
            append(shard, records, 12, 13)
        for attempt in (dead, dead_copy):  # as the kernel does
            attempt._file.close()
            attempt._held.close()
    with ClaimedFolder(tmp_path / "out") as claim:
        run = interrupted(claim, job).resume(job)
        assert run is not None
        assert [run.done_in(number) for number in range(SHARDS)] == [0, 4, 0, 1, 0, 0]
        left = {path.name for path in claim.staging.rglob("*") if path.is_file()}
    shard_1 = {"00001.npy", "00001.parquet", "00001.done"}
    shard_3 = {"00003.npy.partial", "00003.jsonl"}
    assert left == {"lock", "job.json", *shard_1, *shard_3}


def test_attempt_of_a_run_that_ended_does_not_finish_in_the_next_one(
    tmp_path: Path, job: Job, records: list[ImageRecord]
) -> None:
    with ClaimedFolder(tmp_path / "out") as claim:
        begin(claim, job)
        late = [
            ShardWriter(claim.staging, 1, job.description),
            ShardWriter(claim.staging, 1, job.description, is_copy=True),
        ]
        for attempt in late:
            append(attempt, records, 4, 8)
        claim.discard_work()
    with ClaimedFolder(tmp_path / "out") as claim:
        run = begin(claim, job)
        with run.shard(1) as shard:
            append(shard, records, 4, 6)
        for attempt in late:
            with attempt, pytest.raises(StoreError, match=r"removed or replaced|No such file"):
                attempt.finish()
        with run.shard(1) as shard:
            assert shard.images == 2


def test_missing_shard_cannot_be_collected(tmp_path: Path, job: Job) -> None:
    with ClaimedFolder(tmp_path / "out") as claim:
        run = begin(claim, job)
        with pytest.raises(StoreError, match=r"shard 3 of .* expected that nobody removes them"):
            run.collect(3)


@pytest.mark.slow
@pytest.mark.usefixtures("fixed_time")
def test_copies_and_originals_killed_anywhere_give_the_same_store(
    tmp_path: Path, job: Job, records: list[ImageRecord], tree: Tree
) -> None:
    undisturbed(tmp_path / "undisturbed", job, records)
    for seed, kills in itertools.product(range(10), (1, 4)):
        choose = random.Random(seed)
        out = tmp_path / f"{seed}-{kills}"
        with ClaimedFolder(out) as claim:
            begin(claim, job)
            for _ in range(kills):
                number, count = choose.randrange(SHARDS), choose.randrange(1, 5)
                child = os.fork()
                if child == 0:
                    try:
                        is_copy = choose.random() < 0.5
                        writer = ShardWriter(
                            claim.staging, number, job.description, is_copy=is_copy
                        )
                        compute(writer, number, records, count)
                    finally:
                        os._exit(9)
                os.waitpid(child, 0)
            claim.keep_work()
        with ClaimedFolder(out) as claim:
            existing = take_up(claim, job.description)
            run = existing.resume(job) if isinstance(existing, InterruptedRun) else None
            run = run or begin(claim, job)
            for number in range(SHARDS):
                with run.shard(number) as shard:
                    compute(shard, number, records)
            run.publish()
        assert tree(out) == tree(tmp_path / "undisturbed"), (seed, kills)
