"""A run passes from state to state: existing store, interrupted run, run, published store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from extractor.errors import StoreError
from extractor.reading.reader import FeatureStore
from extractor.store.claim import ClaimedFolder
from extractor.store.format import STAGING, Description
from extractor.store.index import ImageRecord
from extractor.store.job import Job
from extractor.store.writer import (
    ExistingStore,
    InterruptedRun,
    StoreRun,
    existing_computation,
    take_up,
)

MakeRecords = Callable[..., list[ImageRecord]]
NAMES = [b"%d" % i for i in range(10)]


def compute(run: StoreRun, records: list[ImageRecord], start: int, stop: int) -> None:
    """Compute images in batches of one and shards of four."""
    first = run.job.first
    for i in range(start, stop):
        with run.shard(first + i // 4) as shard:
            shard.append(np.array([[int(records[i].path), 1, 2]], np.float32), records[i : i + 1])
            if shard.images == run.job.images_in_shard(first + i // 4):
                shard.finish()


@pytest.fixture
def job(describe_store: Callable[..., Description]) -> Job:
    """Job of ten images in shards of four."""
    return Job(describe_store(), 10, "0" * 64)


@pytest.fixture
def records(make_records: MakeRecords) -> list[ImageRecord]:
    """One record per image of the job."""
    return make_records(NAMES)


@pytest.fixture
def out(tmp_path: Path, job: Job, records: list[ImageRecord]) -> Path:
    """Folder of a run that was interrupted after six images: a shard and a half."""
    with ClaimedFolder(tmp_path / "out") as claim:
        existing = take_up(claim, job.description)
        assert isinstance(existing, ExistingStore)
        compute(existing.begin(job), records, 0, 6)
    return tmp_path / "out"


def take_up_interrupted(claim: ClaimedFolder, job: Job) -> InterruptedRun:
    existing = take_up(claim, job.description)
    assert isinstance(existing, InterruptedRun)
    return existing


def paths_of(existing: InterruptedRun, *, planned: bool) -> list[bytes]:
    stored = existing.stored(planned=planned, digests=False)
    return [path for images in stored.shards.values() for path in images.paths]


def test_interrupted_run_resumes_after_its_last_batch(
    out: Path, job: Job, records: list[ImageRecord]
) -> None:
    with ClaimedFolder(out) as claim:
        existing = take_up_interrupted(claim, job)
        assert paths_of(existing, planned=False) == []
        assert paths_of(existing, planned=True) == NAMES[:6]
        run = existing.resume(job)
        assert run is not None
        assert run.resumed == 6
        compute(run, records, 6, 10)
        run.publish()
    assert FeatureStore.open(out).features[:, 0].tolist() == list(range(10))


def test_interrupted_run_resumes_only_an_equal_job(out: Path, job: Job) -> None:
    with ClaimedFolder(out) as claim:
        existing = take_up_interrupted(claim, job)
        assert existing.resume(replace(job, images=11)) is None
        assert existing.resume(replace(job, listing="1" * 64)) is None
        assert existing.resume(job) is not None


def test_sealed_run_keeps_its_rows_and_the_next_shard_follows(
    out: Path, job: Job, records: list[ImageRecord]
) -> None:
    with ClaimedFolder(out) as claim:
        sealed = take_up_interrupted(claim, job).seal()
        stored = sealed.stored(digests=False)
        assert [list(images.paths) for images in stored.shards.values()] == [NAMES[:4], NAMES[4:6]]
        assert sealed.first_shard == 2
        rest = Job(job.description, 4, "1" * 64, first=sealed.first_shard)
        run = sealed.begin(rest)
        compute(run, records[6:], 0, 4)
        manifest = run.publish()
    assert [(shard.shard, shard.rows) for shard in manifest.shards] == [(0, 4), (1, 2), (2, 4)]
    assert FeatureStore.open(out).features[:, 0].tolist() == list(range(10))


def test_interrupted_run_survives_a_claim_that_does_nothing(out: Path, job: Job) -> None:
    for _ in range(2):
        with ClaimedFolder(out) as claim:
            assert existing_computation(claim, job.description) is not None
    with ClaimedFolder(out) as claim:
        assert paths_of(take_up_interrupted(claim, job), planned=True) == NAMES[:6]


def test_discarded_work_is_removed(out: Path, job: Job) -> None:
    with ClaimedFolder(out) as claim:
        take_up_interrupted(claim, job)
        claim.discard_work()
    assert not (out / STAGING).exists()


def test_interrupted_run_of_something_else_is_rejected_and_kept(
    out: Path, job: Job, describe_store: Callable[..., Description]
) -> None:
    other = describe_store(preprocess={"size": [9, 9]})
    message = r"interrupted run of something else \(preprocess.size: \[8, 8\] there, \[9, 9\] now\)"
    with ClaimedFolder(out) as claim, pytest.raises(StoreError, match=message):
        take_up(claim, other)
    with ClaimedFolder(out, overwrite=True) as claim:
        assert isinstance(take_up(claim, other), ExistingStore)
    with ClaimedFolder(out) as claim:
        take_up_interrupted(claim, job)


def test_earlier_name_of_weights_that_sets_the_pixels_is_named(
    tmp_path: Path,
    write_store: Callable[..., Path],
    parts: list[np.ndarray],
    describe_store: Callable[..., Description],
) -> None:
    backbone = {"model": "timm:tiny", "tag": "a1", "sha256": "0123456789abcdef"}
    before, now = (
        {"backbone": {**backbone, "source": source}, "preprocess": {"size": [size, size]}}
        for source, size in (("https://host/net-0123abcd.pth", 8), ("mine.pth", 9))
    )
    out = write_store(tmp_path / "finished", parts, **before)
    message = r"preprocess\.size.* file of the weights its earlier name, net-0123abcd\.pth, which"
    with ClaimedFolder(out, extend=True) as claim, pytest.raises(StoreError, match=message):
        take_up(claim, describe_store(**now))


def test_run_of_images_elsewhere_resumes_unless_it_starts_over(
    out: Path, job: Job, describe_store: Callable[..., Description]
) -> None:
    other = replace(job, description=describe_store(root="/elsewhere"))
    with ClaimedFolder(out, overwrite=True) as claim:
        assert existing_computation(claim, other.description) is None
        assert isinstance(take_up(claim, other.description), ExistingStore)
    with ClaimedFolder(out) as claim:
        assert take_up_interrupted(claim, other).resume(other) is not None
        assert claim.staged_job() == replace(other, first_id=0)


def test_run_that_does_not_extend_its_store_is_rejected(
    out: Path, job: Job, write_store: Callable[..., Path], parts: list[np.ndarray], tmp_path: Path
) -> None:
    write_store(tmp_path / "other", parts)
    for name in ("store.json", "features", "images", "failures.jsonl", "history.jsonl"):
        (tmp_path / "other" / name).rename(out / name)
    message = "does not extend its store; start over with --overwrite"
    with ClaimedFolder(out, extend=True) as claim, pytest.raises(StoreError, match=message):
        take_up(claim, job.description)


def test_job_with_too_many_shards_is_rejected(
    describe_store: Callable[..., Description],
) -> None:
    description = describe_store(shard_images=2)
    Job(description, 200_000, "0" * 64)
    with pytest.raises(StoreError, match=r"200,001 images in shards of 2 need more than 100,000"):
        Job(description, 200_001, "0" * 64)
    with pytest.raises(StoreError, match=r"1 image in shards of 2 after 100,000 existing shards"):
        Job(description, 1, "0" * 64, first=100_000)
