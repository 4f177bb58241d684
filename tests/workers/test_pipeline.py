"""Shards go through one pipeline: each has its rows, its receipt and its files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.networks import mean_pixel, normalized

from extractor.compute.inputs import Inputs
from extractor.errors import StoreError
from extractor.lease.describe import describe
from extractor.lease.lease import Lease, Receipt
from extractor.lease.plan import PassPlan, RunPlan, StoreTarget
from extractor.models.embedding import EmbeddingPart, EmbeddingSpec
from extractor.options import Options
from extractor.store.format import FEATURES, IMAGES, JOURNAL, features_name
from extractor.store.shard import FinishedShard
from extractor.workers.opening import ShardOpener
from extractor.workers.pipeline import ShardPipeline, ShardWork

SIZE = 4  # images in a shard
IMAGES_OF_RUN = 10
COLORS = [(20 * i, 255 - 20 * i, 7) for i in range(IMAGES_OF_RUN)]


class StopError(Exception):
    """Ends the pipeline from a callback."""


class Run:
    """Three shards of solid images, in batches of two."""

    def __init__(self, folder: Path) -> None:
        self.staging = folder / "out/.extractor-partial"
        for name in (FEATURES, IMAGES, JOURNAL):
            (self.staging / name).mkdir(parents=True)
        self.paths = []
        for i, color in enumerate(COLORS):
            path = folder / f"{i}.png"
            Image.new("RGB", (8, 8), color).save(path)
            self.paths.append(bytes(path))
        options = Options(workers=2, shard_images=SIZE, device="cpu")
        spec = EmbeddingSpec("mean", (EmbeddingPart(mean_pixel()),))
        target = StoreTarget(
            self.staging, describe(spec, options, bytes(folder), 2), first=5, spec=0
        )
        self.plan = RunPlan([PassPlan([target], IMAGES_OF_RUN, SIZE)])
        self.inputs = Inputs(options, batch_size=2)
        self.specs = [spec]
        self.batches: list[tuple[int, int, int]] = []
        self.receipts: list[Receipt] = []
        self.stops_after = 10**9

    def compute(self, leases: Iterator[Lease]) -> None:
        opener = ShardOpener(self.plan, lambda images: self.paths[images.start : images.stop])
        pipeline = ShardPipeline(self.specs, self.inputs, self.staging / "in-flight", None)
        pipeline.compute(map(opener.open, leases), [0], self.after_batch, self.receipts.append)

    def after_batch(self, shard: int, done: int, failed: int) -> None:
        self.batches.append((shard, done, failed))
        if len(self.batches) == self.stops_after:
            raise StopError("stopped here")

    def rows(self, shard: int) -> np.ndarray:
        return np.load(self.staging / features_name(5 + shard))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def leases(*shards: int) -> Iterator[Lease]:
    return (Lease(shard) for shard in shards)


def expected(shard: int) -> np.ndarray:
    return np.array([normalized(color) for color in COLORS[shard * SIZE : (shard + 1) * SIZE]])


def test_shards_may_come_in_any_order(run: Run) -> None:
    run.compute(leases(2, 0, 1))
    for shard in range(3):
        np.testing.assert_allclose(run.rows(shard), expected(shard), atol=1e-6)
    assert run.batches == [(2, 2, 0), (0, 2, 0), (0, 4, 0), (1, 2, 0), (1, 4, 0)]
    assert [(r.shard, r.images, r.failed) for r in run.receipts] == [
        (2, 2, 0),
        (0, 4, 0),
        (1, 4, 0),
    ]


def test_failures_are_counted_in_the_receipt_of_their_shard(run: Run) -> None:
    for i in (1, 4, 5):
        Path(run.paths[i].decode()).write_bytes(b"no image")
    run.compute(leases(0, 1, 2))
    assert [receipt.failed for receipt in run.receipts] == [1, 2, 0]
    np.testing.assert_allclose(run.rows(0), expected(0)[[0, 2, 3]], atol=1e-6)
    second = FinishedShard.read(run.staging, 6)
    assert second is not None
    assert [failure.path for failure in second.failures] == [b"4.png", b"5.png"]


def test_interrupted_shard_goes_on_after_its_last_batch(run: Run) -> None:
    run.stops_after = 3  # the first batch of the second shard
    with pytest.raises(StopError, match="stopped here"):
        run.compute(leases(0, 1, 2))
    assert FinishedShard.read(run.staging, 6) is None
    run.compute(leases(1))
    assert run.batches[3:] == [(1, 4, 0)]
    np.testing.assert_allclose(run.rows(1), expected(1), atol=1e-6)


def test_shard_whose_images_are_all_done_is_finished_without_any(run: Run) -> None:
    run.stops_after = 2  # the last batch of the first shard
    with pytest.raises(StopError, match="stopped here"):
        run.compute(leases(0))
    run.compute(leases(0, 2))
    assert [(r.shard, r.images) for r in run.receipts] == [(0, 0), (2, 2)]
    np.testing.assert_allclose(run.rows(0), expected(0), atol=1e-6)


def test_finished_shard_is_not_computed_again(run: Run) -> None:
    run.compute(leases(0))
    run.compute(leases(0, 1))
    assert [(r.shard, r.images) for r in run.receipts] == [(0, 4), (0, 0), (1, 4)]


def test_copy_gives_way_to_the_shard_that_is_finished(run: Run) -> None:
    run.compute(leases(0))
    before = run.rows(0)
    run.compute(iter([Lease(0, is_copy=True)]))
    np.testing.assert_array_equal(run.rows(0), before)
    assert [receipt.images for receipt in run.receipts] == [4, 0]


def test_pipeline_without_leases_does_nothing(run: Run) -> None:
    run.compute(leases())
    assert not run.receipts
    assert not (run.staging / "in-flight").exists()


@pytest.mark.parametrize("images", [1, 2, 7, 24, 25])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batches_cover_each_image_once_wherever_the_work_starts(
    images: int, batch_size: int
) -> None:
    for done in {0, min(batch_size, images), images}:
        outputs: list[Any] = [SimpleNamespace(done=done), SimpleNamespace(done=images)]
        batches = ShardWork(Lease(0), [b""] * images, outputs).batches(batch_size)
        assert [i for batch in batches for i in batch] == list(range(done, images))
        assert all(batch.start % batch_size == 0 for batch in batches)
        assert all(1 <= len(batch) <= batch_size for batch in batches)


@pytest.mark.parametrize("folder", [FEATURES, JOURNAL])
def test_shard_that_cannot_be_opened_is_an_error_of_the_store(run: Run, folder: str) -> None:
    """On a full disk, or where somebody removed the folder."""
    shutil.rmtree(run.staging / folder)
    with pytest.raises(StoreError, match=r"cannot write the store .*out: No such file"):
        run.compute(leases(0))
