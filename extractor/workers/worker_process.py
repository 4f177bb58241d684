"""The child process of a worker. The driver starts it, and talks to it through a socket.

The driver sends a :class:`~extractor.workers.worker.WorkerSetup`, then leases, then None to stop.
The child sends :class:`Ready`, and then a :class:`BatchDone` per batch and a
:class:`~extractor.lease.lease.Receipt` per shard. It ends when the socket does.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from extractor import errors
from extractor.errors import ExtractorError
from extractor.system.memory import share_memory
from extractor.system.process_tuning import (
    die_with_parent,
    freeze_imports,
    keep_freed_memory,
    spin_briefly,
)
from extractor.text import first_line
from extractor.workers.lease_queue import LeaseQueue

if TYPE_CHECKING:
    from extractor.workers.pipeline import AfterBatch, OnReceipt
    from extractor.workers.worker import WorkerSetup

__all__ = [
    "BatchDone",
    "Failed",
    "Ready",
    "StopWorkerError",
    "Warned",
    "main",
    "work",
]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

# Errors of one image, one shard or one device. All others end every worker in the same way.
NOT_FATAL = frozenset({"DeviceError", "DecodeError"})


@dataclass(frozen=True)
class Ready:
    """The models are loaded."""


@dataclass(frozen=True)
class BatchDone:
    """A batch is computed: images of the shard that are done, and failures of the batch."""

    shard: int
    done: int
    failed: int


@dataclass(frozen=True)
class Warned:
    """A warning for the user."""

    message: str


@dataclass(frozen=True)
class Failed:
    """Why the worker ends: the class of the error, in ``extractor.errors`` or any, and its text."""

    kind: str
    message: str

    @classmethod
    def of(cls, error: Exception) -> Failed:
        """Return what the driver hears of an error."""
        kind, is_ours = type(error).__name__, isinstance(error, ExtractorError)
        return cls(kind, str(error) if is_ours else f"{kind}: {first_line(error)}")

    @property
    def error(self) -> ExtractorError | None:
        """The error to raise in the driver; None if its class is not in ``extractor.errors``."""
        kind = getattr(errors, self.kind, None)
        if isinstance(kind, type) and issubclass(kind, ExtractorError):
            return kind(self.message)
        return None

    @property
    def fatal_error(self) -> ExtractorError | None:
        """The same if every other worker would end with it."""
        return None if self.kind in NOT_FATAL else self.error


class StopWorkerError(BaseException):
    """The driver asked the worker to stop."""


class _WarningHandler(logging.Handler):
    """Passes warnings of the package on.

    Args:
        send: Called with each of them.
    """

    def __init__(self, send: Callable[[Warned], None]) -> None:
        super().__init__(logging.WARNING)
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        """Pass on a warning."""
        self._send(Warned(record.getMessage()))


class _Child:
    """The worker's end of the socket."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self.leases = LeaseQueue()
        self._stops = False

    def send(self, message: Any) -> None:
        """Send a message to the driver; without one, this process has no use."""
        try:
            with self._sending:
                self._connection.send(message)
        except OSError:
            os._exit(1)

    def receive(self) -> None:
        """Keep the leases that arrive, until the socket ends."""
        while True:
            try:
                lease = self._connection.recv()
            except (EOFError, OSError):
                os._exit(1)  # the driver is gone; what is written is kept
            if lease is None:
                self.stop()
            self.leases.put(lease)

    def stop(self, *_: object) -> None:
        """End after the current batch."""
        self._stops = True
        self.leases.put(None)

    def after_batch(self, shard: int, done: int, failed: int) -> None:
        """Report a batch."""
        self.send(BatchDone(shard, done, failed))
        if self._stops:
            raise StopWorkerError


def main(descriptor: int) -> None:
    """Compute leases until the driver has no more.

    Args:
        descriptor: File descriptor of the socket.
    """
    die_with_parent()
    connection = Connection(descriptor)
    child = _Child(connection)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver, which ends us
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, child.stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    keep_freed_memory()
    spin_briefly()  # takes effect only before torch is imported, which the setup does
    try:
        with freeze_imports():
            setup = connection.recv()
    except (EOFError, OSError):
        return
    threading.Thread(target=child.receive, name="leases", daemon=True).start()
    logging.getLogger("extractor").propagate = False
    logging.getLogger("extractor").addHandler(logging.NullHandler())
    try:
        work(
            setup,
            child.leases,
            on_ready=lambda: child.send(Ready()),
            on_warning=child.send,
            after_batch=child.after_batch,
            on_receipt=child.send,
        )
    except StopWorkerError:
        pass
    except Exception as error:
        child.send(Failed.of(error))
        _exit()  # while the error keeps the tensors of a broken GPU, which would abort the process
    _exit()


def _exit() -> None:
    sys.stdout.flush()
    os._exit(0)  # threads of a decoder that hangs would keep the process alive


def work(
    setup: WorkerSetup,
    leases: LeaseQueue,
    *,
    on_ready: Callable[[], None],
    on_warning: Callable[[Warned], None],
    after_batch: AfterBatch,
    on_receipt: OnReceipt,
) -> None:
    """Load the models, and compute what is leased until there is no more.

    Args:
        setup: The run.
        leases: Leases of this worker.
        on_ready: Called once the models are loaded.
        on_warning: Called with each warning from then on.
        after_batch: Called after each batch.
        on_receipt: Called for each shard once it is on the disk.
    """
    warnings.simplefilter("ignore")  # they concern the code of libraries, not the user
    from extractor.images.budget import allow_pixels
    from extractor.system.cpu import compute_threads
    from extractor.workers.worker import ShardWorker

    allow_pixels(setup.options.max_pixels)
    share_memory(setup.processes)
    with compute_threads(setup.options.threads):
        worker = ShardWorker(setup)
        on_ready()
        # The driver loaded the same models, and gave the warnings that this gives rise to.
        logging.getLogger("extractor").addHandler(_WarningHandler(on_warning))
        while leases.wait():
            worker.compute(leases.take, after_batch, on_receipt)
