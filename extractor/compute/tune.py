"""Choose the precision of a run, and whether to compile the network.

Both are tried on a sample of the images, and taken only if the embeddings stay close to those in
float32. Rows that a store holds already decide instead: its manifest names their precision.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import nn

from extractor.compute.embed import Normalize
from extractor.compute.inputs import device_of, pictures_of
from extractor.errors import ExtractorError
from extractor.models.backbone import Backbone
from extractor.models.embedding import EmbeddingSpec, backbones_of
from extractor.models.naming import split_names
from extractor.network.fusion.fuse import without_packing
from extractor.network.precision import WEIGHT_DTYPES, faster_precisions, has_matrix_units
from extractor.system.cpu import available_cores
from extractor.system.devices import (
    computes,
    device_errors,
    empty_cache,
    is_broken_device,
    is_out_of_memory,
)
from extractor.system.float32 import full_float32
from extractor.text import first_line

__all__ = ["LEAST_COSINE", "Recorded", "TuneSettings", "compiled", "tune"]

log = logging.getLogger(__name__)

LEAST_COSINE = 0.999  # to float32, promised for every image in half precision
# Required of the sampled images: among all the others there will be worse ones.
SAMPLE_COSINE = 0.9995
COMPILED_COSINE = 0.9999  # of float32 rows, whose sums a compiler reorders

# Fewer images are done in float32 before half precision has paid for its trial.
MIN_IMAGES = 512
# One image in SAMPLE_SHARE is sampled, within these bounds.
SAMPLE_SHARE, MIN_SAMPLE, MAX_SAMPLE = 128, 32, 128
MIN_GAIN = 0.05  # share of the time that must be saved
RETRIES = 2  # of a measurement without gain: other work on the machine can slow down either side

# Cost of compiling, and the share of a network's time that it saves. On a CPU a folded network
# gains little, but a lot with matrix units, which compiled code feeds better.
COMPILE_SECONDS = {"cpu": 20.0, "cuda": 40.0}
COMPILE_GAIN = {"cpu": 0.05}
COMPILE_GAIN_AMX = 0.5
# The same on a GPU, of networks without convolutions and of those without linear layers. It fuses
# what lies between convolutions. In timm's tables of inference resnet50 gets 1.90 times as fast (it
# saves 0.47; 53 convolutions), convnext_base 1.31 (0.24; 40 of its 112 layers are convolutions),
# vit_base_patch16_224 1.13 (0.12; 1 of 49) and vit_large_patch16_224 1.10 (0.09; 1 of 97).
COMPILE_GAIN_CUDA = (0.1, 0.47)

COMPILERS = "TORCHINDUCTOR_COMPILE_THREADS"  # variable with which a user chooses their number

TIMED_IMAGES = 8  # enough to time a network on a CPU

# Batches before a GPU runs at its speed and its libraries have chosen their kernels, and batches
# that are timed together: a run launches the next one before the last is done, too.
WARM_UPS, TIMED_BATCHES = 2, 3

Pictures: TypeAlias = Sequence[torch.Tensor]
"""``(N, H, W, 3)`` uint8 of the same N images, one tensor per preprocessing of a run."""
Rows: TypeAlias = tuple[torch.Tensor, ...]

T = TypeVar("T")


class Recorded(NamedTuple):
    """How the rows that a store holds already were computed.

    Attributes:
        precisions: Precision of each backbone, or one of all.
        least_cosine: Least cosine to float32 on the sampled images; None if none was sampled.
        is_compiled: Whether the interrupted run compiled its networks; None for a finished store.
    """

    precisions: tuple[str, ...]
    least_cosine: float | None
    is_compiled: bool | None

    @classmethod
    def of(cls, computation: Mapping[str, Any], *, same_run: bool) -> Recorded:
        """Return what a manifest records of the computation.

        Args:
            computation: Entry of the manifest.
            same_run: Whether it comes from an interrupted run that resumes now.
        """
        names = tuple(split_names(str(computation.get("precision"))))
        is_compiled = bool(computation.get("compiled")) if same_run else None
        return cls(names, computation.get("least_cosine"), is_compiled)


@dataclass(frozen=True)
class TuneSettings:
    """What a run asks of :func:`tune`.

    Attributes:
        choose_precision: Whether to choose the precision; else the specs have it already.
        compile: ``auto``, ``on`` or ``off``.
        images: Approximate number of images to compute.
        batch_size: Number of images in one forward pass.
    """

    choose_precision: bool
    compile: str
    images: int
    batch_size: int

    @property
    def sample_size(self) -> int:
        """Number of images to try."""
        return min(max(self.images // SAMPLE_SHARE, MIN_SAMPLE), MAX_SAMPLE)

    @property
    def pays_off(self) -> bool:
        """Whether the images are enough to repay a trial."""
        return self.images >= MIN_IMAGES


def tune(
    specs: Sequence[EmbeddingSpec],
    recorded: Sequence[Recorded | None],
    settings: TuneSettings,
    sample: Callable[[int], Pictures],
) -> list[EmbeddingSpec]:
    """Return the specs with their backbones in the chosen precision, compiled where that pays.

    On a GPU the run's own batches are timed: a small network may be as fast in float32 in a smaller
    batch, which only waits for its launches.

    Args:
        specs: Embeddings of a run, in float32 if the precision is to be chosen.
        recorded: For each spec how the rows of its store were computed; None for a new store.
        settings: What to choose, and for how many images.
        sample: Decodes so many of the images, or fewer where some are undecodable. Returns their
            pictures in the order of :func:`~extractor.compute.inputs.pictures_of`.

    Raises:
        DeviceError: The device is full, busy or broken.
    """
    known = _known_precisions(specs, recorded)
    keys = [preprocess.picture_key for preprocess in pictures_of(specs)]
    decoded = functools.cache(lambda: sample(settings.sample_size))
    resumed = [r.is_compiled for r in recorded if r and r.is_compiled is not None]
    tuned: dict[int, Backbone] = {}
    with device_errors(device_of(specs)):
        for backbone in backbones_of(specs):
            index = keys.index(backbone.preprocess.picture_key)
            pictures = functools.partial(lambda index: decoded()[index], index)
            trial = _Trial(backbone, pictures, settings.batch_size)
            if settings.choose_precision and id(backbone) in known:
                trial.take(*known[id(backbone)])
            elif settings.choose_precision and settings.pays_off:
                trial.try_half()
            _choose_compilation(trial, settings, resumed)
            tuned[id(backbone)] = trial.best
    return [spec.with_backbones(tuned) for spec in specs]


def _choose_compilation(trial: _Trial, settings: TuneSettings, resumed: Sequence[bool]) -> None:
    if settings.compile == "on" or (settings.compile == "auto" and any(resumed)):
        trial.try_compiled(even_without_gain=True)
    elif settings.compile == "auto" and not resumed and settings.pays_off:
        gain = settings.images * trial.seconds_per_image() * _compile_gain(trial.best)
        if gain > COMPILE_SECONDS.get(trial.best.device.type, math.inf):
            trial.try_compiled(even_without_gain=False)


def _known_precisions(
    specs: Sequence[EmbeddingSpec], recorded: Sequence[Recorded | None]
) -> dict[int, tuple[str, float | None]]:
    """Return precision and least cosine of backbones whose store has rows, by the backbone's id."""
    known: dict[int, tuple[str, float | None]] = {}
    for spec, record in zip(specs, recorded, strict=True):
        if record is None:
            continue
        names = record.precisions * (1 if len(record.precisions) > 1 else len(spec.backbones))
        # A store whose backbones do not match is refused later, with all that differs.
        for backbone, name in zip(spec.backbones, names, strict=False):
            if name in WEIGHT_DTYPES:
                known.setdefault(id(backbone), (name, record.least_cosine))
    return known


class _Trial:
    """Tries variants of a backbone; ``best`` is the one to use."""

    def __init__(
        self, backbone: Backbone, pictures: Callable[[], torch.Tensor], batch_size: int
    ) -> None:
        self.best = backbone
        self._model = backbone.provenance.model
        self._pictures = pictures
        self._batch_size = batch_size
        self._exact = backbone  # the reference of all comparisons
        self._seconds_per_image: float | None = None

    def take(self, precision: str, least_cosine: float | None) -> None:
        """Use the precision of rows that exist already."""
        if precision != self.best.precision:
            self.best = self.best.to(self.best.device, precision)
        self.best = self._exact = replace(self.best, least_cosine=least_cosine)

    def try_half(self) -> None:
        """Use the first precision that is faster than float32 and close enough to it."""
        exact = self._exact
        faster = faster_precisions(exact.device) if exact.precision == "float32" else ()
        if not faster or not len(self._pictures()):
            return
        expected, seconds = self._embed(exact)
        self._seconds_per_image = seconds
        for precision in faster:
            try:
                half = replace(exact, module=copy.deepcopy(exact.module))
                half = half.to(exact.device, precision)
                rows, half_seconds = self._embed(half)
            except Exception as error:  # whatever a network raises that cannot compute in it
                if is_broken_device(error) and not computes(exact.device):
                    raise
                log.info("%s: no %s: %s", self._model, precision, first_line(error))
                continue
            cosine = _smallest_cosine(expected, rows)
            for _ in range(RETRIES):
                if cosine < SAMPLE_COSINE or half_seconds < (1 - MIN_GAIN) * seconds:
                    break
                seconds = min(seconds, self._embed(exact)[1])
                half_seconds = min(half_seconds, self._embed(half)[1])
            log.info(
                "%s: %s keeps a cosine of %.5f to float32 on %d images in %.2f of its time",
                *(self._model, precision, cosine, len(expected[0]), half_seconds / seconds),
            )
            if cosine >= SAMPLE_COSINE and half_seconds < (1 - MIN_GAIN) * seconds:
                self.best = replace(half, least_cosine=round(cosine, 6))
                self._seconds_per_image = half_seconds
                return

    def _embed(self, backbone: Backbone) -> tuple[Rows, float]:
        """Return the embeddings of the sample, and seconds per image."""
        if _is_gpu(backbone):
            return self._in_fitting_batches(functools.partial(self._embed_on_gpu, backbone))
        pictures = self._pictures()
        wanted = max(min(self._batch_size, len(pictures) // 2), 1)
        size = backbone.images_at_a_time(wanted)
        batches, seconds = [], []
        for start in range(0, len(pictures), size):
            rows, taken = _timed(backbone, pictures[start : start + size])
            batches.append(rows)
            seconds.append(taken / len(rows[0]))
        return tuple(torch.cat(parts) for parts in zip(*batches, strict=True)), min(seconds)

    def _embed_on_gpu(self, backbone: Backbone, size: int) -> tuple[Rows, float]:
        """Return the embeddings of the sample, and seconds per image in batches of this size."""
        pictures = self._pictures()
        batches = torch.split(_whole_batches(pictures, size).to(backbone.device), size)
        rows = [_timed(backbone, batch)[0] for batch in batches]
        joined = tuple(torch.cat(parts)[: len(pictures)] for parts in zip(*rows, strict=True))
        return joined, _batch_seconds(backbone, batches[0]) / size

    def _in_fitting_batches(self, compute: Callable[[int], T]) -> T:
        """Return what a function of the batch size returns; halve it until the memory suffices."""
        size = self._batch_size
        while True:
            try:
                return compute(size)
            except RuntimeError as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
            # Outside of the handler, which keeps the tensors alive.
            empty_cache(self.best.device)
            size = (size + 1) // 2

    def seconds_per_image(self) -> float:
        """Return the approximate seconds that the best variant takes per image."""
        if self._seconds_per_image is None and _is_gpu(self.best):
            self._seconds_per_image = self._in_fitting_batches(self._seconds_on_gpu)
        if self._seconds_per_image is None:
            height, width = self.best.preprocess.input_size
            count = self.best.images_at_a_time(TIMED_IMAGES)
            gray = torch.full((count, height, width, 3), 127, dtype=torch.uint8)
            self._seconds_per_image = min(_timed(self.best, gray)[1] for _ in range(2)) / count
        return self._seconds_per_image

    def _seconds_on_gpu(self, size: int) -> float:
        """Return the seconds per image in batches of this size."""
        shape = (size, *self.best.preprocess.input_size, 3)
        gray = torch.full(shape, 127, dtype=torch.uint8, device=self.best.device)
        return _batch_seconds(self.best, gray) / size

    def try_compiled(self, *, even_without_gain: bool) -> None:
        """Compile the best variant if that works, keeps the embeddings and is faster.

        Args:
            even_without_gain: Compile although it may be no faster.
        """
        try:
            pictures = self._pictures()
            if not len(pictures):
                return
            fitting = self.best.images_at_a_time(self._batch_size)
            if fitting < self._batch_size:
                raise ExtractorError("the memory does not suffice for whole batches")
            # The shape of all batches: another shape would be compiled again.
            batch = _whole_batches(pictures, self._batch_size)[: self._batch_size]
            fast = compiled(self.best)
            rows, _ = _timed(fast, batch)
            cosine = _smallest_cosine(_timed(self._exact, batch)[0], rows)
            if not cosine >= self._required_cosine():
                raise ExtractorError(f"its embeddings would change (cosine {cosine:.4f})")
        except Exception as error:  # whatever a compiler raises
            if is_broken_device(error) and not computes(self.best.device):
                raise
            log.warning("%s is not compiled: %s", self._model, first_line(error))
            return
        if not even_without_gain:
            before, after = (_least_seconds(backbone, batch) for backbone in (self.best, fast))
            if after > (1 - MIN_GAIN) * before:
                log.info("%s is not compiled: it would be no faster", self._model)
                return
        self.best = fast

    def _required_cosine(self) -> float:
        if self.best.precision != self._exact.precision:
            return SAMPLE_COSINE
        return COMPILED_COSINE if self.best.precision == "float32" else LEAST_COSINE


def _compile_gain(backbone: Backbone) -> float:
    """Return the share of a network's time that compiling is expected to save."""
    if _is_gpu(backbone):
        none, only = COMPILE_GAIN_CUDA
        return none + (only - none) * _share_of_convolutions(backbone.module)
    if backbone.device.type == "cpu" and backbone.precision != "float32" and has_matrix_units():
        return COMPILE_GAIN_AMX
    return COMPILE_GAIN.get(backbone.device.type, 0.0)


def _share_of_convolutions(network: nn.Module) -> float:
    """Return the share of convolutions among the convolutions and linear layers of a network."""
    modules = list(network.modules())
    convolutions = sum(isinstance(module, nn.Conv2d) for module in modules)
    linear = sum(isinstance(module, nn.Linear) for module in modules)
    return convolutions / max(convolutions + linear, 1)


def _is_gpu(backbone: Backbone) -> bool:
    return backbone.device.type == "cuda"


def _whole_batches(pictures: torch.Tensor, size: int) -> torch.Tensor:
    """Return pictures, repeated until they fill batches of a size."""
    count = -(-len(pictures) // size) * size
    return pictures.repeat(-(-count // len(pictures)), 1, 1, 1)[:count]


def _least_seconds(backbone: Backbone, batch: torch.Tensor) -> float:
    """Return the least seconds that a backbone takes for a batch."""
    if _is_gpu(backbone):
        return _batch_seconds(backbone, batch.to(backbone.device))
    return min(_timed(backbone, batch)[1] for _ in range(2))


@torch.inference_mode()
def _batch_seconds(backbone: Backbone, batch: torch.Tensor) -> float:
    """Return the seconds that a GPU takes for a batch in its memory, as its clock counts them."""
    normalize = Normalize(backbone)
    with full_float32(), torch.cuda.device(backbone.device):
        for _ in range(WARM_UPS):
            backbone.embed(normalize(batch))
        begun, ended = _event(), _event()
        begun.record()
        for _ in range(TIMED_BATCHES):
            backbone.embed(normalize(batch))
        ended.record()
        ended.synchronize()
        milliseconds: float = begun.elapsed_time(ended)
    return milliseconds / 1000 / TIMED_BATCHES


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _timed(backbone: Backbone, pictures: torch.Tensor) -> tuple[Rows, float]:
    """Return ``(N, dim)`` in host memory for each output of a backbone, and the seconds it took."""
    begun = time.perf_counter()
    with torch.inference_mode(), full_float32():
        outputs = backbone.embed(Normalize(backbone)(pictures.to(backbone.device)))
        rows = tuple(output.flatten(1).cpu() for output in outputs)
    return rows, time.perf_counter() - begun


def _smallest_cosine(expected: Rows, actual: Rows) -> float:
    """Return the smallest cosine of any image in any output; -1 if a row is not finite."""
    smallest = 1.0
    for x, y in zip(expected, actual, strict=True):
        cosines = torch.nn.functional.cosine_similarity(x.double(), y.double())
        cosines[(x == y).all(1)] = 1.0  # also where both are zero
        smallest = min(smallest, float(cosines.nan_to_num(-1.0).min()))
    return smallest


def compiled(backbone: Backbone) -> Backbone:
    """Return the backbone with a network that compiles in the first pass of each input shape.

    Raises:
        ExtractorError: The backbone reads layers inside its network, with hooks.
    """
    if backbone.taps is not None:
        raise ExtractorError("its layers are read with hooks, which do not compile")
    for name in ("torch._dynamo", "torch._inductor", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    _bound_compilers()
    choices: dict[str, Any] = {"freezing": True} if backbone.device.type == "cpu" else {}
    network: Any = torch.compile(without_packing(backbone.module), dynamic=False, options=choices)
    return replace(backbone, module=network, is_compiled=True)


def _bound_compilers() -> None:
    """Let torch start no more compilers than cores are granted; it counts those of the machine."""
    from torch._inductor import config

    if COMPILERS not in os.environ and config.compile_threads is not None:
        config.compile_threads = min(config.compile_threads, available_cores())
