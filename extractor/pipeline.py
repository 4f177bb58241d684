"""Ties the parts together: images in, a store or an array out."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from extractor.backbones import Backbone, Model, Target, check_models, load_targets
from extractor.decode import EncodedImage, Failure, ImageInfo, ImageSource
from extractor.description import describe
from extractor.devices import available_cores, device_errors
from extractor.errors import DecodeError, SourceError, UsageError
from extractor.inference import Embedded, embed, pictures_of
from extractor.loader import BatchLoader
from extractor.options import (
    DEFAULT_MODEL,
    MAX_SHARDS,
    Options,
    default_batch_size,
    planned_stores,
    store_folders,
)
from extractor.sources import ImageList, Input, list_images, show
from extractor.store import FeatureStore, ImageRecord, Manifest, StoreWriter
from extractor.store.writer import ShardWriter, check_place

__all__ = [
    "BatchPlan",
    "Extractor",
    "Progress",
    "Report",
    "StoreReport",
    "extract",
    "plan_batches",
]

_DEFAULT = Options()

# Failed images whose reasons stand in an error message or a report; the store lists them all.
FAILURES_SHOWN = 5


@dataclass(frozen=True)
class Progress:
    """How far a run is, in images; ``failed`` of the ``done`` ones have no row."""

    done: int
    total: int
    failed: int


@dataclass(frozen=True)
class StoreReport:
    """What one run put into one store.

    Attributes:
        out: folder of the store.
        rows, failed: images with a row and those without.
        shape: of one embedding: ``(dim,)``, or the axes of a map or of tokens.
        backbone: the model and its weights in a few words.
        first_failures: path and reason of the first few failed images.
    """

    out: Path
    rows: int
    failed: int
    shape: tuple[int, ...]
    backbone: str
    first_failures: tuple[tuple[str, str], ...]

    @property
    def store(self) -> FeatureStore:
        """The store, opened."""
        return FeatureStore.open(self.out)


@dataclass(frozen=True)
class Report:
    """What one run did.

    Attributes:
        stores: that it filled, in the order of models and layers.
        images: that were asked for.
        passed_over: files in the folders that are no images.
        device, precision: that computed.
        seconds: of the whole run.
        load_seconds: of those, until the models were ready.
    """

    stores: tuple[StoreReport, ...]
    images: int
    passed_over: int
    device: str
    precision: str
    seconds: float
    load_seconds: float

    @property
    def images_per_second(self) -> float:
        """Images, failed ones included, a second since the models were ready."""
        return self.images / max(self.seconds - self.load_seconds, 1e-9)

    @property
    def failure_rate(self) -> float:
        """Share of the images that have no row, from 0 to 1; of several stores in the worst."""
        return max(store.failed for store in self.stores) / self.images

    @property
    def _only(self) -> StoreReport:
        if len(self.stores) != 1:
            raise UsageError(f"this run filled {len(self.stores)} stores; look at report.stores")
        return self.stores[0]

    @property
    def out(self) -> Path:
        """Folder of the one store."""
        return self._only.out

    @property
    def rows(self) -> int:
        """Images that have a row in the one store."""
        return self._only.rows

    @property
    def failed(self) -> int:
        """Images without a row in the one store."""
        return self._only.failed

    @property
    def dim(self) -> int:
        """Numbers in one embedding of the one store."""
        return math.prod(self._only.shape)

    @property
    def first_failures(self) -> tuple[tuple[str, str], ...]:
        """Path and reason of the first few failed images of the one store."""
        return self._only.first_failures

    @property
    def store(self) -> FeatureStore:
        """The one store, opened."""
        return self._only.store

    @property
    def failures(self) -> list[dict[str, str]]:
        """Every image that failed in the one store with its reason, read from it."""
        return self.store.failures


class BatchPlan(NamedTuple):
    """Images ``start`` to ``stop`` of the list, which are one batch of a shard."""

    shard: int
    start: int
    stop: int


def plan_batches(images: int, *, shard_images: int, batch_size: int) -> Iterator[BatchPlan]:
    """Cut a list of images into shards and these into batches; no batch spans two shards.

    So a shard can be computed alone, and each image has the same place in a batch, wherever
    the work starts.

    >>> list(plan_batches(5, shard_images=3, batch_size=2))
    [BatchPlan(shard=0, start=0, stop=2), BatchPlan(shard=0, start=2, stop=3), \
BatchPlan(shard=1, start=3, stop=5)]
    """
    for shard, first in enumerate(range(0, images, shard_images)):
        last = min(first + shard_images, images)
        for start in range(first, last, batch_size):
            yield BatchPlan(shard, start, min(start + batch_size, last))


def extract(
    images: Input | Iterable[Input] | ImageList,
    model: Model | Sequence[Model] = DEFAULT_MODEL,
    out: str | os.PathLike[str] | None = None,
    *,
    weights: str | os.PathLike[str] = _DEFAULT.weights,
    weights_key: str | None = _DEFAULT.weights_key,
    layers: Sequence[str] = _DEFAULT.layers,
    pool: str = _DEFAULT.pool,
    concat: bool = _DEFAULT.concat,
    bypass: Sequence[str] = _DEFAULT.bypass,
    image_size: int | tuple[int, int] | None = _DEFAULT.image_size,
    crop_pct: float | None = _DEFAULT.crop_pct,
    interpolation: str | None = _DEFAULT.interpolation,
    mean: tuple[float, float, float] | None = _DEFAULT.mean,
    std: tuple[float, float, float] | None = _DEFAULT.std,
    resize: str | None = _DEFAULT.resize,
    seed: int = _DEFAULT.seed,
    device: str = _DEFAULT.device,
    precision: str = _DEFAULT.precision,
    dtype: str = _DEFAULT.dtype,
    normalize: bool = _DEFAULT.normalize,
    batch_size: int | None = _DEFAULT.batch_size,
    workers: int | None = _DEFAULT.workers,
    shard_images: int = _DEFAULT.shard_images,
    overwrite: bool = _DEFAULT.overwrite,
    progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Embed folders of images into stores of ``.npy`` files; this is what the command runs.

    An image that cannot be decoded has no row and stands in the store's ``failures.jsonl``.

    >>> extract("images", "resnet50", "features/resnet50").rows  # doctest: +SKIP
    334

    Args:
        images: a folder, an image, several of them, or a list from :mod:`extractor.sources`.
        model: a name as for :func:`load_backbone`, ``A+B`` for the embeddings of A and B, each of
            unit length, in one vector, or a :class:`Backbone`. Several fill a store each, while
            every image is decoded once.
        out: folder of the store; of several stores, the folder that holds theirs. None is
            ``features/<name>``, the name that of the model, with ``@layer`` where one was chosen.
        progress: is called after every batch, from this thread.

    The other arguments are the fields of :class:`extractor.options.Options`.

    Raises:
        ExtractorError: nothing usable was added; one of its children says what went wrong.
    """
    started = time.perf_counter()
    options = Options(
        weights=os.fspath(weights),
        weights_key=weights_key,
        layers=layers,
        pool=pool,
        concat=concat,
        bypass=bypass,
        image_size=image_size,
        crop_pct=crop_pct,
        interpolation=interpolation,
        mean=mean,
        std=std,
        resize=resize,
        seed=seed,
        device=device,
        precision=precision,
        dtype=dtype,
        normalize=normalize,
        batch_size=batch_size,
        workers=workers,
        shard_images=shard_images,
        overwrite=overwrite,
    )
    models = [model] if isinstance(model, (str, Backbone)) else list(model)
    place = None if out is None else os.fspath(out)
    if place == "":
        raise UsageError("got an empty name, expected a folder for the store")
    check_models(models, options)
    _check_planned(models, place, options)
    sources = images if isinstance(images, ImageList) else list_images(images)
    if len(sources) > MAX_SHARDS * shard_images:
        raise UsageError(
            f"{len(sources)} images in shards of {shard_images} are more than {MAX_SHARDS} "
            "shards; use a larger --shard-images"
        )
    targets = load_targets(models, options)
    folders = [Path(folder) for folder in store_folders(place, [one.name for one in targets])]
    tallies = [_Tally() for _ in targets]
    with ExitStack() as stack:
        writers = [
            stack.enter_context(StoreWriter(folder, overwrite=overwrite)) for folder in folders
        ]
        loaded = time.perf_counter()
        run = _Run(targets, writers, tallies, options, sources)
        run.fill(progress)
        for target, tally in zip(targets, tallies, strict=True):
            if tally.failed == len(sources):
                told = "; ".join(f"{path}: {reason}" for path, reason in tally.first_failures)
                which = f" of {target.name}" if len(targets) > 1 else ""
                raise SourceError(
                    f"none of the {len(sources)} images gives an embedding{which} ({told})"
                )
        manifests = run.publish()
    first = targets[0].parts[0].backbone
    return Report(
        stores=tuple(
            StoreReport(
                out=folder,
                rows=manifest.rows,
                failed=manifest.failed,
                shape=target.shape,
                backbone=str(target),
                first_failures=tuple(tally.first_failures),
            )
            for folder, manifest, target, tally in zip(
                folders, manifests, targets, tallies, strict=True
            )
        ),
        images=len(sources),
        passed_over=sources.passed_over,
        device=str(first.device),
        precision=first.precision,
        seconds=time.perf_counter() - started,
        load_seconds=loaded - started,
    )


def _check_planned(models: Sequence[Model], place: str | None, options: Options) -> None:
    """See whether the stores may be written, as far as it is known before a model is loaded."""
    typed = [model for model in models if isinstance(model, str)]
    names = planned_stores(typed, options)
    if names is not None and len(typed) == len(models):
        for folder in store_folders(place, names):
            check_place(Path(folder), overwrite=options.overwrite)


class _Tally:
    """Counts the images that failed in one store, and remembers the first few."""

    def __init__(self) -> None:
        self.failed = 0
        self.first_failures: list[tuple[str, str]] = []

    def fail(self, path: bytes, failure: Failure) -> None:
        self.failed += 1
        if len(self.first_failures) < FAILURES_SHOWN:
            self.first_failures.append((show(path), failure.message))


class _Run:
    """Fills the stores of one run, side by side."""

    def __init__(
        self,
        targets: Sequence[Target],
        writers: Sequence[StoreWriter],
        tallies: Sequence[_Tally],
        options: Options,
        sources: ImageList,
    ) -> None:
        self._targets = targets
        self._writers = writers
        self._tallies = tallies
        self._options = options
        self._sources = sources
        self._batch_size = _batch_size(targets, options)
        self._descriptions = [
            describe(target, options, sources.root, self._batch_size) for target in targets
        ]

    def fill(self, progress: Callable[[Progress], None] | None) -> None:
        """Compute every shard in order; images without a row go to the failures."""
        total = len(self._sources)
        plan = list(
            plan_batches(
                total, shard_images=self._options.shard_images, batch_size=self._batch_size
            )
        )
        wanted = ([self._sources.full_path(i) for i in range(b.start, b.stop)] for b in plan)
        with _loader(wanted, self._targets, self._options, self._batch_size) as loader:
            rows = embed(self._targets, loader, normalize=self._options.normalize)
            computed = zip(plan, rows, strict=True)
            for number, batches in itertools.groupby(computed, key=lambda pair: pair[0].shard):
                with ExitStack() as stack:
                    shards = [
                        stack.enter_context(writer.shard(number, description))
                        for writer, description in zip(
                            self._writers, self._descriptions, strict=True
                        )
                    ]
                    images = 0
                    for batch, embedded in batches:
                        self._append(shards, embedded, batch)
                        images += batch.stop - batch.start
                        if progress is not None:
                            failed = max(tally.failed for tally in self._tallies)
                            progress(Progress(batch.stop, total, failed))
                    for shard in shards:
                        shard.finish(images)

    def publish(self) -> list[Manifest]:
        """Make the stores visible, one after the other."""
        return [
            writer.publish(description, len(self._sources))
            for writer, description in zip(self._writers, self._descriptions, strict=True)
        ]

    def _append(self, shards: Sequence[ShardWriter], embedded: Embedded, batch: BatchPlan) -> None:
        """Part the rows to keep, with their records, from the failures, which are noted."""
        paths = self._sources.paths[batch.start : batch.stop]
        for shard, writer, tally, rows in zip(
            shards, self._writers, self._tallies, embedded.rows, strict=True
        ):
            kept, records = [], []
            finite = np.asarray(np.isfinite(rows).reshape(len(rows), -1).all(axis=1))
            for i, (path, outcome) in enumerate(zip(paths, embedded.outcomes, strict=True)):
                if isinstance(outcome, ImageInfo) and not finite[i]:
                    outcome = Failure("not-finite", "the embedding holds NaN or infinity")
                if isinstance(outcome, Failure):
                    writer.fail(path, outcome.reason, outcome.message)
                    tally.fail(path, outcome)
                else:
                    kept.append(i)
                    records.append(ImageRecord(path, *_stat(outcome)))
            shard.append(rows[kept], records)


def _stat(info: ImageInfo) -> tuple[int, int, int, int]:
    return info.size, info.mtime_ns, info.width, info.height


def _batch_size(targets: Sequence[Target], options: Options) -> int:
    # No larger than a shard, which ends a batch; not cut to the number of images, on which the
    # value of a row must not depend.
    device = targets[0].parts[0].backbone.device
    return min(options.batch_size or default_batch_size(device.type), options.shard_images)


def _loader(
    batches: Iterable[Sequence[ImageSource]],
    targets: Sequence[Target],
    options: Options,
    batch_size: int,
) -> BatchLoader:
    device = targets[0].parts[0].backbone.device
    with device_errors(device):
        return BatchLoader(
            batches,
            pictures_of(targets),
            batch_size=batch_size,
            workers=options.workers or available_cores(),
            pin=device.type == "cuda",
        )


# ---------------------------------------------------------------------------------------------
# In memory

AnyImage: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[np.uint8]"


class Extractor:
    """Embeds images in memory, with the same pixels and the same model as :func:`extract`.

    >>> extractor = Extractor("torchvision:squeezenet1_0", weights="random", device="cpu")
    >>> extractor([np.zeros((300, 200, 3), np.uint8)]).shape
    (1, 512)

    Args:
        model: a name, ``A+B`` for the embeddings of both in one vector, or a :class:`Backbone`.

    The other arguments are as for :func:`extract`.

    Raises:
        UsageError: several layers without ``concat``, of which each image has no one embedding.
        ExtractorError: as :func:`load_backbone`.
    """

    def __init__(
        self,
        model: Model = DEFAULT_MODEL,
        *,
        weights: str | os.PathLike[str] = _DEFAULT.weights,
        weights_key: str | None = _DEFAULT.weights_key,
        layers: Sequence[str] = _DEFAULT.layers,
        pool: str = _DEFAULT.pool,
        concat: bool = _DEFAULT.concat,
        bypass: Sequence[str] = _DEFAULT.bypass,
        image_size: int | tuple[int, int] | None = _DEFAULT.image_size,
        crop_pct: float | None = _DEFAULT.crop_pct,
        interpolation: str | None = _DEFAULT.interpolation,
        mean: tuple[float, float, float] | None = _DEFAULT.mean,
        std: tuple[float, float, float] | None = _DEFAULT.std,
        resize: str | None = _DEFAULT.resize,
        seed: int = _DEFAULT.seed,
        device: str = _DEFAULT.device,
        precision: str = _DEFAULT.precision,
        normalize: bool = _DEFAULT.normalize,
        batch_size: int | None = _DEFAULT.batch_size,
        workers: int | None = _DEFAULT.workers,
    ) -> None:
        self._process = os.getpid()
        self._options = Options(
            weights=os.fspath(weights),
            weights_key=weights_key,
            layers=layers,
            pool=pool,
            concat=concat,
            bypass=bypass,
            image_size=image_size,
            crop_pct=crop_pct,
            interpolation=interpolation,
            mean=mean,
            std=std,
            resize=resize,
            seed=seed,
            device=device,
            precision=precision,
            normalize=normalize,
            batch_size=batch_size,
            workers=workers,
        )
        targets = load_targets([model], self._options)
        if len(targets) != 1:
            names = ", ".join(target.name for target in targets)
            raise UsageError(f"{len(targets)} embeddings of an image ({names}); use concat=True")
        self._targets = targets

    @property
    def backbones(self) -> tuple[Backbone, ...]:
        """That compute the embedding; one, but for ``A+B``."""
        return self._targets[0].backbones

    @property
    def dim(self) -> int:
        """Numbers in one embedding."""
        return self._targets[0].dim

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one embedding: ``(dim,)``, or the axes of a layer that is not pooled."""
        return self._targets[0].shape

    def __call__(self, images: Iterable[AnyImage]) -> npt.NDArray[np.float32]:
        """Embed images, in the order in which they come.

        Args:
            images: paths, encoded images as bytes, PIL images, or uint8 RGB arrays ``(H, W, 3)``
                (``(H, W)`` is grey, a fourth channel is dropped); they may be mixed.

        Returns:
            ``(N, dim)`` float32; ``(N, *shape)`` of a layer that is not pooled.

        Raises:
            DecodeError: an image cannot be decoded; names its place among the images.
            UsageError: a single image instead of several, something that is no image, or a call
                in a process that was forked after the extractor was made.
        """
        if isinstance(images, (str, bytes, os.PathLike, Image.Image)) or not isinstance(
            images, Iterable
        ):
            raise UsageError(f"images: got one {type(images).__name__}, expected a list of images")
        if os.getpid() != self._process:
            # torch's threads do not survive a fork, and waiting for them would never end.
            raise UsageError("this Extractor is of another process; make one after the fork")
        sources = [_source(image, place) for place, image in enumerate(images)]
        if not sources:
            return np.empty((0, *self.shape), np.float32)
        # One image at the prompt should not pay for a full batch of padding.
        size = min(_batch_size(self._targets, self._options), len(sources))
        cuts = range(0, len(sources), size)
        rows = []
        with _loader(
            (sources[i : i + size] for i in cuts), self._targets, self._options, size
        ) as loader:
            computed = embed(self._targets, loader, normalize=self._options.normalize)
            for start, embedded in zip(cuts, computed, strict=True):
                for i, outcome in enumerate(embedded.outcomes, start):
                    if isinstance(outcome, Failure):
                        raise DecodeError(outcome.reason, f"image {i}: {outcome.message}")
                rows.append(embedded.rows[0])
        return np.concatenate(rows)


def _source(image: AnyImage, place: int) -> ImageSource:
    if isinstance(image, bytes):
        return EncodedImage(image)
    if isinstance(image, (str, os.PathLike, Image.Image, np.ndarray)):
        return image
    raise UsageError(
        f"image {place}: got a {type(image).__name__}, expected a path, bytes, a PIL image or a "
        "uint8 array"
    )
