"""Passes over the images of a run: each computes the rows that one or more stores lack."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace

from extractor.compute.embed import Embedded, embed
from extractor.compute.float32_retry import Float32Retry
from extractor.compute.inputs import Inputs, device_of, pictures_of
from extractor.errors import InterruptedRunError
from extractor.images.listing import ImageList
from extractor.images.types import ImageSource
from extractor.lease.batches import BatchPlan, plan_batches
from extractor.loading.crash_log import CrashLog
from extractor.loading.loader import BatchLoader
from extractor.loading.nvjpeg import MAX_GROUP_IMAGES, NvjpegDecoder
from extractor.models.embedding import EmbeddingSpec, load_specs
from extractor.report import Progress
from extractor.run.output import StoreOutput
from extractor.run.recorded_weights import weights_of
from extractor.store.format import IN_FLIGHT
from extractor.system.cpu import available_cores
from extractor.system.timing import Spent, Timer

__all__ = ["Callbacks", "PassRunner"]


class Callbacks:
    """What a run calls when a phase begins and after every batch, in the thread that started it.

    Args:
        progress: Called with the progress.
        stop: Asked whether to stop; the run then ends and keeps its work. Not asked once all rows
            are computed.
    """

    def __init__(
        self,
        progress: Callable[[Progress], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> None:
        self._progress = progress
        self._stop = stop
        self._raised: BaseException | None = None
        self._last = Progress(0, 0, 0)

    def publishing(self) -> None:
        """Report that all rows are computed and are published next."""
        self.report(replace(self._last, phase="publishing"))

    def report(self, progress: Progress) -> None:
        """Report the progress, and end the run if it should stop.

        Raises:
            InterruptedRunError: ``stop`` returned true.
        """
        is_computing = progress.phase == "computing"
        self._last = progress
        try:
            if self._progress is not None:
                self._progress(progress)
            if progress.phase == "publishing" or (is_computing and progress.done >= progress.total):
                return
            stops = self._stop is not None and self._stop()
        except BaseException as error:
            self._raised = error
            raise
        if stops:
            raise InterruptedRunError(progress.done, progress.total, is_computing=is_computing)

    def has_raised(self, error: BaseException) -> bool:
        """Return whether an error comes from a callback."""
        return error is self._raised


class PassRunner:
    """Computes the rows that the stores of a run lack.

    Args:
        images: Images of the run.
        specs: Embedding of each store.
        inputs: Decodes the images.
        model_names: Names to load the models by, for rows that overflow in half precision. None
            where a model is an object of the caller; such rows are failures then.
    """

    def __init__(
        self,
        images: ImageList,
        specs: Sequence[EmbeddingSpec],
        inputs: Inputs,
        model_names: Sequence[str] | None,
    ) -> None:
        self._images = images
        self._specs = specs
        self._inputs = inputs
        self._options = inputs.options
        self._model_names = model_names
        self._timer = inputs.timer or Timer()
        self._computed = 0
        self._readers = 0

    @property
    def spent(self) -> Spent:
        """Time that the passes took so far."""
        return Spent(
            self._computed,
            self._inputs.workers,
            available_cores(),
            self._readers,
            device_of(self._specs).type,
            self._options.decode,
            dict(self._timer.seconds),
            self._timer.wall_seconds,
        )

    def run(self, outputs: Sequence[StoreOutput], callbacks: Callbacks) -> None:
        """Compute all pending rows. Stores that lack the same images share one pass.

        Raises:
            InterruptedRunError: ``callbacks.stop`` returned true.
        """
        passes: dict[tuple[str, int], list[StoreOutput]] = {}
        for output in outputs:
            if output.pending:
                passes.setdefault((output.todo_digest, output.shard_images), []).append(output)
        total = max(len(self._images), sum(map(_pending, passes.values())))

        def report() -> None:
            done = total - sum(map(_pending, passes.values()))
            failed = max(output.failed for output in outputs)
            callbacks.report(Progress(done, total, failed, "computing"))

        report()
        for sharing in passes.values():
            self._run_pass(sharing, report)

    def _run_pass(self, outputs: Sequence[StoreOutput], after_batch: Callable[[], None]) -> None:
        """Compute the images that all of these stores lack, shard by shard."""
        specs = [output.spec for output in outputs]
        batches = self._pending_batches(outputs)
        retry = self._float32_retry(specs)
        paths = functools.partial(self._paths, outputs[0].todo)
        with ExitStack() as stack:
            loader, decoder = self._open_loader(stack, outputs[0], specs, map(paths, batches))
            computed = embed(
                specs,
                loader,
                normalize=self._options.normalize,
                timer=self._timer,
                decoder=decoder,
            )
            stack.enter_context(closing(computed))
            pairs = zip(batches, computed, strict=True)
            for shard, in_shard in itertools.groupby(pairs, key=lambda pair: pair[0].shard):
                with ExitStack() as shards:
                    with self._timer.spent("write"):
                        for output in outputs:
                            shards.enter_context(output.shard(shard))
                    for batch, embedded in in_shard:
                        if retry is not None:
                            embedded = retry.retry(functools.partial(paths, batch), embedded)
                        self._write(outputs, batch, embedded)
                        self._readers = max(self._readers, loader.readers)
                        after_batch()
                    with self._timer.spent("write"):
                        shards.close()

    def _paths(self, todo: Sequence[int], batch: BatchPlan) -> list[ImageSource]:
        return [self._images.full_path(i) for i in todo[batch.start : batch.stop]]

    def _pending_batches(self, outputs: Sequence[StoreOutput]) -> list[BatchPlan]:
        done = min(output.done for output in outputs)
        batches = plan_batches(
            len(outputs[0].todo),
            shard_images=outputs[0].shard_images,
            batch_size=self._inputs.batch_size,
        )
        return [batch for batch in batches if batch.stop > done]

    def _open_loader(
        self,
        stack: ExitStack,
        output: StoreOutput,
        specs: Sequence[EmbeddingSpec],
        batches: Iterable[Sequence[ImageSource]],
    ) -> tuple[BatchLoader, NvjpegDecoder | None]:
        """Return the loader of a pass, and the decoder of what it leaves to the GPU."""
        on_gpu = self._options.decode == "gpu"
        cpu_slots = self._inputs.crash_log_slots
        slots = cpu_slots + (MAX_GROUP_IMAGES if on_gpu else 0)
        crash_log = stack.enter_context(CrashLog(output.staging / IN_FLIGHT, slots))
        loader = self._inputs.loader(batches, specs, crash_log, decode=self._options.decode)
        stack.enter_context(loader)
        if not on_gpu:
            return loader, None
        decoder = NvjpegDecoder(
            device_of(specs),
            pictures_of(specs),
            max_pixels=self._options.max_pixels,
            crash_log=crash_log,
            first_slot=cpu_slots,
        )
        return loader, decoder

    def _write(self, outputs: Sequence[StoreOutput], batch: BatchPlan, embedded: Embedded) -> None:
        with self._timer.spent("write"):
            for output, rows in zip(outputs, embedded.rows, strict=True):
                output.append(batch.start, rows, embedded.outcomes)
        self._computed += len(embedded.outcomes)

    def _float32_retry(self, specs: Sequence[EmbeddingSpec]) -> Float32Retry | None:
        """Return what replaces rows that overflow; None if none can, or no model has a name."""
        names = self._model_names
        if names is None or all(b.precision == "float32" for spec in specs for b in spec.backbones):
            return None
        options = replace(self._options, precision="float32")
        indices = [self._specs.index(spec) for spec in specs]

        def load() -> list[EmbeddingSpec]:
            exact = load_specs(names, options, recorded_sha256=weights_of(self._specs))
            return [exact[index] for index in indices]

        return Float32Retry(load, Inputs(options, batch_size=1))


def _pending(sharing: Sequence[StoreOutput]) -> int:
    return max(output.pending for output in sharing)
