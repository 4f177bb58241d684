"""The actor on a node: what it refuses, and how it answers. Needs no Ray."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

import extractor.workers.ray_actor as module
import extractor.workers.worker as worker_module
from extractor.errors import DeviceError
from extractor.lease.lease import Lease, Receipt
from extractor.lease.paths_file import write_paths
from extractor.lease.plan import PassPlan, RunPlan, StoreTarget
from extractor.options import Options
from extractor.workers.ray_actor import ShardActor, packed
from extractor.workers.worker import WorkerSetup
from extractor.workers.worker_process import BatchDone, Failed, Ready

PATHS = [b"a.jpg", b"b.jpg", b"c.jpg"]


@pytest.fixture(autouse=True)
def same_folder() -> Iterator[None]:
    """An actor changes into the folder of its driver."""
    before = os.getcwd()
    yield
    os.chdir(before)


@pytest.fixture
def setup(tmp_path: Path, describe_store: Callable[..., object]) -> WorkerSetup:
    target = StoreTarget(tmp_path, describe_store(), first=0, spec=0)
    images = tmp_path / "images"
    images.mkdir()
    (images / "b.jpg").write_bytes(b"")
    write_paths(tmp_path / "workers", PATHS)
    return WorkerSetup(
        models=("timm:none",),
        options=Options(threads=1),
        weights={},
        plan=RunPlan([PassPlan([target], images=3, shard_images=2)]),
        paths=tmp_path / "workers",
        root=os.fsencode(images),
        batch_size=2,
        sample=(),
        suspects=(),
        crash_log=tmp_path / "in-flight",
        large_image_slot=tmp_path / "large-image",
    )


class Worker:
    """Stands for the worker: computes a lease, and fails from shard 9 on."""

    def __init__(self, setup: WorkerSetup) -> None:
        self.setup = setup

    def compute(
        self,
        leases: Callable[[], Lease | None],
        after_batch: Callable[[int, int, int], None],
        on_receipt: Callable[[Receipt], None],
    ) -> None:
        while (lease := leases()) is not None:
            if lease.shard >= 9:
                raise DeviceError("the device is full")
            after_batch(lease.shard, 2, 1)
            on_receipt(Receipt(lease.shard, 2, 1, {}, 0.1))


@pytest.fixture
def actor(setup: WorkerSetup, monkeypatch: pytest.MonkeyPatch) -> Iterator[ShardActor]:
    monkeypatch.setattr(worker_module, "ShardWorker", Worker)
    monkeypatch.setattr(module, "NEWS_SECONDS", 0.01)
    actor = ShardActor()
    assert actor.prepare(packed(setup)) == Ready()
    yield actor
    actor.stop()


def test_leases_are_computed_in_their_order_and_reported(actor: ShardActor) -> None:
    with ThreadPoolExecutor(2) as threads:
        receipts = list(threads.map(actor.compute, [Lease(0), Lease(1)]))

    assert [receipt.shard for receipt in receipts] == [0, 1]
    assert sorted(news.shard for news in actor.news()) == [0, 1]


def test_the_progress_of_a_copy_is_not_counted(actor: ShardActor) -> None:
    actor.compute(Lease(0, is_copy=True))
    actor.compute(Lease(1))
    assert actor.news() == [BatchDone(1, 2, 1)]


def test_an_error_ends_the_worker_and_answers_all_leases(actor: ShardActor) -> None:
    failure = Failed("DeviceError", "the device is full")
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(actor.compute, [Lease(9), Lease(10)])) == [failure, failure]
    assert actor.compute(Lease(3)) == failure


def test_another_version_is_refused_before_the_setup_is_read() -> None:
    content = replace(packed(None), software={"extractor": "0.0.1", "python": "3.0"}, content=b"\0")
    failed = ShardActor().prepare(content)
    assert isinstance(failed, Failed)
    assert "instead of 0.0.1, python " in failed.message
    assert failed.message.endswith("install the versions of the driver on all nodes")


def test_an_output_folder_that_the_node_does_not_see_is_refused(setup: WorkerSetup) -> None:
    failed = ShardActor().prepare(packed(replace(setup, paths=setup.paths / "elsewhere")))
    assert isinstance(failed, Failed)
    assert f"it does not see the folder {setup.paths} of the run; keep images" in failed.message


def test_images_that_the_node_does_not_see_are_refused(setup: WorkerSetup) -> None:
    failed = ShardActor().prepare(packed(replace(setup, root=b"/nowhere")))
    assert failed == Failed("StoreError", module._storage_problem(replace(setup, root=b"/nowhere")))
    assert "it sees no image of /nowhere; keep images and --out on storage" in failed.message


def test_a_model_that_does_not_load_is_refused(setup: WorkerSetup) -> None:
    failed = ShardActor().prepare(packed(setup))
    assert isinstance(failed, Failed)
    assert failed.kind == "ModelError"
