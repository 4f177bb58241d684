"""A worker that writes nothing: it answers each lease with a receipt."""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from extractor.lease.lease import Receipt
from extractor.workers.worker_process import Ready

__all__ = ["START", "NoSetup", "main"]

# Takes the place of extractor.workers.local.START.
START = (
    "import sys; sys.path[:] = sys.argv[2:]; from noop_worker import main; main(int(sys.argv[1]))"
)


@dataclass(frozen=True)
class NoSetup:
    """What the driver needs of a worker's setup.

    Attributes:
        crash_log: File that does not exist.
    """

    crash_log: Path


def main(descriptor: int) -> None:
    """Answer leases until there are no more."""
    connection = Connection(descriptor)
    connection.recv()  # the setup
    connection.send(Ready())
    while (lease := connection.recv()) is not None:
        connection.send(Receipt(lease.shard, 1, 0, {}, 0.0))
