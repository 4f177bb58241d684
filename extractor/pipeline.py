"""Ties the parts together: images in, a store or an array out."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from extractor.backbones import Backbone, Model, Target, check_models, load_targets
from extractor.current import current_images
from extractor.decode import EncodedImage, Failure, ImageSource
from extractor.description import describe
from extractor.devices import available_cores, device_errors
from extractor.errors import DecodeError, InterruptedRunError, SourceError, UsageError
from extractor.filling import Filling, StoreReport
from extractor.inference import embed, pictures_of
from extractor.isolation import InFlight, Suspects
from extractor.loader import MAX_ABANDONED, BatchLoader
from extractor.options import (
    DEFAULT_MODEL,
    Options,
    default_batch_size,
    planned_stores,
    store_folders,
)
from extractor.sources import ImageList, Input, list_images, show
from extractor.store import FeatureStore
from extractor.store.format import IN_FLIGHT, MAX_SHARDS
from extractor.store.place import check_place

__all__ = [
    "BatchPlan",
    "Extractor",
    "Progress",
    "Report",
    "StoreReport",
    "extract",
    "plan_batches",
]

log = logging.getLogger(__name__)

_DEFAULT = Options()


@dataclass(frozen=True)
class Progress:
    """How far a run is, in images; ``failed`` of the ``done`` ones have no row."""

    done: int
    total: int
    failed: int


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
    def failures(self) -> list[dict[str, Any]]:
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
    check: str = _DEFAULT.check,
    keep_missing: bool = _DEFAULT.keep_missing,
    retry_failed: bool = _DEFAULT.retry_failed,
    max_pixels: int = _DEFAULT.max_pixels,
    image_timeout: float = _DEFAULT.image_timeout,
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
        check=check,
        keep_missing=keep_missing,
        retry_failed=retry_failed,
        max_pixels=max_pixels,
        image_timeout=image_timeout,
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
    current = functools.cache(lambda: current_images(sources, content=options.check == "content"))
    with ExitStack() as stack:
        stores = []
        for folder, target in zip(folders, targets, strict=True):
            description = describe(target, options, sources.root, batch_size)
            filling = Filling(folder, target, description, sources, current, options)
            stores.append(stack.enter_context(filling))
        to_do = max(len(store.todo) - store.done for store in stores)
        _fill(stores, sources, options, batch_size, progress, stop)
        _check_any_row(stores)
        reports = tuple(store.publish() for store in stores)
    first = targets[0].parts[0].backbone
    return Report(
        stores=reports,
        images=len(sources),
        resumed=len(sources) - to_do,
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
            check_place(Path(folder), occupied=True, locked=True)


def _fill(
    stores: Sequence[Filling],
    sources: ImageList,
    options: Options,
    batch_size: int,
    progress: Callable[[Progress], None] | None,
    stop: Callable[[], bool] | None,
) -> None:
    """Compute what is left; stores that lack the same images share one pass over them."""
    passes: dict[str, list[Filling]] = {}
    for store in stores:
        if store.done < len(store.todo):
            passes.setdefault(store.listing, []).append(store)
    if not passes:
        return
    left = sum(_left(group) for group in passes.values())
    total = max(len(sources), left)

    def tell() -> None:
        if progress is not None:
            left = sum(_left(group) for group in passes.values())
            progress(Progress(total - left, total, max(store.failed for store in stores)))

    def go_on() -> None:
        tell()
        left = sum(_left(group) for group in passes.values())
        if stop is not None and stop() and left:
            raise InterruptedRunError(total - left, total)

    tell()
    for group in passes.values():
        _fill_together(group, sources, options, batch_size, go_on)


def _left(group: Sequence[Filling]) -> int:
    return max(len(store.todo) - store.done for store in group)


def _fill_together(
    stores: Sequence[Filling],
    sources: ImageList,
    options: Options,
    batch_size: int,
    after_batch: Callable[[], None],
) -> None:
    """Compute the images that all of some stores lack, shard by shard in order."""
    todo = stores[0].todo
    done = min(store.done for store in stores)
    whole = plan_batches(len(todo), shard_images=options.shard_images, batch_size=batch_size)
    batches = [batch for batch in whole if batch.stop > done]
    targets = [store.target for store in stores]
    wanted = ([sources.full_path(i) for i in todo[b.start : b.stop]] for b in batches)
    suspects = _suspects(stores)
    in_flight = InFlight(stores[0].staging / IN_FLIGHT, _workers(options) + MAX_ABANDONED)
    with (
        in_flight,
        _loader(wanted, targets, options, batch_size, suspects, in_flight) as loader,
    ):
        computed = zip(batches, embed(targets, loader, normalize=options.normalize), strict=True)
        for number, part in itertools.groupby(computed, key=lambda pair: pair[0].shard):
            with ExitStack() as stack:
                for store in stores:
                    stack.enter_context(store.shard(number))
                for batch, embedded in part:
                    for store, rows in zip(stores, embedded.rows, strict=True):
                        store.append(batch.start, rows, embedded.outcomes)
                    after_batch()


def _suspects(stores: Sequence[Filling]) -> set[bytes]:
    """Images that are decoded apart, since a run died while it decoded them."""
    every: set[bytes] = set()
    for store in stores:
        known, new = Suspects(store.staging).load()
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
            which = f" of {store.target.name}" if len(stores) > 1 else ""
            raise SourceError(
                f"none of the {store.failed} images gives an embedding{which} ({told})"
            )


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
    suspects: Collection[bytes] = (),
    in_flight: InFlight | None = None,
) -> BatchLoader:
    device = targets[0].parts[0].backbone.device
    with device_errors(device):
        return BatchLoader(
            batches,
            pictures_of(targets),
            batch_size=batch_size,
            workers=_workers(options),
            pin=device.type == "cuda",
            max_pixels=options.max_pixels,
            image_timeout=options.image_timeout,
            suspects=suspects,
            in_flight=in_flight,
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
