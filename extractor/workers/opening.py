"""Open leased shards: their paths, and their files in each store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack

from extractor.errors import ShardBusyError, StoreBusyError
from extractor.lease.lease import Lease
from extractor.lease.plan import RunPlan, StoreTarget
from extractor.store.atomic import store_errors
from extractor.store.shard import ShardWriter
from extractor.workers.pipeline import ShardWork
from extractor.workers.shard_output import ShardOutput

__all__ = ["ShardOpener"]


class ShardOpener:
    """Opens leased shards.

    Args:
        plan: Shards of the run.
        paths: Returns the absolute paths of consecutive images, counted through all passes.
        fails_if_busy: Raise an error if another process has a shard, instead of writing a copy.
    """

    def __init__(
        self, plan: RunPlan, paths: Callable[[range], list[bytes]], *, fails_if_busy: bool = False
    ) -> None:
        self._plan = plan
        self._paths = paths
        self._fails_if_busy = fails_if_busy
        counts = [each.images for each in plan.passes]
        self._starts = [sum(counts[:index]) for index in range(len(counts))]

    def open(self, lease: Lease) -> ShardWork:
        """Open the files of a shard.

        Raises:
            StoreError: The file system refuses.
            StoreBusyError: Another process has the shard, with ``fails_if_busy``.
        """
        pass_index, index, images = self._plan[lease.shard]
        start = self._starts[pass_index]
        stores = self._plan.passes[pass_index].stores
        with ExitStack() as stack:
            opened = []
            for store in stores:
                with store_errors(store.staging.parent):
                    writer = self._writer(store, store.first + index, lease)
                opened.append((store, stack.enter_context(writer)))
            outputs = [
                ShardOutput(store, writer) for store, writer in opened if writer.finished is None
            ]
            paths = self._paths(range(start + images.start, start + images.stop))
            stack.pop_all()
        return ShardWork(lease, paths, outputs)

    def open_free(self, leases: Iterable[Lease]) -> Iterator[ShardWork]:
        """Open the shards that no other process computes.

        Raises:
            StoreError: The file system refuses.
        """
        for lease in leases:
            try:
                work = self.open(lease)
            except ShardBusyError:
                continue
            yield work

    def _writer(self, store: StoreTarget, number: int, lease: Lease) -> ShardWriter:
        staging, description, lock = store.staging, store.description, store.lock
        if not lease.is_copy:
            try:
                return ShardWriter(staging, number, description, lock=lock)
            except StoreBusyError:  # a worker that was given up may still live
                if self._fails_if_busy:
                    raise
        return ShardWriter(staging, number, description, is_copy=True, lock=lock)
