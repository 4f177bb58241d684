"""Workers on the nodes of a Ray cluster.

Only leases, receipts and the progress cross Ray. Images, rows and the list of paths are on storage
that all nodes share.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from extractor.errors import ExtractorError
from extractor.lease.board import Board
from extractor.lease.lease import Lease, Receipt
from extractor.lease.listener import Listener
from extractor.loading.crash_log import CrashLog
from extractor.text import first_line
from extractor.workers.ray_actor import ShardActor, packed
from extractor.workers.ray_cluster import Demand, demand_of_workers, nodes_of_cluster
from extractor.workers.trial import Trial
from extractor.workers.worker import WorkerSetup
from extractor.workers.worker_process import BatchDone, Failed, Ready, Warned

__all__ = ["RayWorkers", "run_trial_on_cluster"]

log = logging.getLogger(__name__)

TICK_SECONDS = 0.2
GROW_SECONDS = 5.0  # between two looks at the nodes of the cluster
WAIT_SECONDS = 15.0  # without any worker, before the user is told
GRACE_SECONDS = 4.0  # for the current batch, once the run should stop
START_ATTEMPTS = 3  # deaths in a row, before the first worker is ready

# A shard runs a second time once it takes so much longer than the others, and at least so long.
SLOW_FACTOR = 1.5
SLOW_SECONDS = 10.0

COLORS = re.compile(r"\x1b\[[0-9;]*m")  # Ray writes for terminals


def run_trial_on_cluster(trial: Trial) -> list[dict[str, Any]]:
    """Choose precision and compilation on the first node that has room for a worker.

    Raises:
        ExtractorError: The node cannot do it.
    """
    import ray

    demand, _ = demand_of_workers(trial.options, trial.options.device)
    worker = _Worker(0, Path(), demand)
    try:
        pending = worker.actor.run_trial.remote(packed(trial))
        while not ray.wait([pending], timeout=WAIT_SECONDS)[0]:
            log.warning("waiting for a node with %s", demand)
        answer = ray.get(pending)
    except ray.exceptions.RayError as error:
        raise ExtractorError(
            f"no worker could start on the Ray cluster: {_death_text(error)}"
        ) from error
    finally:
        worker.kill()
    if isinstance(answer, Failed):
        raise answer.error or ExtractorError(answer.message)
    chosen: list[dict[str, Any]] = answer
    return chosen


class RayWorkers:
    """Computes the shards of a board on the nodes of a cluster.

    A worker that dies loses its leases, and another one takes its place where there is room. Nodes
    that join get workers. Near the end, idle workers race those that are much slower than others.

    Args:
        setup: Setup of every worker; its crash log gets the number of the worker as a suffix.
        demand: What each worker needs.
        board: Shards to compute.
        listener: Hears of the progress.

    Attributes:
        nodes: Address of the node of each worker that was ready once.
        start_seconds: Time until the first worker had loaded the models.
    """

    def __init__(
        self, setup: WorkerSetup, demand: Demand, board: Board, listener: Listener
    ) -> None:
        self.nodes: dict[int, str] = {}
        self.start_seconds = 0.0
        self._setup = setup
        self._demand = demand
        self._board = board
        self._listener = listener
        self._workers: dict[int, _Worker] = {}
        self._refused: dict[int, _Worker] = {}  # keep their place, so that no other one gets it
        self._waiting: dict[Any, tuple[_Worker, _Handler]] = {}
        self._seconds: list[float] = []
        self._started = 0
        self._deaths = 0  # in a row, before any worker was ready
        self._grown = self._warned = self._begun = 0.0

    def run(self) -> None:
        """Compute all shards.

        Raises:
            InterruptedRunError: The listener asked to stop.
            ExtractorError: No worker can work.
        """
        self._begun = self._warned = time.monotonic()
        try:
            while not (self._board.is_done or self._board.is_hopeless):
                self._grow()
                self._hand_out()
                self._listen()
                self._listener.on_tick()
        finally:
            self._end()

    def _grow(self) -> None:
        """Start workers where the cluster has room, but no more than there are shards left."""
        now = time.monotonic()
        if now - self._grown < GROW_SECONDS and self._workers:
            return
        self._grown = now
        held = {lease.shard for leases in self._board.running.values() for lease in leases}
        left = self._board.waiting + len(held)
        room = max(self._demand.fits(nodes_of_cluster()) - len(self._refused), 0)
        if not self._refused:
            room = max(room, 1)  # a request that waits makes an autoscaler add a node
        for _ in range(min(left, room) - len(self._workers)):
            self._start()
        if now - self._warned < WAIT_SECONDS or any(each.node for each in self._workers.values()):
            return
        self._warned = now
        self._listener.on_warning(0, f"waiting for a node with {self._demand}")

    def _start(self) -> None:
        number, self._started = self._started, self._started + 1
        crash_log = self._setup.crash_log
        crash_log = crash_log.with_name(f"{crash_log.name}-{number}")
        worker = _Worker(number, crash_log, self._demand)
        self._workers[number] = worker
        setup = packed(replace(self._setup, crash_log=crash_log))
        self._wait_for(worker, worker.actor.node.remote(), self._on_node)
        self._wait_for(worker, worker.actor.prepare.remote(setup), self._on_ready)

    def _wait_for(self, worker: _Worker, reference: Any, handler: _Handler) -> None:
        self._waiting[reference] = (worker, handler)

    def _hand_out(self) -> None:
        """Hand out leases, and copies of the slowest once there are no others."""
        ready = {number: worker for number, worker in self._workers.items() if worker.is_ready}
        running = self._board.running
        for number, lease in self._board.hand_out(list(ready), len(self._workers)):
            self._lease(ready[number], lease)
        if self._board.waiting or not self._may_copy(running):
            return
        for number, worker in ready.items():
            copy = None if worker.is_busy else self._board.copy_for(number)
            if copy is not None:
                self._lease(worker, copy)

    def _may_copy(self, running: Any) -> bool:
        """Return whether a shard takes much longer than the others did."""
        if not self._setup.options.lock:  # without locks, two attempts could mix their files
            return False
        ages = [worker.age for worker in self._workers.values() if worker.number in running]
        seconds = sorted(self._seconds)
        usual = seconds[len(seconds) // 2] if seconds else 0.0
        return bool(seconds) and max(ages, default=0.0) > max(usual * SLOW_FACTOR, SLOW_SECONDS)

    def _lease(self, worker: _Worker, lease: Lease) -> None:
        if not worker.leases:
            worker.since = time.monotonic()
        worker.leases.add(lease.shard)
        self._wait_for(
            worker,
            worker.actor.compute.remote(lease),
            lambda worker, answer: self._on_answer(worker, lease, answer),
        )

    def _listen(self) -> None:
        """Handle the answers of actors, until nothing is left or it is time for a tick."""
        import ray

        references = list(self._waiting)
        if not references:
            time.sleep(TICK_SECONDS)
            return
        arrived, rest = ray.wait(references, num_returns=1, timeout=TICK_SECONDS)
        if arrived and rest:
            arrived += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        for reference in arrived:
            if reference not in self._waiting:  # of a worker that died meanwhile
                continue
            worker, handler = self._waiting.pop(reference)
            try:
                answer = ray.get(reference)
            except ray.exceptions.RayError as error:
                self._on_death(worker, error)
            else:
                handler(worker, answer)

    def _on_node(self, worker: _Worker, node: str) -> None:
        worker.node = node

    def _on_ready(self, worker: _Worker, answer: Ready | Failed) -> None:
        if isinstance(answer, Failed):
            self._refuse(worker, answer)
            return
        worker.is_ready = True
        self._deaths = 0
        if not self.nodes:
            self.start_seconds = time.monotonic() - self._begun
        self.nodes[worker.number] = worker.node_address()
        self._wait_for(worker, worker.actor.news.remote(), self._on_news)

    def _refuse(self, worker: _Worker, failure: Failed) -> None:
        """Go on without a node that cannot do the work.

        Raises:
            ExtractorError: No other one can.
        """
        del self._workers[worker.number]
        self._refused[worker.number] = worker
        text = f"node {worker.node_address()} cannot take part: {failure.message}"
        if not self._workers:
            raise replace(failure, message=text).error or ExtractorError(text)
        self._listener.on_warning(worker.number, text)

    def _on_news(self, worker: _Worker, news: list[BatchDone | Warned]) -> None:
        for message in news:
            if isinstance(message, Warned):
                self._listener.on_warning(worker.number, message.message)
            else:
                self._listener.on_batch(worker.number, message.shard, message.done, message.failed)
                if message.done == len(self._setup.plan[message.shard].images):
                    self._board.note_computed(message.shard)
        self._wait_for(worker, worker.actor.news.remote(), self._on_news)

    def _on_answer(self, worker: _Worker, lease: Lease, answer: Receipt | Failed) -> None:
        if isinstance(answer, Failed):
            self._on_failure(worker, answer)
            return
        worker.leases.discard(lease.shard)
        worker.since = time.monotonic()
        receipt = replace(answer, worker=worker.number)
        self._seconds.append(receipt.wall_seconds)
        if self._board.settle(receipt):
            self._listener.on_receipt(receipt)

    def _on_failure(self, worker: _Worker, failure: Failed) -> None:
        """Replace a worker that ended with an error.

        Raises:
            ExtractorError: Every other worker would end in the same way.
        """
        if failure.fatal_error is not None:
            raise failure.fatal_error
        self._lose(worker, failure.message, counts=True, suspects=[])

    def _on_death(self, worker: _Worker, error: Exception) -> None:
        """Replace a worker whose process, node or connection is gone.

        Raises:
            ExtractorError: No worker has become ready in several attempts.
        """
        if worker.number not in self._workers:
            return
        is_preempted = bool(getattr(error, "preempted", False))
        text = "its node was taken away" if is_preempted else _death_text(error)
        is_cut_off = isinstance(error, _ray_errors().ActorUnavailableError)
        suspects: list[bytes] = []
        if not (is_preempted or is_cut_off) and worker.is_on_live_node():
            suspects = CrashLog.read(worker.crash_log)
        if suspects:
            self._listener.on_suspects(worker.number, suspects)
        if not worker.is_ready:
            self._deaths += 1
        if self._deaths >= START_ATTEMPTS and not any(w.is_ready for w in self._workers.values()):
            raise ExtractorError(f"no worker could start on the Ray cluster: {text}")
        self._lose(worker, text, counts=not (is_preempted or is_cut_off), suspects=suspects)

    def _lose(self, worker: _Worker, text: str, *, counts: bool, suspects: list[bytes]) -> None:
        del self._workers[worker.number]
        mine = [ref for ref, (of, _) in self._waiting.items() if of is worker]
        for reference in mine:
            del self._waiting[reference]
        worker.kill()
        self._board.lose(worker.number, text, suspects=suspects, counts=counts)
        self._grown = 0.0
        if not self._board.is_done:
            text = f"worker {worker.number + 1} ended ({text}); another one takes its place"
            self._listener.on_warning(worker.number, text)

    def _end(self) -> None:
        """End all workers: those that compute may finish their batch."""
        import ray

        stopping = [worker.actor.stop.remote() for worker in self._workers.values()]
        if stopping:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.wait(stopping, num_returns=len(stopping), timeout=GRACE_SECONDS)
        for worker in (*self._workers.values(), *self._refused.values()):
            worker.kill()


class _Worker:
    """One actor, as the driver sees it."""

    def __init__(self, number: int, crash_log: Path, demand: Demand) -> None:
        import ray

        self.number = number
        self.crash_log = crash_log
        self.is_ready = False
        self.leases: set[int] = set()
        self.since = 0.0
        self.node = ""
        # Restarts are ours: the log of the images in its hands must be read before.
        make = ray.remote(
            num_cpus=demand.cores,
            num_gpus=demand.gpus,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=8,  # two leases, the news and the end
            scheduling_strategy="SPREAD",
        )
        self.actor: Any = make(ShardActor).remote()

    @property
    def is_busy(self) -> bool:
        return bool(self.leases)

    @property
    def age(self) -> float:
        """Seconds since it began its shard."""
        return time.monotonic() - self.since if self.leases else 0.0

    def is_on_live_node(self) -> bool:
        """Return whether Ray says that its node is alive."""
        import ray

        return any(node["NodeID"] == self.node and node["Alive"] for node in ray.nodes())

    def node_address(self) -> str:
        """Return the address of its node, for people."""
        import ray

        found = [node for node in ray.nodes() if node["NodeID"] == self.node]
        return str(found[0]["NodeManagerAddress"]) if found else "unknown"

    def kill(self) -> None:
        import ray

        with contextlib.suppress(Exception):
            ray.kill(self.actor)


_Handler = Callable[["_Worker", Any], None]


def _death_text(error: Exception) -> str:
    """Return why an actor is gone, in a few words; Ray needs a page for it."""
    text = str(error)
    if "No module named 'extractor" in text:
        return "its node lacks this program; install it on all nodes"
    if isinstance(error, _ray_errors().OutOfMemoryError):
        return "out of memory"
    if "node has died" in text or "node died" in text:
        return "its node died"
    if "process has died" in text:
        return "its process died, maybe out of memory"
    lines = [COLORS.sub("", line).strip() for line in text.splitlines() if line.strip()]
    if "creation task" in text:  # the last line is that of a traceback
        return f"it could not start: {lines[-1][:200]}"
    causes = [line for line in lines if " because " in line]
    return f"{type(error).__name__}: {causes[0][:200] if causes else first_line(error)}"


def _ray_errors() -> Any:
    import ray

    return ray.exceptions
