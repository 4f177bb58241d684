"""A worker: loads the models once, and computes one leased shard after another."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from extractor.compute.inputs import Inputs
from extractor.compute.tune import Recorded, TuneSettings, tune
from extractor.errors import DeviceError, UsageError
from extractor.images.types import ImageInfo
from extractor.lease.describe import describe
from extractor.lease.lease import Lease
from extractor.lease.paths_file import PathsFile
from extractor.lease.plan import RunPlan, StoreTarget
from extractor.loading.crash_log import CrashLog
from extractor.models.embedding import EmbeddingSpec, load_specs
from extractor.models.from_file import count_as_imported
from extractor.options import Options
from extractor.workers.opening import ShardOpener
from extractor.workers.pipeline import AfterBatch, OnReceipt, ShardPipeline, ShardWork

__all__ = ["ShardWorker", "WorkerSetup", "decode_sample"]

DIFFERENCES_SHOWN = 3


@dataclass(frozen=True)
class WorkerSetup:
    """Everything that a worker needs to know of a run. Small enough to send.

    Attributes:
        models: Names of the models.
        options: Options of the run, with the device and the threads of this worker.
        weights: SHA-256 of the weights by full name of the model.
        plan: The shards.
        paths: Folder of the paths of their images, see :mod:`extractor.lease.paths_file`.
        root: Folder that these paths are relative to.
        batch_size: Number of images in one forward pass.
        sample: Absolute paths of the images that precision and compilation are tried on.
        suspects: Absolute paths of images to decode in a process of their own.
        crash_log: File for the images that the worker is decoding.
        pixel_share: Number of pixels that the worker may decode at once.
        large_image_slot: File that stands for the right to decode an image above the share.
        processes: Number of workers on the machine, which share its memory.
        code: Files that the driver counted as code of the models.
    """

    models: tuple[str, ...]
    options: Options
    weights: Mapping[str, str]
    plan: RunPlan
    paths: Path
    root: bytes
    batch_size: int
    sample: tuple[bytes, ...]
    suspects: tuple[bytes, ...]
    crash_log: Path
    pixel_share: int | None = None
    large_image_slot: Path | None = None
    processes: int = 1
    code: tuple[str, ...] = ()


class ShardWorker:
    """Computes leased shards with models that are loaded once.

    Args:
        setup: The run.

    Raises:
        UsageError: This worker would make other rows than the driver described.
        DeviceError: It cannot compile the network, which the driver could.
        ExtractorError: A model cannot be loaded.
    """

    def __init__(self, setup: WorkerSetup) -> None:
        self._setup = setup
        self._plan = setup.plan
        file, root = PathsFile(setup.paths), setup.root

        def paths(images: range) -> list[bytes]:
            return [os.path.join(root, path) for path in file.read(images)]

        self._opener = ShardOpener(setup.plan, paths)
        self._inputs = Inputs(
            setup.options,
            setup.batch_size,
            frozenset(setup.suspects),
            pixel_share=setup.pixel_share,
            large_image_slot=setup.large_image_slot,
        )
        count_as_imported(setup.code)
        specs = load_specs(setup.models, setup.options, recorded_sha256=setup.weights)
        self._specs = self._tuned(specs)
        for target in self._targets:
            self._check_same(target)
        self._pipeline = ShardPipeline(self._specs, self._inputs, setup.crash_log, setup.models)
        self._next: Lease | None = None

    def compute(
        self,
        leases: Callable[[], Lease | None],
        after_batch: AfterBatch,
        on_receipt: OnReceipt,
    ) -> None:
        """Compute the shards that are leased, until there is no lease.

        Args:
            leases: Returns the next lease if there is one now. Called from any thread, as soon as
                the images of the next shard can be decoded.
            after_batch: Called after each batch.
            on_receipt: Called for each shard once it is on the disk.

        Raises:
            StoreError: The file system refuses.
            DeviceError: The device is full, busy or broken.
        """
        self._next = leases()
        while self._next is not None:
            index = self._plan[self._next.shard].pass_index
            stores = [target.spec for target in self._plan.passes[index].stores]
            works = self._works(index, leases)
            self._pipeline.compute(works, stores, after_batch, on_receipt)

    def _works(self, pass_index: int, leases: Callable[[], Lease | None]) -> Iterator[ShardWork]:
        """Yield the leased shards of one pass, and stop at the first lease of another pass."""
        while self._next is not None and self._plan[self._next.shard].pass_index == pass_index:
            yield self._opener.open(self._next)
            self._next = leases()

    @property
    def _targets(self) -> Iterator[StoreTarget]:
        return (target for each in self._plan.passes for target in each.stores)

    def _tuned(self, specs: Sequence[EmbeddingSpec]) -> list[EmbeddingSpec]:
        """Return the specs in the precision that the driver chose, compiled if it compiled."""
        recorded: list[Recorded | None] = [None] * len(specs)
        for target in self._targets:
            computation = target.description.computation
            recorded[target.spec] = Recorded.of(computation, same_run=True)
        settings = TuneSettings(
            choose_precision=self._setup.options.precision == "auto",
            compile=self._setup.options.compile,
            images=0,
            batch_size=self._setup.batch_size,
        )

        def sample(count: int) -> list[torch.Tensor]:
            return decode_sample(self._setup.sample, specs, self._inputs)

        return tune(specs, recorded, settings, sample)

    def _check_same(self, target: StoreTarget) -> None:
        expected = target.description
        options = replace(self._setup.options, shard_images=expected.shard_images)
        root, batch_size = os.fsencode(expected.root), self._setup.batch_size
        own = describe(self._specs[target.spec], options, root, batch_size)
        differences = [*expected.differences(own), *expected.software_changes(own)]
        if own.computation.get("compiled") != expected.computation.get("compiled"):
            raise DeviceError("a worker could not compile the model; try --compile off")
        if differences:
            shown = "; ".join(
                f"{each.key}: {each.before} in the driver, {each.now} in the worker"
                for each in differences[:DIFFERENCES_SHOWN]
            )
            raise UsageError(
                f"a worker would make other rows than the driver ({shown}); install the same "
                "versions, and use the same weights and kind of device everywhere"
            )


def decode_sample(
    paths: Sequence[bytes],
    specs: Sequence[EmbeddingSpec],
    inputs: Inputs,
    crash_log: CrashLog | None = None,
) -> list[torch.Tensor]:
    """Decode images to try the networks on.

    Args:
        paths: Paths of the images.
        specs: Embeddings of a run.
        inputs: Decodes the images.
        crash_log: Keeps the images that are being decoded.

    Returns:
        ``(N, H, W, 3)`` uint8 for each of :func:`~extractor.compute.inputs.pictures_of`, where N is
        at most the number of paths: undecodable images are left out.
    """
    if not paths:
        return []
    untimed = Inputs(inputs.options, len(paths), inputs.suspects)
    with untimed.loader([list(paths)], specs, crash_log) as loader:
        (batch,) = loader
        kept = [isinstance(outcome, ImageInfo) for outcome in batch.outcomes]
        return [picture[torch.tensor(kept)] for picture in batch.pictures]
