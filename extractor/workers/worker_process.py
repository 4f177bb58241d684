"""The child process of a worker. The driver starts it, and talks to it through a socket.

The driver sends a :class:`~extractor.workers.worker.WorkerSetup`, then leases, then None to stop.
The child sends :class:`Ready`, and then a :class:`BatchDone` per batch and a
:class:`~extractor.lease.lease.Receipt` per shard. It ends when the socket does.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from extractor.errors import ExtractorError
from extractor.system.memory import share_memory
from extractor.system.process_tuning import freeze_imports, keep_freed_memory, spin_briefly
from extractor.text import first_line
from extractor.workers.lease_queue import LeaseQueue

if TYPE_CHECKING:
    from extractor.workers.worker import WorkerSetup

__all__ = ["BatchDone", "Failed", "Ready", "Warned", "main"]

PR_SET_PDEATHSIG = 1  # linux/prctl.h
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


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


class _StopError(BaseException):
    """The driver asked the worker to stop."""


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
            raise _StopError


class _Handler(logging.Handler):
    def __init__(self, child: _Child) -> None:
        super().__init__(logging.WARNING)
        self._child = child

    def emit(self, record: logging.LogRecord) -> None:
        self._child.send(Warned(record.getMessage()))


def main(descriptor: int) -> None:
    """Compute leases until the driver has no more.

    Args:
        descriptor: File descriptor of the socket.
    """
    with contextlib.suppress(OSError, AttributeError):  # other systems have no prctl
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # do not outlive the driver
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
    warnings.simplefilter("ignore")  # they concern the code of libraries, not the user
    try:
        _work(setup, child)
    except _StopError:
        pass
    except Exception as error:
        is_ours = isinstance(error, ExtractorError)
        kind = type(error).__name__
        child.send(Failed(kind, str(error) if is_ours else f"{kind}: {first_line(error)}"))
        _exit()  # while the error keeps the tensors of a broken GPU, which would abort the process
    _exit()


def _exit() -> None:
    sys.stdout.flush()
    os._exit(0)  # threads of a decoder that hangs would keep the process alive


def _work(setup: WorkerSetup, child: _Child) -> None:
    from extractor.images.budget import allow_pixels
    from extractor.system.cpu import compute_threads
    from extractor.workers.worker import ShardWorker

    allow_pixels(setup.options.max_pixels)
    share_memory(setup.processes)
    with compute_threads(setup.options.threads):
        worker = ShardWorker(setup)
        child.send(Ready())
        # The driver loaded the same models, and gave the warnings that this gives rise to.
        logging.getLogger("extractor").addHandler(_Handler(child))
        while child.leases.wait():
            worker.compute(child.leases.take, child.after_batch, child.send)
