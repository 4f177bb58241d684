"""Ties the parts together: images in, a store or an array out."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
from extractor.errors import (
    DecodeError,
    InterruptedRunError,
    SourceError,
    StoreError,
    UsageError,
)
from extractor.inference import embed, pictures_of
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
from extractor.store import (
    FailureRecord,
    FeatureStore,
    ImageRecord,
    Job,
    Manifest,
    StoreWriter,
)
from extractor.store.format import MANIFEST, listing_digest
from extractor.store.place import check_place, finish_publishing
from extractor.store.shard import ShardWriter

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
        resumed: of those, how many an earlier run had done already.
        passed_over: files in the folders that are no images.
        device, precision: that computed.
        seconds: of the whole run.
        load_seconds: of those, until the models were ready.
    """

    stores: tuple[StoreReport, ...]
    images: int
    resumed: int
    passed_over: int
    device: str
    precision: str
    seconds: float
    load_seconds: float

    @property
    def images_per_second(self) -> float:
        """Images, failed ones included, a second since the models were ready."""
        return (self.images - self.resumed) / max(self.seconds - self.load_seconds, 1e-9)

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
    stop: Callable[[], bool] | None = None,
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
        stop: is asked after every batch; once it says yes, the run ends with what is done kept.

    The other arguments are the fields of :class:`extractor.options.Options`.

    A run that is stopped, killed or fails keeps what it has done, and the same call goes on there.

    Raises:
        InterruptedRunError: ``stop`` said so.
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
    loaded = time.perf_counter()
    batch_size = _batch_size(targets, options)
    listing = listing_digest(sources.paths)
    jobs = [
        Job(describe(target, options, sources.root, batch_size), len(sources), listing)
        for target in targets
    ]
    with ExitStack() as stack:
        stores = [
            stack.enter_context(_Store(folder, target, job, sources, overwrite=overwrite))
            for folder, target, job in zip(folders, targets, jobs, strict=True)
        ]
        resumed = min(store.done for store in stores)
        _fill(stores, sources, options, batch_size, progress, stop)
        _check_any_row(stores)
        reports = tuple(store.publish() for store in stores)
    first = targets[0].parts[0].backbone
    return Report(
        stores=reports,
        images=len(sources),
        resumed=resumed,
        passed_over=sources.passed_over,
        device=str(first.device),
        precision=first.precision,
        seconds=time.perf_counter() - started,
        load_seconds=loaded - started,
    )


def _check_planned(models: Sequence[Model], place: str | None, options: Options) -> None:
    """See whether the stores may be written, as far as it is known before a model is loaded.

    Whether a store that is there is what is asked for can only be said after that.
    """
    typed = [model for model in models if isinstance(model, str)]
    names = planned_stores(typed, options)
    if names is not None and len(typed) == len(models):
        for folder in store_folders(place, names):
            check_place(Path(folder), overwrite=True, locked=True)


class _Store:
    """One of the stores of a run: taken up where an interrupted run left it, filled, published.

    Attributes:
        target: what it holds.
        done: images, from the first on, that have been dealt with.
        failed: of these, how many have no row.
    """

    def __init__(
        self, folder: Path, target: Target, job: Job, sources: ImageList, *, overwrite: bool
    ) -> None:
        self.target = target
        self.done = 0
        self.failed = 0
        self._folder = folder
        self._job = job
        self._sources = sources
        self._overwrite = overwrite
        self._first_failures: list[tuple[str, str]] = []
        self._there: Manifest | None = None  # a finished store that is what was asked for
        self._writer = StoreWriter(folder, overwrite=overwrite)
        self._shard: ShardWriter | None = None

    def __enter__(self) -> _Store:
        finish_publishing(self._folder)
        if not self._overwrite and (self._folder / MANIFEST).is_file():
            self._take_finished()
            return self
        self._writer.__enter__()
        try:
            self.done = self._writer.begin(self._job)
            changed = self._changed(self._writer.records_done(self._job.description))
            if changed and self._overwrite:
                self.done = self._writer.begin(self._job, anew=True)
            elif changed:
                raise self._changed_error(changed)
            self._note(self._writer.failures_done(self._job.description))
        except BaseException:
            self._writer.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if not self.is_finished:
            self._writer.__exit__()

    @property
    def is_finished(self) -> bool:
        """Whether it was there, complete, before the run."""
        return self._there is not None

    @contextmanager
    def shard(self, number: int) -> Iterator[None]:
        """Open a shard for :meth:`append`; it counts once this is left without an error."""
        if self._writer.is_finished(number):
            yield  # another store of the run is behind
            return
        with self._writer.shard(number, self._job.description) as self._shard:
            yield
            self._shard.finish()
        self._shard = None

    def append(
        self,
        batch: BatchPlan,
        rows: npt.NDArray[np.float32],
        outcomes: Sequence[ImageInfo | Failure],
    ) -> None:
        """Part the rows to keep, with their records, from the failures."""
        if batch.start < self.done or self._shard is None:
            return
        kept, records, failures = [], [], []
        with np.errstate(over="ignore"):  # beyond what float16 holds is seen as not finite
            stored = rows.astype(self._job.description.dtype, copy=False)
        finite = np.asarray(np.isfinite(stored).reshape(len(rows), -1).all(axis=1))
        paths = self._sources.paths[batch.start : batch.stop]
        for i, (path, outcome) in enumerate(zip(paths, outcomes, strict=True)):
            if isinstance(outcome, ImageInfo) and not finite[i]:
                outcome = Failure("not-finite", self._not_finite(rows[i]))
            if isinstance(outcome, Failure):
                failures.append(FailureRecord(path, outcome.reason, outcome.message))
            else:
                kept.append(i)
                records.append(ImageRecord(path, *_stat(outcome)))
        self._shard.append(stored[kept], records, failures)
        self._note(failures)
        self.done = batch.stop

    def _not_finite(self, row: npt.NDArray[np.float32]) -> str:
        if np.isfinite(row).all():
            return f"the embedding holds {abs(row).max():.3g}, more than float16 does"
        return "the embedding holds NaN or infinity"

    def discard(self) -> None:
        """Keep nothing for another run."""
        self._writer.discard()

    @property
    def first_failures(self) -> tuple[tuple[str, str], ...]:
        """Path and reason of the first few images without a row."""
        return tuple(self._first_failures)

    def publish(self) -> StoreReport:
        """Make it visible, and say what is in it."""
        manifest = self._there or self._writer.publish(self._job)
        return StoreReport(
            out=self._folder,
            rows=manifest.rows,
            failed=manifest.failed,
            shape=self.target.shape,
            backbone=str(self.target),
            first_failures=self.first_failures,
        )

    def _note(self, failures: Iterable[FailureRecord]) -> None:
        for failure in failures:
            self.failed += 1
            if len(self._first_failures) < FAILURES_SHOWN:
                self._first_failures.append((show(failure.path), failure.message))

    def _take_finished(self) -> None:
        store = FeatureStore.open(self._folder)
        there = store.manifest
        differ = Job(there.description, there.images, there.listing).differences(self._job)
        if differ:
            raise StoreError(
                f"{self._folder} holds a finished store of something else "
                f"({'; '.join(differ[:5])}); replace it with --overwrite, or choose another --out"
            )
        columns = (map(os.fsencode, store.paths), store.column("size"), store.column("mtime_ns"))
        changed = self._changed(
            ImageRecord(path, size, mtime, 0, 0) for path, size, mtime in zip(*columns, strict=True)
        )
        if changed:
            raise self._changed_error(changed)
        self._there = there
        self.done = there.images
        self._note(
            FailureRecord(os.fsencode(one["path"]), one["error"], one["message"])
            for one in store.failures
        )

    def _changed(self, records: Iterable[ImageRecord]) -> list[bytes]:
        """Images that have rows and are no longer what they were when these were computed."""
        return [record.path for record in records if self._is_changed(record)]

    def _changed_error(self, changed: Sequence[bytes]) -> StoreError:
        names = ", ".join(map(show, changed[:FAILURES_SHOWN]))
        more = ", ..." if len(changed) > FAILURES_SHOWN else ""
        return StoreError(
            f"{self._folder}: {len(changed)} of the images that have rows there changed or went "
            f"since ({names}{more}); start anew with --overwrite, or choose another --out"
        )

    def _is_changed(self, record: ImageRecord) -> bool:
        try:
            status = os.stat(os.path.join(self._sources.root, record.path))
        except OSError:
            return True
        return (status.st_size, status.st_mtime_ns) != (record.size, record.mtime_ns)


def _fill(
    stores: Sequence[_Store],
    sources: ImageList,
    options: Options,
    batch_size: int,
    progress: Callable[[Progress], None] | None,
    stop: Callable[[], bool] | None,
) -> None:
    """Compute what is left, shard by shard in order, into all stores that are not finished."""
    unfinished = [store for store in stores if not store.is_finished]
    if not unfinished:
        return
    total = len(sources)
    done = min(store.done for store in unfinished)
    if progress is not None:
        progress(Progress(done, total, max(store.failed for store in unfinished)))
    whole = plan_batches(total, shard_images=options.shard_images, batch_size=batch_size)
    plan = [batch for batch in whole if batch.stop > done]
    targets = [store.target for store in unfinished]
    wanted = ([sources.full_path(i) for i in range(b.start, b.stop)] for b in plan)
    with _loader(wanted, targets, options, batch_size) as loader:
        computed = zip(plan, embed(targets, loader, normalize=options.normalize), strict=True)
        for number, batches in itertools.groupby(computed, key=lambda pair: pair[0].shard):
            with ExitStack() as stack:
                for store in unfinished:
                    stack.enter_context(store.shard(number))
                for batch, embedded in batches:
                    for store, rows in zip(unfinished, embedded.rows, strict=True):
                        store.append(batch, rows, embedded.outcomes)
                    if progress is not None:
                        failed = max(store.failed for store in unfinished)
                        progress(Progress(batch.stop, total, failed))
                    if stop is not None and stop() and batch.stop < total:
                        raise InterruptedRunError(batch.stop, total)


def _check_any_row(stores: Sequence[_Store]) -> None:
    """See whether every store has a row; if not, the next run would come to the same end.

    Raises:
        SourceError: one has none.
    """
    for store in stores:
        if store.failed == store.done:
            for each in stores:
                each.discard()
            told = "; ".join(f"{path}: {reason}" for path, reason in store.first_failures)
            which = f" of {store.target.name}" if len(stores) > 1 else ""
            raise SourceError(f"none of the {store.done} images gives an embedding{which} ({told})")


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
