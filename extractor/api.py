"""Ties the parts together: images in, a store or an array out."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from extractor.compute.embed import Embedded, embed, pictures_of
from extractor.compute.float32_retry import Mender
from extractor.compute.tune import Recorded, tune
from extractor.errors import (
    DecodeError,
    InterruptedRunError,
    SourceError,
    StoreError,
    UsageError,
)
from extractor.images.listing import ImageList, Input, list_images, show
from extractor.images.types import EncodedImage, Failure, ImageInfo, ImageSource
from extractor.loading.crash_log import CrashLog
from extractor.loading.loader import BatchLoader
from extractor.loading.nvjpeg import MAX_GROUP_IMAGES, NvjpegDecoder
from extractor.loading.options import LoaderOptions
from extractor.loading.watchdog import MAX_ABANDONED
from extractor.models.backbone import Backbone
from extractor.models.embedding import EmbeddingSpec, Model, check_models, load_specs
from extractor.models.naming import join_names, planned_stores, store_folders
from extractor.options import (
    DEFAULT_MODEL,
    Check,
    Compile,
    Decode,
    Dtype,
    Fuse,
    Options,
    Precision,
    default_batch_size,
)
from extractor.preprocess import Fit, Interpolation
from extractor.report import Progress, Report
from extractor.run.describe import describe, precision_of
from extractor.run.output import Filling, claimed
from extractor.run.recorded_weights import recorded_weights, weights_of
from extractor.run.run_json import request_of, write_record
from extractor.run.snapshot import current_images
from extractor.run.suspects import Suspects
from extractor.store.claim import ClaimedFolder
from extractor.store.format import IN_FLIGHT, MAX_SHARDS
from extractor.store.publish import check_output_folder
from extractor.store.writer import existing_computation
from extractor.system.cpu import available_cores, compute_threads
from extractor.system.devices import device_errors
from extractor.system.timing import Spent, Timer

__all__ = [
    "BatchPlan",
    "Extractor",
    "Progress",
    "Report",
    "extract",
    "plan_batches",
]

log = logging.getLogger(__name__)

_DEFAULT = Options()


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
    interpolation: Interpolation | None = _DEFAULT.interpolation,
    mean: tuple[float, float, float] | None = _DEFAULT.mean,
    std: tuple[float, float, float] | None = _DEFAULT.std,
    resize: Fit | None = _DEFAULT.resize,
    seed: int = _DEFAULT.seed,
    device: str = _DEFAULT.device,
    precision: Precision = _DEFAULT.precision,
    compile: Compile = _DEFAULT.compile,
    dtype: Dtype = _DEFAULT.dtype,
    normalize: bool = _DEFAULT.normalize,
    batch_size: int | None = _DEFAULT.batch_size,
    workers: int | None = _DEFAULT.workers,
    threads: int | None = _DEFAULT.threads,
    shard_images: int = _DEFAULT.shard_images,
    overwrite: bool = _DEFAULT.overwrite,
    fuse: Fuse = _DEFAULT.fuse,
    decode: Decode = _DEFAULT.decode,
    check: Check = _DEFAULT.check,
    keep_missing: bool = _DEFAULT.keep_missing,
    retry_failed: bool = _DEFAULT.retry_failed,
    max_pixels: int = _DEFAULT.max_pixels,
    image_timeout: float = _DEFAULT.image_timeout,
    max_failure_rate: float = _DEFAULT.max_failure_rate,
    lock: bool = _DEFAULT.lock,
    profile: str | os.PathLike[str] | None = None,
    progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Report:
    """Embed folders of images into stores of ``.npy`` files; this is what the command runs.

    An image that cannot be decoded has no row and stands in the store's ``failures.jsonl``.

    >>> extract("images", "resnet50", "features/resnet50").rows  # doctest: +SKIP
    334

    Args:
        images: a folder, an image, several of them, or a list from :mod:`extractor.images.listing`.
        model: a name as for :func:`load_backbone`, ``A+B`` for the embeddings of A and B, each of
            unit length, in one vector, or a :class:`Backbone`. Several fill a store each, while
            every image is decoded once.
        out: folder of the store; of several stores, the folder that holds theirs. None is
            ``features/<name>``, the name that of the model, with ``@layer`` where one was chosen.
        progress: is called after every batch, from this thread.
        stop: is asked after every batch; once it says yes, the run ends with what is done kept.

    The other arguments are the fields of :class:`extractor.options.Options`.

    A run that is stopped, killed or fails keeps what it has done, and the same call goes on there.
    On a finished store it computes the images that are new or changed, and retires the rows of
    those that changed or went.

    Raises:
        InterruptedRunError: ``stop`` said so.
        ExtractorError: nothing usable was added; one of its children says what went wrong.
    """
    clock = _Stages()
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
        compile=compile,
        dtype=dtype,
        normalize=normalize,
        batch_size=batch_size,
        workers=workers,
        threads=threads,
        shard_images=shard_images,
        overwrite=overwrite,
        fuse=fuse,
        decode=decode,
        check=check,
        keep_missing=keep_missing,
        retry_failed=retry_failed,
        max_pixels=max_pixels,
        image_timeout=image_timeout,
        max_failure_rate=max_failure_rate,
        lock=lock,
        profile=None if profile is None else os.fspath(profile),
    )
    models = [model] if isinstance(model, (str, Backbone)) else list(model)
    place = None if out is None else os.fspath(out)
    if place == "":
        raise UsageError("got an empty name, expected a folder for the store")
    check_models(models, options)
    _check_planned(models, place, options)
    sources = images if isinstance(images, ImageList) else list_images(images)
    clock.ended("list")
    if len(sources) > MAX_SHARDS * shard_images:
        raise UsageError(
            f"{len(sources)} images in shards of {shard_images} are more than {MAX_SHARDS} "
            "shards; use a larger --shard-images"
        )
    recorded = recorded_weights(models, place, options)
    specs = load_specs(models, options, recorded_sha256=recorded)
    import pyarrow.parquet  # noqa: F401  (not only at the end of the first shard, hours later)

    folders = [Path(folder) for folder in store_folders(place, [one.name for one in specs])]
    _check_decode(options.decode, specs[0].parts[0].backbone.device)
    clock.ended("load")
    batch_size = _batch_size(specs, options)
    current = functools.cache(lambda: current_images(sources, content=options.check == "content"))
    with ExitStack() as stack:
        stack.enter_context(compute_threads(options.threads))
        writers = [stack.enter_context(claimed(folder, options)) for folder in folders]
        suspects = _suspects([writer.staging for writer in writers])
        specs = _tuned(specs, models, writers, sources, options, batch_size, suspects)
        clock.ended("tune")
        stores = [
            Filling(
                writer,
                spec,
                describe(spec, options, sources.root, batch_size),
                sources,
                current,
                options,
            )
            for writer, spec in zip(writers, specs, strict=True)
        ]
        to_do = max(len(store.todo) - store.done for store in stores)
        _check_room(stores)
        clock.ended("compare")
        timer = Timer(trace=options.profile is not None)
        run = _Run(sources, models, specs, options, batch_size, suspects, timer)
        try:
            run.fill(stores, progress or _nothing, stop or _never)
        finally:
            if options.profile is not None:
                _write_profile(options.profile, timer)
        _check_any_row(stores)
        clock.ended("compute")
        reports = tuple(store.publish() for store in stores)
    clock.ended("publish")
    backbones = [backbone for spec in specs for backbone in spec.backbones]
    report = Report(
        stores=reports,
        images=len(sources),
        resumed=len(sources) - to_do,
        passed_over=sources.passed_over,
        device=str(backbones[0].device),
        precision=join_names(list(dict.fromkeys(map(precision_of, specs)))),
        least_cosine=min((c for b in backbones if (c := b.least_cosine) is not None), default=None),
        is_compiled=any(backbone.is_compiled for backbone in backbones),
        seconds=sum(clock.seconds.values()),
        load_seconds=sum(clock.seconds[name] for name in ("list", "load", "tune")),
        accepted_failure_rate=options.max_failure_rate,
        spent=run.spent,
    )
    typed = [one for one in models if isinstance(one, str)]
    write_record(
        report,
        request_of(typed, options) if len(typed) == len(models) else None,
        weights=[backbone.provenance.file for backbone in backbones],
        options=options,
        started=clock.started,
        seconds=clock.seconds,
    )
    return report


def _check_decode(decode: str, device: torch.device) -> None:
    if decode == "gpu" and device.type != "cuda":
        raise UsageError(
            f"decode: got gpu, which needs a CUDA device; this run computes on {device}"
        )


class _Stages:
    """Takes the time of the stages of a run, one after the other."""

    def __init__(self) -> None:
        self.started = datetime.now(timezone.utc)
        self.seconds: dict[str, float] = {}
        self._begun = time.perf_counter()

    def ended(self, stage: str) -> None:
        """Count the time since the stage before to this one."""
        now = time.perf_counter()
        self.seconds[stage] = now - self._begun
        self._begun = now


def _check_planned(models: Sequence[Model], place: str | None, options: Options) -> None:
    """See whether the stores may be written, as far as it is known before a model is loaded.

    Whether a store that is there is what is asked for can only be said after that.
    """
    typed = [model for model in models if isinstance(model, str)]
    names = planned_stores(typed, options)
    if names is not None and len(typed) == len(models):
        for folder in store_folders(place, names):
            check_output_folder(Path(folder), may_exist=True, check_lock=True)


def _write_profile(file: str, timer: Timer) -> None:
    try:
        Path(file).write_text(timer.chrome_trace(), "utf-8")
    except OSError as error:  # what was computed is worth more
        log.warning("cannot write the profile %s: %s", file, error.strerror)


def _nothing(progress: Progress) -> None:
    """Tell nobody."""


def _never() -> bool:
    return False


class _Run:
    """Computes what the stores of one run lack."""

    def __init__(
        self,
        sources: ImageList,
        models: Sequence[Model],
        specs: Sequence[EmbeddingSpec],
        options: Options,
        batch_size: int,
        suspects: Collection[bytes],
        timer: Timer,
    ) -> None:
        self._sources = sources
        self._models = models
        self._specs = specs
        self._options = options
        self._batch_size = batch_size
        self._suspects = suspects
        self._timer = timer
        self._computed = 0
        self._readers = 0

    @property
    def spent(self) -> Spent:
        """What the time went to."""
        device = self._specs[0].parts[0].backbone.device
        return Spent(
            self._computed,
            _workers(self._options),
            available_cores(),
            self._readers,
            device.type,
            self._options.decode,
            dict(self._timer.seconds),
        )

    def fill(
        self,
        stores: Sequence[Filling],
        progress: Callable[[Progress], None],
        stop: Callable[[], bool],
    ) -> None:
        """Compute what is left; stores that lack the same images share one pass over them."""
        passes: dict[str, list[Filling]] = {}
        for store in stores:
            if store.done < len(store.todo):
                passes.setdefault(store.listing, []).append(store)
        if not passes:
            return
        total = max(len(self._sources), sum(map(_left, passes.values())))

        def done() -> int:
            return total - sum(map(_left, passes.values()))

        def after_batch() -> None:
            progress(Progress(done(), total, max(store.failed for store in stores)))
            if stop() and done() < total:
                raise InterruptedRunError(done(), total)

        progress(Progress(done(), total, max(store.failed for store in stores)))
        for group in passes.values():
            self._fill_together(group, after_batch)

    def _fill_together(self, stores: Sequence[Filling], after_batch: Callable[[], None]) -> None:
        """Compute the images that all of some stores lack, shard by shard in order."""
        todo, options = stores[0].todo, self._options
        done = min(store.done for store in stores)
        whole = plan_batches(
            len(todo), shard_images=options.shard_images, batch_size=self._batch_size
        )
        batches = [batch for batch in whole if batch.stop > done]
        specs = [store.spec for store in stores]

        def images_of(batch: BatchPlan) -> list[ImageSource]:
            return [self._sources.full_path(i) for i in todo[batch.start : batch.stop]]

        mend = self._mender(specs)
        on_device = options.decode == "gpu"
        decoding = _workers(options) + MAX_ABANDONED
        slots = decoding + (MAX_GROUP_IMAGES if on_device else 0)
        with ExitStack() as stack:
            crash_log = stack.enter_context(CrashLog(stores[0].staging / IN_FLIGHT, slots))
            loader = _loader(
                map(images_of, batches),
                specs,
                options,
                self._batch_size,
                self._suspects,
                crash_log,
                self._timer,
                decode=options.decode,
            )
            stack.enter_context(loader)
            decoder = (
                NvjpegDecoder(
                    specs[0].parts[0].backbone.device,
                    pictures_of(specs),
                    max_pixels=options.max_pixels,
                    crash_log=crash_log,
                    first_slot=decoding,
                )
                if on_device
                else None
            )
            computed = embed(
                specs, loader, normalize=options.normalize, timer=self._timer, decoder=decoder
            )
            pairs = zip(batches, computed, strict=True)
            for number, part in itertools.groupby(pairs, key=lambda pair: pair[0].shard):
                with ExitStack() as shards:
                    with self._timer.spent("write"):
                        for store in stores:
                            shards.enter_context(store.shard(number))
                    for batch, embedded in part:
                        mended = mend(functools.partial(images_of, batch), embedded)
                        with self._timer.spent("write"):
                            for store, rows in zip(stores, mended.rows, strict=True):
                                store.append(batch.start, rows, mended.outcomes)
                        self._computed += len(mended.outcomes)
                        self._readers = max(self._readers, loader.readers)
                        after_batch()
                    with self._timer.spent("write"):
                        shards.close()

    def _mender(
        self, specs: Sequence[EmbeddingSpec]
    ) -> Callable[[Callable[[], Sequence[ImageSource]], Embedded], Embedded]:
        """What mends the rows of a batch, given its images; nothing where none can be wanting."""
        half = any(b.precision != "float32" for spec in specs for b in spec.backbones)
        if not half or not all(isinstance(model, str) for model in self._models):
            return lambda _, embedded: embedded
        options = replace(self._options, precision="float32")

        def load() -> list[EmbeddingSpec]:
            again = load_specs(self._models, options, recorded_sha256=weights_of(self._specs))
            return [again[self._specs.index(spec)] for spec in specs]

        mender = Mender(
            load,
            lambda specs, batches: _loader(batches, specs, options, 1),
            normalize=options.normalize,
        )
        return lambda images, embedded: mender.mend(images, embedded)


def _left(group: Sequence[Filling]) -> int:
    return max(len(store.todo) - store.done for store in group)


def _tuned(
    specs: Sequence[EmbeddingSpec],
    models: Sequence[Model],
    writers: Sequence[ClaimedFolder],
    sources: ImageList,
    options: Options,
    batch_size: int,
    suspects: Collection[bytes],
) -> list[EmbeddingSpec]:
    """The specs in the precision that is taken, compiled where that pays."""
    before = [
        existing_computation(writer, describe(spec, options, sources.root, batch_size))
        for writer, spec in zip(writers, specs, strict=True)
    ]
    left = max(len(sources) - (0 if one is None else one.images) for one in before)
    pictures = pictures_of(specs)

    def sample(count: int) -> list[torch.Tensor]:
        spread = np.unique(np.linspace(0, len(sources) - 1, count).astype(int))
        some = [sources.full_path(int(place)) for place in spread]
        slots = _workers(options) + MAX_ABANDONED
        with (
            CrashLog(writers[0].staging / IN_FLIGHT, slots) as crash_log,
            _loader([some], specs, options, len(some), suspects, crash_log) as loader,
        ):
            (batch,) = loader
            kept = [isinstance(outcome, ImageInfo) for outcome in batch.outcomes]
            return [picture[torch.tensor(kept)] for picture in batch.pictures]

    return tune(
        specs,
        [
            None if one is None else Recorded.of(one.computation, same_run=one.is_interrupted)
            for one in before
        ],
        # A backbone of the user's own is in the precision that it was given.
        choose=options.precision == "auto" and all(isinstance(model, str) for model in models),
        compile=options.compile,
        images=left,
        batch_size=batch_size,
        sample=sample,
        pictures_of=lambda backbone: [one.picture_key for one in pictures].index(
            backbone.preprocess.picture_key
        ),
    )


def _check_room(stores: Sequence[Filling]) -> None:
    """See whether there is room for what is to come, before hours are spent on it.

    Raises:
        StoreError: there is not, as far as the file system tells; quotas it does not.
    """
    needed: dict[int, int] = {}
    for store in stores:
        device = store.staging.stat().st_dev
        needed[device] = needed.get(device, 0) + store.bytes_to_come
    for store in stores:
        wanted, free = needed[store.staging.stat().st_dev], shutil.disk_usage(store.staging).free
        if wanted > free:
            raise StoreError(
                f"{store.staging.parent}: about {_size(wanted)} are needed and {_size(free)} are "
                "free; make room and repeat the command, or choose another --out"
            )


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _suspects(staging: Iterable[Path]) -> set[bytes]:
    """Images that are decoded apart, since a run died while it decoded them."""
    every: set[bytes] = set()
    for folder in staging:
        known, new = Suspects(folder).load()
        every.update(known)
        if new:
            log.warning(
                "the last run died while it decoded %s; decoded in a process of their own now",
                ", ".join(map(show, new)),
            )
    return every


def _check_any_row(stores: Sequence[Filling]) -> None:
    """See whether every store has a row; if not, the next run would come to the same end.

    Raises:
        SourceError: one has none.
    """
    for store in stores:
        if not store.rows:
            for each in stores:
                each.discard()
            told = "; ".join(f"{path}: {reason}" for path, reason in store.first_failures)
            which = f" of {store.spec.name}" if len(stores) > 1 else ""
            raise SourceError(
                f"none of the {store.failed} images gives an embedding{which} ({told})"
            )


def _batch_size(specs: Sequence[EmbeddingSpec], options: Options) -> int:
    # No larger than a shard, which ends a batch; not cut to the number of images, on which the
    # value of a row must not depend.
    device = specs[0].parts[0].backbone.device
    return min(options.batch_size or default_batch_size(device.type), options.shard_images)


def _loader(
    batches: Iterable[Sequence[ImageSource]],
    specs: Sequence[EmbeddingSpec],
    options: Options,
    batch_size: int,
    suspects: Collection[bytes] = (),
    crash_log: CrashLog | None = None,
    timer: Timer | None = None,
    *,
    decode: str | None = None,
) -> BatchLoader:
    """Decodes batches for some specs; all of it, unless ``decode`` leaves some to the device."""
    device = specs[0].parts[0].backbone.device
    with device_errors(device):
        return BatchLoader(
            batches,
            pictures_of(specs),
            LoaderOptions(
                batch_size=batch_size,
                workers=_workers(options),
                pin=device.type == "cuda",
                max_pixels=options.max_pixels,
                image_timeout_seconds=options.image_timeout,
                decode_mode=decode or ("exact" if options.decode == "gpu" else options.decode),
            ),
            suspects=suspects,
            crash_log=crash_log,
            timer=timer,
        )


def _workers(options: Options) -> int:
    return options.workers or available_cores()


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
        interpolation: Interpolation | None = _DEFAULT.interpolation,
        mean: tuple[float, float, float] | None = _DEFAULT.mean,
        std: tuple[float, float, float] | None = _DEFAULT.std,
        resize: Fit | None = _DEFAULT.resize,
        seed: int = _DEFAULT.seed,
        device: str = _DEFAULT.device,
        precision: Precision = _DEFAULT.precision,
        normalize: bool = _DEFAULT.normalize,
        batch_size: int | None = _DEFAULT.batch_size,
        workers: int | None = _DEFAULT.workers,
        fuse: Fuse = _DEFAULT.fuse,
        decode: Decode = _DEFAULT.decode,
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
            fuse=fuse,
            decode=decode,
        )
        specs = load_specs([model], self._options, fold_given=False)
        if len(specs) != 1:
            names = ", ".join(spec.name for spec in specs)
            raise UsageError(f"{len(specs)} embeddings of an image ({names}); use concat=True")
        self._specs = specs

    @property
    def backbones(self) -> tuple[Backbone, ...]:
        """That compute the embedding; one, but for ``A+B``."""
        return self._specs[0].backbones

    @property
    def dim(self) -> int:
        """Numbers in one embedding."""
        return self._specs[0].dim

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one embedding: ``(dim,)``, or the axes of a layer that is not pooled."""
        return self._specs[0].shape

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
        size = min(_batch_size(self._specs, self._options), len(sources))
        cuts = range(0, len(sources), size)
        rows = []
        batches = (sources[i : i + size] for i in cuts)
        with (
            compute_threads(),
            _loader(batches, self._specs, self._options, size) as loader,
        ):
            computed = embed(self._specs, loader, normalize=self._options.normalize)
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
