"""One run, from a list of images to finished stores."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from extractor.compute.inputs import Inputs, device_of
from extractor.compute.tune import Recorded, TuneSettings, tune
from extractor.errors import UsageError
from extractor.images.listing import ImageList, Input, list_images
from extractor.lease.describe import describe
from extractor.lease.suspects import load_suspects
from extractor.loading.crash_log import CrashLog
from extractor.models.embedding import (
    EmbeddingSpec,
    Model,
    check_models,
    load_specs,
    weights_of,
)
from extractor.models.naming import join_names, store_folders
from extractor.options import Options
from extractor.report import Progress, Report, StoreReport
from extractor.run.callbacks import Callbacks
from extractor.run.engines import (
    Computation,
    Computing,
    compute,
    device_elsewhere,
    engine_for,
)
from extractor.run.leased import LeasedRun
from extractor.run.output import StoreOutput, claim_store
from extractor.run.preflight import (
    check_decode_device,
    check_disk_space,
    check_has_rows,
    check_order,
    check_output_folders,
    check_shard_count,
)
from extractor.run.recorded_weights import recorded_weights
from extractor.run.run_json import Computed, request_of, write_run_json
from extractor.run.sizes import Sizes, choose_sizes
from extractor.run.snapshot import take_snapshot, unlisted_folders
from extractor.store.claim import ClaimedFolder, SharedFolder
from extractor.store.format import IN_FLIGHT
from extractor.store.job import MAX_SHARD_IMAGES
from extractor.store.writer import existing_computation
from extractor.system.cpu import compute_threads
from extractor.system.timing import Timer
from extractor.workers.ray_workers import run_trial_on_cluster
from extractor.workers.trial import Trial
from extractor.workers.worker import decode_sample

__all__ = ["Session"]

log = logging.getLogger(__name__)


class Session:
    """One run: a method per stage, called in order by :meth:`run`.

    Each stage takes the values that the stages before it returned.

    Args:
        models: Names of models, or loaded backbones.
        out: Folder of the store, or of several stores; None for ``features/<name>``.
        options: Options of the run.

    Raises:
        UsageError: The models do not fit the options.
        StoreError: A store cannot be written.
    """

    def __init__(self, models: Sequence[Model], out: str | None, options: Options) -> None:
        self._clock = _StageClock()
        self._models = models
        self._out = out
        self._options = options
        self._here = options
        self._elsewhere = ""
        self._computations: list[dict[str, Any]] = []
        self._sample: list[bytes] = []
        self._crash_folder: Path | None = None  # that of the first store
        check_models(models, options)
        names = [model for model in models if isinstance(model, str)]
        self._model_names = names if len(names) == len(models) else None
        if self._model_names is not None:
            check_output_folders(self._model_names, out, options)
        elif options.engine == "ray":
            raise UsageError(
                "engine: a model of this process cannot be loaded on the nodes of a Ray cluster; "
                "try the name of a model, or FILE.py:FUNCTION"
            )

    def run(self, images: Input | Iterable[Input] | ImageList, callbacks: Callbacks) -> Report:
        """Run all stages and return the report.

        Raises:
            InterruptedRunError: A callback asked the run to stop.
        """
        with engine_for(self._options) as self._here:
            return self._run(images, callbacks)

    def _run(self, images: Input | Iterable[Input] | ImageList, callbacks: Callbacks) -> Report:
        callbacks.report(Progress(0, 0, 0, "listing"))
        listed = self.list_images(images)
        callbacks.report(Progress(0, len(listed), 0, "loading"))
        specs = self.load()
        callbacks.report(Progress(0, len(listed), 0, "tuning"))
        timer = Timer(trace=self._options.profile is not None)
        with ExitStack() as stack:
            stack.enter_context(compute_threads(self._options.threads))
            claims = stack.enter_context(self.claim_outputs(specs))
            sizes = choose_sizes(specs, claims, listed, self._options, self._elsewhere)
            inputs = Inputs(
                self._here,
                sizes.batch_size,
                load_suspects(claim.staging for claim in claims),
                timer,
            )
            specs = self.choose_precision(specs, claims, listed, inputs)
            outputs = self.compare(specs, claims, listed, sizes)
            pending = max(output.pending for output in outputs)
            self.check_space(outputs)
            computation = self.compute(outputs, listed, inputs, callbacks)
            callbacks.publishing()
            stores = self.publish(outputs)
        report = self._make_report(listed, specs, stores, pending, computation)
        self._write_run_json(report, specs, computation.threads)
        return report

    def list_images(self, images: Input | Iterable[Input] | ImageList) -> ImageList:
        """List the images, and check that a store can number their shards."""
        exclude = tuple(self._options.exclude)
        if not isinstance(images, ImageList):
            listed = list_images(images, exclude=exclude)
        elif exclude in ((), images.exclude):
            listed = images
        else:
            raise UsageError(
                "exclude: does not apply to an ImageList; try list_images(folder, exclude=...)"
            )
        self._clock.end("list")
        check_order(listed, self._options)
        check_shard_count(len(listed), self._options.shard_images or MAX_SHARD_IMAGES)
        return listed

    def load(self) -> list[EmbeddingSpec]:
        """Load the models and return the embedding of each store."""
        recorded = recorded_weights(self._models, self._out, self._options)
        specs = load_specs(self._models, self._here, recorded_sha256=recorded)
        import pyarrow.parquet  # noqa: F401  (fail now, not after the first shard)

        self._elsewhere = device_elsewhere(self._options, specs)
        device = torch.device(self._elsewhere) if self._elsewhere else device_of(specs)
        check_decode_device(self._options.decode, device)
        self._clock.end("load")
        return specs

    @contextmanager
    def claim_outputs(self, specs: Sequence[EmbeddingSpec]) -> Iterator[list[ClaimedFolder]]:
        """Lock the folder of each store for this run."""
        folders = store_folders(self._out, [spec.name for spec in specs])
        with ExitStack() as stack:
            yield [
                stack.enter_context(claim_store(Path(folder), self._options)) for folder in folders
            ]

    def choose_precision(
        self,
        specs: Sequence[EmbeddingSpec],
        claims: Sequence[ClaimedFolder | SharedFolder],
        images: ImageList,
        inputs: Inputs,
    ) -> list[EmbeddingSpec]:
        """Return the specs in the precision of this run, compiled where that pays."""
        before = [
            existing_computation(
                claim, describe(spec, self._options, images.root, inputs.batch_size)
            )
            for claim, spec in zip(claims, specs, strict=True)
        ]
        recorded = [
            Recorded.of(found.computation, same_run=found.is_interrupted) if found else None
            for found in before
        ]
        settings = TuneSettings(
            # A backbone of the caller keeps its precision.
            choose_precision=self._options.precision == "auto" and self._model_names is not None,
            compile=self._options.compile,
            images=max(len(images) - (found.images if found else 0) for found in before),
            batch_size=inputs.batch_size,
        )

        self._sample = _spread(images, settings.sample_size)

        def sample(count: int) -> list[torch.Tensor]:
            slots = replace(inputs, batch_size=count).crash_log_slots
            with CrashLog(
                (self._crash_folder or claims[0].staging) / IN_FLIGHT, slots
            ) as crash_log:
                return decode_sample(self._sample, specs, inputs, crash_log)

        tuned = list(specs)
        if self._elsewhere:
            self._computations = self._choose_elsewhere(specs, recorded, settings)
        else:
            tuned = tune(specs, recorded, settings, sample)
            self._computations = [
                dict(describe(spec, self._options, images.root, inputs.batch_size).computation)
                for spec in tuned
            ]
        self._clock.end("tune")
        return tuned

    def _choose_elsewhere(
        self,
        specs: Sequence[EmbeddingSpec],
        recorded: Sequence[Recorded | None],
        settings: TuneSettings,
    ) -> list[dict[str, Any]]:
        """Choose the precision on a device of the cluster, since this machine has none like it."""
        assert self._model_names is not None  # checked at the start
        options = replace(self._options, device=self._elsewhere)
        names, sample = tuple(self._model_names), tuple(self._sample)
        trial = Trial(names, options, weights_of(specs), tuple(recorded), settings, sample)
        return run_trial_on_cluster(trial)

    def compare(
        self,
        specs: Sequence[EmbeddingSpec],
        claims: Sequence[ClaimedFolder],
        images: ImageList,
        sizes: Sizes,
    ) -> list[StoreOutput]:
        """Compare the images with the rows of each store, and plan what to compute."""
        content = self._options.check == "content"
        snapshot = functools.cache(lambda: take_snapshot(images, content=content))
        outputs = []
        for index, (claim, spec) in enumerate(zip(claims, specs, strict=True)):
            options = replace(self._options, shard_images=sizes.shard_images[index])
            description = describe(spec, options, images.root, sizes.batch_size)
            description = replace(description, computation=self._computations[index])
            outputs.append(StoreOutput(claim, spec, description, images, snapshot, options))
        return outputs

    def check_space(self, outputs: Sequence[StoreOutput]) -> None:
        """Check that the pending rows fit on the disk."""
        check_disk_space(outputs)
        self._clock.end("compare")

    def compute(
        self,
        outputs: Sequence[StoreOutput],
        images: ImageList,
        inputs: Inputs,
        callbacks: Callbacks,
    ) -> Computation:
        """Compute the pending rows, and return what that took."""
        computing = self._computing([output.spec for output in outputs], inputs, images)
        computation = self._compute(LeasedRun(outputs, images, callbacks), computing)
        check_has_rows(outputs)
        self._clock.end("compute", start=computation.start_seconds)
        return computation

    def _computing(
        self, specs: Sequence[EmbeddingSpec], inputs: Inputs, images: ImageList
    ) -> Computing:
        return Computing(self._options, specs, inputs, self._model_names, images.root, self._sample)

    def _compute(self, leased: LeasedRun, computing: Computing) -> Computation:
        try:
            return compute(leased, computing)
        finally:
            timer = computing.inputs.timer
            if self._options.profile is not None and timer is not None:
                _write_profile(self._options.profile, timer)

    def publish(self, outputs: Sequence[StoreOutput]) -> tuple[StoreReport, ...]:
        """Make the stores visible."""
        return tuple(output.publish() for output in outputs)

    def _make_report(
        self,
        images: ImageList,
        specs: Sequence[EmbeddingSpec],
        stores: tuple[StoreReport, ...],
        pending: int,
        computation: Computation,
    ) -> Report:
        self._clock.end("publish")
        seconds = self._clock.seconds
        computed = self._computations
        cosines = [each["least_cosine"] for each in computed if each["least_cosine"] is not None]
        precisions = dict.fromkeys(str(each["precision"]) for each in computed)
        devices = (worker.device.partition(" of ")[0] for worker in computation.workers)
        return Report(
            stores=stores,
            images=len(images),
            resumed=len(images) - pending,
            passed_over=images.passed_over,
            skipped=images.skipped,
            excluded=images.excluded,
            device=self._elsewhere or ", ".join(dict.fromkeys(devices)) or str(device_of(specs)),
            precision=join_names(list(precisions)),
            least_cosine=min(cosines, default=None),
            is_compiled=any(each["compiled"] for each in computed),
            seconds=sum(seconds.values()),
            load_seconds=sum(seconds.get(name, 0.0) for name in ("list", "load", "tune", "start")),
            accepted_failure_rate=self._options.max_failure_rate,
            spent=computation.spent,
            workers=computation.workers,
            unlisted=unlisted_folders(images),
        )

    def _write_run_json(self, report: Report, specs: Sequence[EmbeddingSpec], threads: int) -> None:
        names = self._model_names
        write_run_json(
            report,
            None if names is None else request_of(names, self._options),
            computed=Computed(
                [[backbone.provenance for backbone in spec.backbones] for spec in specs],
                threads,
            ),
            options=self._options,
            started=self._clock.started,
            seconds=self._clock.seconds,
        )


class _StageClock:
    """Measures the stages of a run, one after the other."""

    def __init__(self) -> None:
        self.started = datetime.now(timezone.utc)
        self.seconds: dict[str, float] = {}
        self._begun = time.perf_counter()

    def end(self, stage: str, *, start: float = 0.0) -> None:
        """Attribute the time since the end of the previous stage to this one.

        Args:
            stage: Name of the stage.
            start: Seconds of it that workers took to start, which are a stage of their own.
        """
        now = time.perf_counter()
        if start:
            self.seconds["start"] = start
        self.seconds[stage] = now - self._begun - start
        self._begun = now


def _spread(images: ImageList, count: int) -> list[bytes]:
    """Return the absolute paths of so many images, evenly spread over the list."""
    indices = np.unique(np.linspace(0, len(images) - 1, count).astype(int))
    return [images.full_path(int(index)) for index in indices]


def _write_profile(file: str, timer: Timer) -> None:
    try:
        Path(file).write_text(timer.chrome_trace(), "utf-8")
    except OSError as error:  # the rows are worth more than the profile
        log.warning("cannot write the profile %s: %s", file, error.strerror)
