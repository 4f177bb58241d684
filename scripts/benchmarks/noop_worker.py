"""Workers that write nothing: they answer each lease with a receipt."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from extractor.lease.lease import Lease, Receipt
from extractor.options import Options
from extractor.workers.worker_process import Ready

__all__ = ["START", "NoActor", "NoSetup", "main"]

# Takes the place of extractor.workers.local.START.
START = (
    "import sys; sys.path[:] = sys.argv[2:]; from noop_worker import main; main(int(sys.argv[1]))"
)


@dataclass(frozen=True)
class NoSetup:
    """What the driver needs of a worker's setup.

    Attributes:
        crash_log: File that does not exist.
        options: Options of the run.
    """

    crash_log: Path
    options: Options = field(default_factory=Options)


def main(descriptor: int) -> None:
    """Answer leases until there are no more."""
    connection = Connection(descriptor)
    connection.recv()  # the setup
    connection.send(Ready())
    while (lease := connection.recv()) is not None:
        connection.send(Receipt(lease.shard, 1, 0, {}, 0.0))


class NoActor:
    """Takes the place of extractor.workers.ray_actor.ShardActor."""

    def node(self) -> str:
        """Return the identifier of the node."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def prepare(self, content: object) -> Ready:
        """Return at once."""
        return Ready()

    def compute(self, lease: Lease) -> Receipt:
        """Return the receipt of a shard."""
        return Receipt(lease.shard, 1, 0, {}, 0.0)

    def news(self) -> list[object]:
        """Return nothing, as often as a worker tells something."""
        time.sleep(1)
        return []

    def stop(self) -> None:
        """Return at once."""
