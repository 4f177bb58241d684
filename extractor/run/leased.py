"""Shards that the stores of a run lack: what to lease, and what comes back."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from extractor.errors import ShardsFailedError
from extractor.images.listing import ImageList, display_path
from extractor.lease.lease import Lease, Receipt
from extractor.lease.parts import Part
from extractor.lease.plan import PassPlan, RunPlan
from extractor.lease.suspects import Suspects
from extractor.report import Progress
from extractor.run.callbacks import Callbacks
from extractor.run.output import StoreOutput
from extractor.text import plural

__all__ = ["LeasedRun"]

log = logging.getLogger(__name__)

FAILED_SHOWN = 3


class LeasedRun:
    """Shards that the stores of a run lack. Stores that lack the same images share a pass.

    It listens to the engine that computes them, see :class:`~extractor.lease.listener.Listener`.

    Args:
        outputs: Stores of the run.
        images: Images of the run.
        callbacks: Hear of the progress.
        part: Part of the shards that are computed here; None computes all.

    Attributes:
        plan: Passes over the images, with all their shards.
        receipts: Receipts of the shards that were finished, in their order.
        has_workers: Whether workers compute, and not this process.
        pending: Number of images that are left to compute, each counted once for each pass.
    """

    def __init__(
        self,
        outputs: Sequence[StoreOutput],
        images: ImageList,
        callbacks: Callbacks,
        part: Part | None = None,
    ) -> None:
        self._outputs = outputs
        self._images = images
        self._callbacks = callbacks
        passes: dict[tuple[str, int], list[int]] = {}
        for index, output in enumerate(outputs):
            if output.is_planned:
                passes.setdefault((output.todo_digest, output.shard_images), []).append(index)
        self._sharing = [[outputs[index] for index in sharing] for sharing in passes.values()]
        self.plan = RunPlan(
            [
                PassPlan(
                    [outputs[index].target(index) for index in sharing],
                    len(outputs[sharing[0]].todo),
                    shard_images,
                )
                for (_, shard_images), sharing in passes.items()
            ]
        )
        self.receipts: list[Receipt] = []
        self.has_workers = False
        self._done_before = {
            shard: min(output.done_in(index) for output in self._sharing[number])
            for shard, (number, index, _) in enumerate(self.plan)
        }
        if part is None:
            self._own = range(len(self.plan))
            self.pending = sum(max(output.pending for output in each) for each in self._sharing)
            self._total = max(len(images), self.pending)
        else:
            self._own = part.shards(len(self.plan))
            self._total = sum(len(self.plan[shard].images) for shard in self._own)
            self.pending = self._total - sum(self._done_before[shard] for shard in self._own)
        self._done: dict[int, int] = {}
        self._failed = max((output.failed for output in outputs), default=0)
        self._warned: set[str] = set()

    @property
    def shards(self) -> list[int]:
        """Shards that are left to compute."""
        return [
            shard
            for shard in self._own
            for number, index, _ in [self.plan[shard]]
            if not all(output.is_finished(index) for output in self._sharing[number])
        ]

    @property
    def images(self) -> int:
        """Number of images of the shards that are computed here."""
        return self._total

    def own_shards_of(self, output: StoreOutput) -> list[int]:
        """Return the indices of the shards of a store that are computed here."""
        planned = (self.plan[shard] for shard in self._own)
        return [each.in_pass for each in planned if output in self._sharing[each.pass_index]]

    def leases(self, pass_index: int) -> Iterator[Lease]:
        """Yield a lease for each shard of a pass that is left to compute."""
        for shard in self.shards:
            if self.plan[shard].pass_index == pass_index:
                yield Lease(shard)

    def full_paths(self, images: range) -> list[bytes]:
        """Return the absolute paths of consecutive images, counted through all passes."""
        return list(map(self._images.full_path, self._indices(images)))

    def paths(self) -> Iterator[bytes]:
        """Yield the paths of the images of all passes, relative to the root."""
        for output in (sharing[0] for sharing in self._sharing):
            yield from (self._images.paths[index] for index in output.todo)

    def _indices(self, images: range) -> Sequence[int]:
        start, stop = images.start, images.stop
        for sharing in self._sharing:
            todo = sharing[0].todo
            if start < len(todo):
                return todo[start:stop]
            start, stop = start - len(todo), stop - len(todo)
        return ()

    # -- the progress, as a listener

    def on_batch(self, worker: int, shard: int, done: int, failed: int) -> None:
        """Count a batch."""
        self._done[shard] = max(done, self._done.get(shard, 0))
        self._failed += failed

    def on_receipt(self, receipt: Receipt) -> None:
        """Count a shard in the stores that lacked it."""
        number, index, images = self.plan[receipt.shard]
        self._done[receipt.shard] = len(images)
        for output in self._sharing[number]:
            output.collect(index)
        self.receipts.append(receipt)
        if self.has_workers:
            shard, worker = receipt.shard, receipt.worker + 1
            self._callbacks.report(replace(self._progress(), shard=shard, worker=worker))

    def on_suspects(self, worker: int, suspects: list[bytes]) -> None:
        """Keep suspects for later runs, and tell the user."""
        self.keep_suspects(suspects)
        log.warning(
            "worker %d died while decoding %s; now decoded in a process of its own",
            *(worker + 1, ", ".join(map(display_path, suspects))),
            extra={"worker": worker + 1},
        )

    def keep_suspects(self, suspects: Iterable[bytes]) -> None:
        """Let later runs decode images in a process of their own."""
        paths = list(suspects)
        for staging in {output.staging for output in self._outputs}:
            Suspects(staging).add(paths)

    def on_warning(self, worker: int, message: str) -> None:
        """Pass on a warning, once if several workers have the same."""
        if message not in self._warned:
            self._warned.add(message)
            log.warning("%s", message, extra={"worker": worker + 1})

    def on_tick(self) -> None:
        """Report the progress.

        Raises:
            InterruptedRunError: The run should stop.
        """
        self._callbacks.report(self._progress())

    def _progress(self) -> Progress:
        new = sum(done - self._done_before[shard] for shard, done in self._done.items())
        return Progress(self._total - self.pending + new, self._total, self._failed)

    def check_failed(self, failed: Mapping[int, str]) -> None:
        """Check that no shard failed for good.

        Raises:
            ShardsFailedError: Some did. All others are on the disk.
        """
        if not failed:
            return
        shown = "; ".join(
            f"shard {shard}: {error}" for shard, error in list(failed.items())[:FAILED_SHOWN]
        )
        raise ShardsFailedError(
            f"{plural(len(failed), 'shard')} of {len(self.plan)} failed several times ({shown}); "
            "the finished ones are kept. Run the same command to try again."
        )
