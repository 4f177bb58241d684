"""Ties the parts together: images in, a store or an array out."""

from __future__ import annotations

import itertools
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from extractor.backbones import Backbone, load_backbone
from extractor.decode import EncodedImage, Failure, ImageInfo, ImageSource
from extractor.devices import available_cores, device_errors
from extractor.errors import DecodeError, SourceError, UsageError
from extractor.inference import Embedded, embed
from extractor.loader import BatchLoader
from extractor.options import (
    DEFAULT_MODEL,
    MAX_SHARDS,
    Options,
    default_batch_size,
    default_out,
)
from extractor.sources import ImageList, Input, list_images, show
from extractor.store import Description, FeatureStore, ImageRecord, StoreWriter
from extractor.version import __version__

__all__ = ["BatchPlan", "Extractor", "Progress", "Report", "extract", "plan_batches"]

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
class Report:
    """What one run did.

    Attributes:
        out: folder of the store.
        images, rows, failed: images asked for, those with a row and those without.
        passed_over: files in the folders that are no images.
        dim: numbers in one embedding.
        backbone: the model and its weights in a few words.
        device, precision: that computed.
        seconds: of the whole run.
        load_seconds: of those, until the backbone was ready.
        first_failures: path and reason of the first few failed images.
    """

    out: Path
    images: int
    rows: int
    failed: int
    passed_over: int
    dim: int
    backbone: str
    device: str
    precision: str
    seconds: float
    load_seconds: float
    first_failures: tuple[tuple[str, str], ...]

    @property
    def images_per_second(self) -> float:
        """Images, failed ones included, a second since the backbone was ready."""
        return self.images / max(self.seconds - self.load_seconds, 1e-9)

    @property
    def failure_rate(self) -> float:
        """Share of the images that have no row, from 0 to 1."""
        return self.failed / self.images

    @property
    def store(self) -> FeatureStore:
        """The store, opened."""
        return FeatureStore.open(self.out)

    @property
    def failures(self) -> list[dict[str, str]]:
        """Every failed image with its reason, read from the store."""
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
    model: str = DEFAULT_MODEL,
    out: str | os.PathLike[str] | None = None,
    *,
    weights: str | os.PathLike[str] = _DEFAULT.weights,
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
    """Embed folders of images into a store of ``.npy`` files; this is what the command runs.

    An image that cannot be decoded has no row and stands in the store's ``failures.jsonl``.

    >>> extract("images", "resnet50", "features/resnet50").rows  # doctest: +SKIP
    334

    Args:
        images: a folder, an image, several of them, or a list from :mod:`extractor.sources`.
        model: as for :func:`load_backbone`.
        out: folder of the store; None is ``features/<model>``.
        progress: is called after every batch, from this thread.

    The other arguments are the fields of :class:`extractor.options.Options`.

    Raises:
        ExtractorError: nothing usable was added; one of its children says what went wrong.
    """
    started = time.perf_counter()
    options = Options(
        weights=os.fspath(weights),
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
    if not model or (out is not None and not os.fspath(out)):
        raise UsageError("got an empty name, expected a model and a folder for the store")
    folder = Path(default_out(model) if out is None else out)
    with StoreWriter(folder, overwrite=overwrite) as writer:
        sources = images if isinstance(images, ImageList) else list_images(images)
        if len(sources) > MAX_SHARDS * shard_images:
            raise UsageError(
                f"{len(sources)} images in shards of {shard_images} are more than {MAX_SHARDS} "
                "shards; use a larger --shard-images"
            )
        backbone = load_backbone(
            model, weights=weights, seed=seed, device=device, precision=precision
        )
        loaded = time.perf_counter()
        description = _describe(backbone, options, sources.root)
        tally = _Tally(len(sources), progress)
        _fill(writer, description, backbone, options, sources, tally)
        if tally.failed == tally.done:
            told = "; ".join(f"{path}: {reason}" for path, reason in tally.first_failures)
            raise SourceError(f"none of the {tally.done} images gives an embedding ({told})")
        manifest = writer.publish(description, len(sources))
    return Report(
        out=folder,
        images=manifest.images,
        rows=manifest.rows,
        failed=manifest.failed,
        passed_over=sources.passed_over,
        dim=backbone.dim,
        backbone=str(backbone.provenance),
        device=str(backbone.device),
        precision=_name(backbone),
        seconds=time.perf_counter() - started,
        load_seconds=loaded - started,
        first_failures=tuple(tally.first_failures),
    )


class _Tally:
    """Counts images as they are done, and remembers the first few that failed."""

    def __init__(self, total: int, progress: Callable[[Progress], None] | None) -> None:
        self.done = 0
        self.failed = 0
        self.first_failures: list[tuple[str, str]] = []
        self._total = total
        self._progress = progress

    def fail(self, path: bytes, failure: Failure) -> None:
        self.failed += 1
        if len(self.first_failures) < FAILURES_SHOWN:
            self.first_failures.append((show(path), failure.message))

    def finish_batch(self, images: int) -> None:
        self.done += images
        if self._progress is not None:
            self._progress(Progress(self.done, self._total, self.failed))


def _fill(
    writer: StoreWriter,
    description: Description,
    backbone: Backbone,
    options: Options,
    sources: ImageList,
    tally: _Tally,
) -> None:
    """Compute every shard in order and write it; images without a row go to the failures."""
    batch_size = _batch_size(backbone, options)
    plan = list(
        plan_batches(len(sources), shard_images=options.shard_images, batch_size=batch_size)
    )
    wanted = ([sources.full_path(i) for i in range(b.start, b.stop)] for b in plan)
    with _loader(wanted, backbone, options, batch_size) as loader:
        computed = zip(plan, embed(backbone, loader, normalize=options.normalize), strict=True)
        for number, batches in itertools.groupby(computed, key=lambda pair: pair[0].shard):
            with writer.shard(number, description) as shard:
                images = 0
                for batch, embedded in batches:
                    paths = sources.paths[batch.start : batch.stop]
                    kept, records = _sort_out(embedded, paths, writer, tally)
                    shard.append(kept, records)
                    images += len(paths)
                    tally.finish_batch(len(paths))
                shard.finish(images)


def _sort_out(
    embedded: Embedded, paths: Sequence[bytes], writer: StoreWriter, tally: _Tally
) -> tuple[npt.NDArray[np.float32], list[ImageRecord]]:
    """Part the rows to keep, with their records, from the failures, which are noted."""
    kept, records = [], []
    finite = np.asarray(np.isfinite(embedded.rows).all(axis=1))
    for i, (path, outcome) in enumerate(zip(paths, embedded.outcomes, strict=True)):
        if isinstance(outcome, ImageInfo) and not finite[i]:
            outcome = Failure("not-finite", "the embedding holds NaN or infinity")
        if isinstance(outcome, Failure):
            writer.fail(path, outcome.reason, outcome.message)
            tally.fail(path, outcome)
        else:
            kept.append(i)
            records.append(ImageRecord(path, *_stat(outcome)))
    return embedded.rows[kept], records


def _stat(info: ImageInfo) -> tuple[int, int, int, int]:
    return info.size, info.mtime_ns, info.width, info.height


def _batch_size(backbone: Backbone, options: Options) -> int:
    # No larger than a shard, which ends a batch; not cut to the number of images, on which the
    # value of a row must not depend.
    wanted = options.batch_size or default_batch_size(backbone.device.type)
    return min(wanted, options.shard_images)


def _loader(
    batches: Iterable[Sequence[ImageSource]],
    backbone: Backbone,
    options: Options,
    batch_size: int,
) -> BatchLoader:
    with device_errors(backbone.device):
        return BatchLoader(
            batches,
            backbone.preprocess,
            batch_size=batch_size,
            workers=options.workers or available_cores(),
            pin=backbone.device.type == "cuda",
        )


def _describe(backbone: Backbone, options: Options, root: bytes) -> Description:
    versions = {"extractor": __version__, **{name: metadata.version(name) for name in _LIBRARIES}}
    provenance = asdict(backbone.provenance)
    definition = provenance.pop("definition")
    return Description(
        backbone={**provenance, "heads": list(backbone.heads)},
        embedding={
            "definition": definition,
            "dim": backbone.dim,
            "dtype": options.dtype,
            "normalized": options.normalize,
        },
        preprocess=backbone.preprocess.as_dict(),
        computation={
            "precision": _name(backbone),
            "device": backbone.device.type,
            "batch_size": _batch_size(backbone, options),
        },
        root=os.fsdecode(root),
        shard_images=options.shard_images,
        software={"python": platform.python_version(), **versions},
    )


_LIBRARIES = ("torch", "torchvision", "timm", "pillow", "numpy", "pyarrow")


def _name(backbone: Backbone) -> str:
    return str(backbone.dtype).removeprefix("torch.")


# ---------------------------------------------------------------------------------------------
# In memory

AnyImage: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[np.uint8]"


class Extractor:
    """Embeds images in memory, with the same pixels and the same model as :func:`extract`.

    >>> extractor = Extractor("torchvision:squeezenet1_0", weights="random", device="cpu")
    >>> extractor([np.zeros((300, 200, 3), np.uint8)]).shape
    (1, 512)

    Args:
        model, weights, seed, device, precision: as for :func:`load_backbone`.
        normalize, batch_size, workers: as for :func:`extract`.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        weights: str | os.PathLike[str] = _DEFAULT.weights,
        seed: int = _DEFAULT.seed,
        device: str = _DEFAULT.device,
        precision: str = _DEFAULT.precision,
        normalize: bool = _DEFAULT.normalize,
        batch_size: int | None = _DEFAULT.batch_size,
        workers: int | None = _DEFAULT.workers,
    ) -> None:
        self._process = os.getpid()
        self._options = Options(normalize=normalize, batch_size=batch_size, workers=workers)
        self.backbone = load_backbone(
            model, weights=weights, seed=seed, device=device, precision=precision
        )

    @property
    def dim(self) -> int:
        """Numbers in one embedding."""
        return self.backbone.dim

    def __call__(self, images: Iterable[AnyImage]) -> npt.NDArray[np.float32]:
        """Embed images, in the order in which they come.

        Args:
            images: paths, encoded images as bytes, PIL images, or uint8 RGB arrays ``(H, W, 3)``
                (``(H, W)`` is grey, a fourth channel is dropped); they may be mixed.

        Returns:
            ``(N, dim)`` float32.

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
            return np.empty((0, self.dim), np.float32)
        # One image at the prompt should not pay for a full batch of padding.
        size = min(_batch_size(self.backbone, self._options), len(sources))
        cuts = range(0, len(sources), size)
        rows = []
        with _loader(
            (sources[i : i + size] for i in cuts), self.backbone, self._options, size
        ) as loader:
            computed = embed(self.backbone, loader, normalize=self._options.normalize)
            for start, embedded in zip(cuts, computed, strict=True):
                for i, outcome in enumerate(embedded.outcomes, start):
                    if isinstance(outcome, Failure):
                        raise DecodeError(outcome.reason, f"image {i}: {outcome.message}")
                rows.append(embedded.rows)
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
