"""Workers in processes of their own on this machine."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from extractor.errors import ExtractorError
from extractor.lease.board import Board
from extractor.lease.lease import Receipt
from extractor.lease.listener import Listener
from extractor.loading.crash_log import CrashLog
from extractor.models.from_file import path_without_models
from extractor.text import exit_in_words
from extractor.workers.worker import WorkerSetup
from extractor.workers.worker_process import BatchDone, Failed, Ready, Warned

__all__ = ["LocalWorkers"]

TICK_SECONDS = 0.2
GRACE_SECONDS = 4.0  # for the current batch, once the run should stop
START_ATTEMPTS = 3  # of a worker before the run goes on without it

# What a child runs: this package, found where the driver found it, whatever lies in its folder.
START = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from extractor.workers.worker_process import main; main(int(sys.argv[1]))"
)


class LocalWorkers:
    """Computes the shards of a board in several processes.

    A worker that dies loses its leases. They are leased again, from the last row on the disk, and a
    new worker takes its place.

    Args:
        setups: Setup of each worker.
        board: Shards to compute.
        listener: Hears of the progress.

    Attributes:
        start_seconds: Time until the first worker had loaded the models.
    """

    def __init__(self, setups: Sequence[WorkerSetup], board: Board, listener: Listener) -> None:
        self._setups = setups
        self._board = board
        self._listener = listener
        self._workers: dict[int, _Worker] = {}
        self._begun = time.perf_counter()
        self.start_seconds = 0.0
        self._starts = dict.fromkeys(range(len(setups)), 0)  # in a row that did not get ready

    def run(self) -> None:
        """Compute all shards.

        Raises:
            InterruptedRunError: The listener asked to stop.
            ExtractorError: No worker can work.
        """
        try:
            for number in range(len(self._setups)):
                self._start(number)
            while not (self._board.is_done or self._board.is_hopeless):
                self._hand_out()
                self._listen()
                self._listener.on_tick()
        finally:
            self._end()

    def _start(self, number: int) -> None:
        setup = self._setups[number]
        with _delayed_signals():  # of the child until it handles them, and between these two steps
            worker = self._workers[number] = _Worker(setup.crash_log)
        worker.send(setup)

    def _hand_out(self) -> None:
        ready = [number for number, worker in self._workers.items() if worker.is_ready]
        for number, lease in self._board.hand_out(ready, len(self._workers)):
            self._workers[number].send(lease)

    def _listen(self) -> None:
        """Handle what workers say, until nothing is left or it is time for a tick."""
        connections = {worker.connection: number for number, worker in self._workers.items()}
        for connection in wait(list(connections), TICK_SECONDS):
            number = connections[connection]  # type: ignore[index]
            worker = self._workers[number]
            for message in worker.messages():
                self._handle(number, worker, message)
            if worker.has_ended:
                self._replace(number, worker)

    def _handle(self, number: int, worker: _Worker, message: object) -> None:
        if isinstance(message, Ready):
            worker.is_ready = True
            self.start_seconds = self.start_seconds or time.perf_counter() - self._begun
            self._starts[number] = 0
        elif isinstance(message, BatchDone):
            self._listener.on_batch(number, message.shard, message.done, message.failed)
            if message.done == len(self._setups[number].plan[message.shard].images):
                self._board.note_computed(message.shard)
        elif isinstance(message, Receipt):
            receipt = replace(message, worker=number)
            if self._board.settle(receipt):
                self._listener.on_receipt(receipt)
        elif isinstance(message, Warned):
            self._listener.on_warning(number, message.message)
        elif isinstance(message, Failed):
            worker.failure = message

    def _replace(self, number: int, worker: _Worker) -> None:
        """Take back the leases of a worker that ended, and start another one.

        Raises:
            ExtractorError: Every other worker would end in the same way.
        """
        failure = worker.failure
        error = failure.message if failure is not None else worker.exit_text
        if failure is not None and failure.fatal_error is not None:
            raise failure.fatal_error
        suspects = CrashLog.read(worker.crash_log)
        worker.crash_log.unlink(missing_ok=True)
        if suspects:
            self._listener.on_suspects(number, suspects)
        self._board.lose(number, error, suspects=suspects)
        del self._workers[number]
        if not worker.is_ready:
            self._starts[number] += START_ATTEMPTS if failure is not None else 1
        if self._board.is_done:
            return
        if self._starts[number] < START_ATTEMPTS:
            text = f"worker {number + 1} ended ({error}); another one takes its place"
            self._listener.on_warning(number, text)
            self._start(number)
            return
        if not self._workers:
            raise ExtractorError(f"no worker could start: {error}")
        text = f"worker {number + 1} did not start ({error}); the run goes on without it"
        self._listener.on_warning(number, text)

    def _end(self) -> None:
        """End all workers: those that compute may finish their batch."""
        workers = list(self._workers.values())
        try:
            for worker in workers:
                worker.send(None)
            deadline = time.monotonic() + GRACE_SECONDS
            for worker in workers:
                worker.wait(deadline)
        finally:  # also after a second signal
            with _delayed_signals():
                for worker in workers:
                    worker.kill()


class _Worker:
    """One child process, and the driver's end of its socket."""

    def __init__(self, crash_log: Path) -> None:
        self.crash_log = crash_log
        self.failure: Failed | None = None
        self.is_ready = False
        self.has_ended = False
        ours, theirs = socket.socketpair()
        with ours, theirs:
            arguments = [sys.executable, "-c", START, str(theirs.fileno()), *path_without_models()]
            self._process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
            )
            self.connection = Connection(ours.detach())

    def send(self, message: object) -> None:
        """Send a message; a worker that died meanwhile is noticed where messages are read."""
        with contextlib.suppress(OSError):
            self.connection.send(message)

    def messages(self) -> Iterator[object]:
        """Yield what has arrived."""
        try:
            while self.connection.poll():
                yield self.connection.recv()
        except (EOFError, OSError):
            self.has_ended = True
            self._process.wait()
            self.connection.close()

    @property
    def exit_text(self) -> str:
        """Why the process ended, in a few words."""
        text = exit_in_words(self._process.returncode)
        return f"{text}, maybe out of memory" if text == "SIGKILL" else text

    def wait(self, deadline: float) -> None:
        """Wait until the process ends by itself, at most until a deadline."""
        with contextlib.suppress(EOFError, OSError):
            while self.connection.poll(max(deadline - time.monotonic(), 0)):
                self.connection.recv()  # it could not end with a full socket
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(deadline - time.monotonic(), 0.01))

    def kill(self) -> None:
        """End the process if it has not ended."""
        self._process.kill()
        self._process.wait()
        self.connection.close()


@contextlib.contextmanager
def _delayed_signals() -> Iterator[None]:
    """Handle signals after the block; a child that it starts gets none before it unblocks them."""
    numbers = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
    arrived: list[int] = []
    handlers: dict[signal.Signals, Any] = {}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        # Another thread may receive a signal, and Python then handles it in the main thread.
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                if signal.getsignal(number) is not None:
                    handlers[number] = signal.signal(number, lambda n, _: arrived.append(n))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for arrived_number in arrived:
            signal.raise_signal(arrived_number)
