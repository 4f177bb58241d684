"""What an engine tells the run that started it. Needs no torch."""

from __future__ import annotations

from typing import Protocol

from extractor.lease.lease import Receipt

__all__ = ["Listener"]


class Listener(Protocol):
    """Hears of the progress of all workers, in the thread of the driver."""

    def on_batch(self, worker: int, shard: int, done: int, failed: int) -> None:
        """Hear that a batch is computed.

        Args:
            worker: Number of the worker.
            shard: Index of the shard.
            done: Number of images of the shard that are done.
            failed: Number of images of the batch without a row.
        """

    def on_receipt(self, receipt: Receipt) -> None:
        """Hear that a shard is on the disk. Each shard is reported once."""

    def on_suspects(self, worker: int, suspects: list[bytes]) -> None:
        """Hear which images a worker was decoding when it died."""

    def on_warning(self, worker: int, message: str) -> None:
        """Hear a warning for the user."""

    def on_tick(self) -> None:
        """Show the progress; called several times per second.

        Raises:
            InterruptedRunError: The run should stop.
        """
