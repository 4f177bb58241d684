"""The actor on a node of a Ray cluster: a worker, and what the driver asks of it.

Every method returns what went wrong as a :class:`~extractor.workers.worker_process.Failed`: an
exception would cross Ray with the stack of the node in its message.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from extractor.errors import UsageError
from extractor.lease.lease import Lease, Receipt
from extractor.lease.paths_file import PathsFile
from extractor.lease.software import software_versions
from extractor.workers.lease_queue import LeaseQueue
from extractor.workers.worker_process import (
    BatchDone,
    Failed,
    Ready,
    StopWorkerError,
    Warned,
    work,
)

if TYPE_CHECKING:
    from extractor.workers.trial import Trial
    from extractor.workers.worker import WorkerSetup

__all__ = ["NEWS_SECONDS", "ShardActor", "packed"]

NEWS_SECONDS = 1.0  # between two reports on the progress of an actor
SAMPLE = 8  # images that a node must see one of


@dataclass(frozen=True)
class _Packed:
    """What only an actor with the same software reads."""

    software: Mapping[str, str]
    folder: str  # that relative names of files start from
    content: bytes


def packed(content: WorkerSetup | Trial) -> _Packed:
    """Return what :meth:`ShardActor.prepare` or :meth:`ShardActor.run_trial` takes."""
    return _Packed(software_versions(), os.getcwd(), pickle.dumps(content))


class ShardActor:
    """Computes leased shards in a thread of its own, while others talk to the driver."""

    def __init__(self) -> None:
        self._leases = LeaseQueue()
        self._receipts: dict[int, Future[Receipt | Failed]] = {}
        self._changing = threading.Lock()
        self._failure: Failed | None = None
        self._news: list[BatchDone | Warned] = []
        self._copies: set[int] = set()
        self._stops = threading.Event()
        self._thread: threading.Thread | None = None

    def node(self) -> str:
        """Return the identifier of the node that this actor is on."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def prepare(self, content: _Packed) -> Ready | Failed:
        """Load the models, and return once they are ready."""
        try:
            setup = _on_this_machine(_unpacked(content))
        except UsageError as error:
            return Failed.of(error)
        if problem := _storage_problem(setup):
            return Failed("StoreError", problem)
        ready: Future[Ready | Failed] = Future()
        self._thread = threading.Thread(target=self._run, args=(setup, ready), name="worker")
        self._thread.daemon = True
        self._thread.start()
        return ready.result()

    def run_trial(self, content: _Packed) -> list[dict[str, Any]] | Failed:
        """Choose precision and compilation, see :func:`extractor.workers.trial.run_trial`."""
        try:
            trial = _unpacked(content)
            from extractor.workers.trial import run_trial

            return run_trial(trial)
        except Exception as error:
            return Failed.of(error)

    def compute(self, lease: Lease) -> Receipt | Failed:
        """Compute a shard, and return once it is on the disk.

        Several may be asked for at once. The images of the next one are decoded ahead.
        """
        receipt: Future[Receipt | Failed] = Future()
        with self._changing:
            if self._failure is not None:
                return self._failure
            self._receipts[lease.shard] = receipt
            if lease.is_copy:
                self._copies.add(lease.shard)
        self._leases.put(lease)
        return receipt.result()

    def news(self) -> list[BatchDone | Warned]:
        """Return what happened since the last call, after a moment."""
        self._stops.wait(NEWS_SECONDS)
        with self._changing:
            news, self._news = self._news, []
        return news

    def stop(self) -> None:
        """End after the current batch, and return then."""
        self._stops.set()
        self._leases.put(None)
        if self._thread is not None:
            self._thread.join()

    def _run(self, setup: WorkerSetup, ready: Future[Ready | Failed]) -> None:
        """Load the models, and compute what is leased, until the driver stops it."""
        failure = Failed("", "the worker was stopped")
        try:
            self._work(setup, ready)
        except StopWorkerError:
            pass
        except Exception as error:
            failure = Failed.of(error)
        with self._changing:
            self._failure = failure
            pending = list(self._receipts.values())
            self._receipts.clear()
        for receipt in pending:
            receipt.set_result(failure)
        if not ready.done():
            ready.set_result(failure)

    def _work(self, setup: WorkerSetup, ready: Future[Ready | Failed]) -> None:
        from extractor.system.process_tuning import keep_freed_memory, spin_briefly

        keep_freed_memory()
        spin_briefly()  # takes effect only before torch is imported
        work(
            setup,
            self._leases,
            on_ready=lambda: ready.set_result(Ready()),
            on_warning=self._tell,
            after_batch=self._after_batch,
            on_receipt=self._on_receipt,
        )

    def _after_batch(self, shard: int, done: int, failed: int) -> None:
        if shard not in self._copies:
            self._tell(BatchDone(shard, done, failed))
        if self._stops.is_set():
            raise StopWorkerError

    def _on_receipt(self, receipt: Receipt) -> None:
        with self._changing:
            pending = self._receipts.pop(receipt.shard)
        pending.set_result(receipt)

    def _tell(self, message: BatchDone | Warned) -> None:
        with self._changing:
            self._news.append(message)


def _unpacked(content: _Packed) -> Any:
    """Return what the driver packed, and change to its folder.

    Raises:
        UsageError: This node has other software.
    """
    own, expected = software_versions(), content.software
    names = ("extractor", "python", "torch", "torchvision", "timm")
    different = [
        f"{name} {own.get(name, 'none')} instead of {expected.get(name, 'none')}"
        for name in names
        if own.get(name) != expected.get(name)
    ]
    if different:
        raise UsageError(
            f"it has {', '.join(different)}; install the versions of the driver on all nodes"
        )
    with contextlib.suppress(OSError):
        os.chdir(content.folder)
    return pickle.loads(content.content)


def _on_this_machine(setup: WorkerSetup) -> WorkerSetup:
    """Return a setup whose slot for large images is that of this machine."""
    slot = setup.large_image_slot
    if slot is None:
        return setup
    return replace(setup, large_image_slot=slot.with_name(f"{slot.name}-{socket.gethostname()}"))


def _storage_problem(setup: WorkerSetup) -> str:
    """Return what this node does not see, in one sentence; empty if it sees all."""
    advice = "keep images and --out on storage that all nodes mount at the same path"
    if not setup.paths.is_dir():
        return f"it does not see the folder {setup.paths.parent} of the run; {advice}"
    images = sum(each.images for each in setup.plan.passes)
    step = max(images // SAMPLE, 1)
    paths = PathsFile(setup.paths)
    sample = [
        os.path.join(setup.root, paths.read(range(index, index + 1))[0])
        for index in range(0, images, step)
    ]
    if not any(map(os.path.exists, sample)):
        return f"it sees no image of {os.fsdecode(setup.root)}; {advice}"
    return ""
