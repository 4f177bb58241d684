"""The ordinary pipeline: shards of images through decoders and networks to the disk."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

from extractor.compute.embed import Embedded, embed
from extractor.compute.float32_retry import Float32Retry
from extractor.compute.inputs import Inputs, device_of, pictures_of
from extractor.images.types import ImageSource
from extractor.lease.lease import Lease, Receipt
from extractor.loading.crash_log import CrashLog
from extractor.loading.loader import BatchLoader
from extractor.loading.nvjpeg import MAX_GROUP_IMAGES, NvjpegDecoder
from extractor.models.embedding import EmbeddingSpec, backbones_of, load_specs, weights_of
from extractor.system.timing import Timer
from extractor.workers.shard_output import ShardOutput

__all__ = ["AfterBatch", "OnReceipt", "ShardPipeline", "ShardWork"]

AfterBatch = Callable[[int, int, int], None]
"""Called after each batch: shard, number of its images that are done, failures of the batch."""

OnReceipt = Callable[[Receipt], None]


@dataclass(frozen=True)
class ShardWork:
    """A leased shard, ready to be computed.

    Attributes:
        lease: The lease.
        paths: Absolute paths of its images.
        outputs: The shard in each store that lacks it.
    """

    lease: Lease
    paths: Sequence[bytes]
    outputs: Sequence[ShardOutput]

    def batches(self, batch_size: int) -> list[range]:
        """Return the images of each batch that is left to compute, as indices in the shard.

        An image has the same position in its batch wherever the work starts.
        """
        images = len(self.paths)
        done = min((output.done for output in self.outputs), default=images)
        starts = range(0, images, batch_size)
        batches = (range(start, min(start + batch_size, images)) for start in starts)
        return [batch for batch in batches if batch.stop > done]

    def finish(self) -> None:
        """Finish the shard in every store."""
        for output in self.outputs:
            output.finish()

    def close(self) -> None:
        """Leave the shard unfinished."""
        for output in self.outputs:
            output.close()


class ShardPipeline:
    """Computes shards, one after the other.

    Args:
        specs: Embedding of each store of the run.
        inputs: Decodes the images.
        crash_log: File for the images that are being decoded.
        model_names: Names to load the models by, for rows that overflow in half precision. None
            where a model is an object of the caller; such rows are failures then.
    """

    def __init__(
        self,
        specs: Sequence[EmbeddingSpec],
        inputs: Inputs,
        crash_log: Path,
        model_names: Sequence[str] | None,
    ) -> None:
        self._specs = specs
        self._suspects = set(inputs.suspects)
        self._timer = inputs.timer or Timer()
        self._inputs = replace(inputs, suspects=self._suspects, timer=self._timer)
        self._crash_log = crash_log
        self._model_names = model_names

    def compute(
        self,
        works: Iterator[ShardWork],
        stores: Sequence[int],
        after_batch: AfterBatch,
        on_receipt: OnReceipt,
    ) -> None:
        """Compute shards of one pass.

        While one shard is computed, the images of the next one are decoded, and the files of the
        one before are finished.

        Args:
            works: The shards. The next one is taken as soon as its images can be decoded, by any
                thread; it must be there at once.
            stores: Index of the embedding of each store of the pass.
            after_batch: Called after each batch.
            on_receipt: Called for each shard once it is on the disk.

        Raises:
            StoreError: The file system refuses.
            DeviceError: The device is full, busy or broken.
        """
        specs = [self._specs[index] for index in stores]
        queue = _Queue(works, self._inputs.batch_size, self._suspects)
        retry = self._float32_retry(specs)
        with ExitStack() as stack:
            finishing = stack.enter_context(_Finishing(self._timer))
            stack.callback(queue.close)
            loader, decoder = self._open_loader(stack, specs, queue)
            computed = embed(
                specs,
                loader,
                normalize=self._inputs.options.normalize,
                timer=self._timer,
                decoder=decoder,
            )
            for embedded in stack.enter_context(closing(computed)):
                for complete in queue.take_complete():
                    finishing.add(complete, 0, 0)
                work, batch = queue.take()
                paths = work.paths[batch.start : batch.stop]
                if retry is not None:
                    embedded = retry.retry(functools.partial(list, paths), embedded)
                failed = self._write(work, stores, batch, embedded)
                queue.count(len(paths), failed)
                after_batch(work.lease.shard, batch.stop, failed)
                if batch.stop == len(work.paths):
                    finishing.add(*queue.finish(), readers=loader.readers)
                finishing.report(on_receipt)
            for complete in queue.take_complete():
                finishing.add(complete, 0, 0)
            finishing.report(on_receipt, wait=True)

    def _open_loader(
        self, stack: ExitStack, specs: Sequence[EmbeddingSpec], queue: _Queue
    ) -> tuple[BatchLoader, NvjpegDecoder | None]:
        """Return the loader of a pass, and the decoder of what it leaves to the GPU."""
        options = self._inputs.options
        on_gpu = options.decode == "gpu"
        cpu_slots = self._inputs.crash_log_slots
        slots = cpu_slots + (MAX_GROUP_IMAGES if on_gpu else 0)
        crash_log = stack.enter_context(CrashLog(self._crash_log, slots))
        loader = self._inputs.loader(queue, specs, crash_log, decode=options.decode)
        stack.enter_context(loader)
        if not on_gpu:
            return loader, None
        decoder = NvjpegDecoder(
            device_of(specs),
            pictures_of(specs),
            max_pixels=options.max_pixels,
            crash_log=crash_log,
            first_slot=cpu_slots,
        )
        return loader, decoder

    def _write(
        self, work: ShardWork, stores: Sequence[int], batch: range, embedded: Embedded
    ) -> int:
        """Write the rows of a batch to each store that lacks them; return the most failures."""
        paths = work.paths[batch.start : batch.stop]
        rows = dict(zip(stores, embedded.rows, strict=True))
        with self._timer.spent("write"):
            return max(
                output.append(batch.start, paths, rows[output.spec], embedded.outcomes)
                for output in work.outputs
            )

    def _float32_retry(self, specs: Sequence[EmbeddingSpec]) -> Float32Retry | None:
        """Return what replaces rows that overflow; None if none can, or no model has a name."""
        names = self._model_names
        if names is None or all(b.precision == "float32" for b in backbones_of(specs)):
            return None
        options = replace(self._inputs.options, precision="float32")
        indices = [self._specs.index(spec) for spec in specs]
        digests = weights_of(self._specs)

        def load() -> list[EmbeddingSpec]:
            exact = load_specs(names, options, recorded_sha256=digests)
            return [exact[index] for index in indices]

        return Float32Retry(load, Inputs(options, batch_size=1))


class _Queue:
    """Shards on their way through the pipeline, iterated as the images of each batch.

    Threads of the loader iterate it, one at a time. All else is for the thread that computes.

    Args:
        works: The shards.
        batch_size: Number of images in one batch.
        suspects: Gets the suspects of each lease before its images are decoded.
    """

    def __init__(self, works: Iterator[ShardWork], batch_size: int, suspects: set[bytes]) -> None:
        self._batches = self._plan(works, batch_size, suspects)
        self._planned: deque[tuple[ShardWork, range | None]] = deque()
        self._current: ShardWork | None = None
        self._images = self._failed = 0

    def __iter__(self) -> Iterator[Sequence[ImageSource]]:
        return self._batches

    def _plan(
        self, works: Iterator[ShardWork], batch_size: int, suspects: set[bytes]
    ) -> Iterator[Sequence[ImageSource]]:
        for work in works:
            suspects.update(work.lease.suspects)
            batches = work.batches(batch_size)
            if not batches:  # an attempt before died when all images were done
                self._planned.append((work, None))
            for batch in batches:
                self._planned.append((work, batch))
                yield work.paths[batch.start : batch.stop]

    def take_complete(self) -> Iterator[ShardWork]:
        """Yield the shards at the front that have nothing left to compute."""
        while self._planned and self._planned[0][1] is None:
            yield self._planned.popleft()[0]

    def take(self) -> tuple[ShardWork, range]:
        """Return the next batch with its shard."""
        work, batch = self._planned.popleft()
        assert batch is not None
        if work is not self._current:
            self._current, self._images, self._failed = work, 0, 0
        return work, batch

    def count(self, images: int, failed: int) -> None:
        """Count the images of the current shard."""
        self._images += images
        self._failed += failed

    def finish(self) -> tuple[ShardWork, int, int]:
        """Return the current shard, and the numbers of its images and failures."""
        work = self._current
        assert work is not None
        self._current = None
        return work, self._images, self._failed

    def close(self) -> None:
        """Leave all shards that were not finished to a later attempt."""
        works = [self._current] if self._current is not None else []
        works += [work for work, _ in self._planned]
        for work in {id(work): work for work in works}.values():
            work.close()


class _Finishing:
    """Finishes shards in a thread of its own: syncing and hashing leave the device to others."""

    def __init__(self, timer: Timer) -> None:
        self._timer = timer
        self._before = dict(timer.seconds)
        self._begun = time.perf_counter()
        self._thread = ThreadPoolExecutor(1, "finish")
        self._pending: deque[tuple[Future[None], Receipt]] = deque()

    def __enter__(self) -> _Finishing:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def add(self, work: ShardWork, images: int, failed: int, readers: int = 0) -> None:
        """Finish a shard, with the time since the shard before."""
        now, begun = dict(self._timer.seconds), self._begun
        seconds = {kind: value - self._before[kind] for kind, value in now.items()}
        self._before, self._begun = now, time.perf_counter()
        receipt = Receipt(work.lease.shard, images, failed, seconds, self._begun - begun, readers)
        self._pending.append((self._thread.submit(work.finish), receipt))

    def report(self, on_receipt: OnReceipt, *, wait: bool = False) -> None:
        """Report the shards that are on the disk.

        Args:
            on_receipt: Called for each shard.
            wait: Wait for all. Otherwise for all but the last, so that shards do not pile up.
        """
        while self._pending:
            finished, receipt = self._pending[0]
            if not (wait or finished.done() or len(self._pending) > 1):
                return
            with self._timer.spent("write"):
                finished.result()
            self._pending.popleft()
            on_receipt(receipt)
