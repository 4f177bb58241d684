"""Stands in for a worker process: speaks its protocol, loads nothing, and dies where it should.

The setup names the shards on which it dies, and on how many attempts.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from extractor.lease.lease import Receipt
from extractor.lease.plan import PlannedShard
from extractor.loading.crash_log import CrashLog
from extractor.system.timing import KINDS
from extractor.workers.worker_process import BatchDone, Failed, Ready, Warned

__all__ = ["START", "FakeSetup", "main"]

# As that of real workers, with this module in their place.
START = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from support.fake_worker import main; main(int(sys.argv[1]))"
)


@dataclass(frozen=True)
class FakeSetup:
    """What a fake worker does.

    Attributes:
        crash_log: File for the images that it is decoding.
        deaths: Number of attempts that die, by shard.
        failure: Class and message of the error that ends it before it is ready.
        dies_at_start: Whether it is killed before it is ready.
        is_deaf: Whether it never ends by itself.
        images: Number of images in a shard.
    """

    crash_log: Path
    deaths: dict[int, int] = field(default_factory=dict)
    failure: tuple[str, str] | None = None
    dies_at_start: bool = False
    is_deaf: bool = False
    images: int = 3

    @property
    def plan(self) -> Any:
        """Shards of so many images."""
        return defaultdict(lambda: PlannedShard(0, 0, range(self.images)))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(descriptor: int) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
    connection = Connection(descriptor)
    setup: FakeSetup = connection.recv()
    if setup.dies_at_start:
        die()
    if setup.failure is not None:
        connection.send(Failed(*setup.failure))
        sys.exit()
    connection.send(Ready())
    if setup.is_deaf:
        time.sleep(60)
    with CrashLog(setup.crash_log, 1) as crash_log:
        while (lease := connection.recv()) is not None:
            crash_log.note(0, b"/images/%d.jpg" % lease.shard)
            connection.send(Warned("the same for all"))
            connection.send(BatchDone(lease.shard, 1, 0))
            if lease.attempt <= setup.deaths.get(lease.shard, 0):
                die()
            crash_log.note(0, b"")
            connection.send(BatchDone(lease.shard, setup.images, 1))
            seconds = dict.fromkeys(KINDS, 0.0)
            connection.send(Receipt(lease.shard, setup.images, 1, seconds, 0.0))
