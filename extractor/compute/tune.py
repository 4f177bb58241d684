"""What makes a network faster and leaves its embeddings right: half precision, compilation.

Both are tried on some of the images before a run, and taken only where the embeddings stay near to
those in float32. A store that is there already says how its rows were computed, and that holds.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import torch

from extractor.compute.embed import Normalise, full_float32
from extractor.errors import ExtractorError
from extractor.models.backbone import Backbone
from extractor.models.embedding import EmbeddingPart, EmbeddingSpec
from extractor.models.naming import split_names
from extractor.network.fusion.fuse import without_packing
from extractor.network.precision import WEIGHT_DTYPES, faster_precisions, has_matrix_units
from extractor.text import first_line

__all__ = ["LEAST_COSINE", "Recorded", "compiled", "tune"]

log = logging.getLogger(__name__)

LEAST_COSINE = 0.999  # to float32, that half precision keeps for every image
# Asked of the images that are tried, since among all the others there will be worse ones.
SAMPLE_COSINE = 0.9995
COMPILED_COSINE = 0.9999  # of the same numbers summed in another order, in float32

# Fewer images are computed in float32 before half precision has paid for its trial.
LEAST_IMAGES = 512
# One image in so many is tried, within these bounds.
SAMPLE_SHARE, LEAST_SAMPLE, LARGEST_SAMPLE = 128, 32, 128
LEAST_GAIN = 0.05  # share of the time that has to be saved
SECOND_LOOKS = 2  # at what seems to save none, since other work on the machine slows down either

# What compiling costs, about, and the share of a network's time that it saves at least. On a CPU a
# folded network gains little, but for one with matrix units, which it feeds far better.
COMPILE_SECONDS = {"cpu": 20.0, "cuda": 40.0}
COMPILE_GAIN = {"cpu": 0.05, "cuda": 0.15}
COMPILE_GAIN_AMX = 0.5

FEW_IMAGES = 8  # tell well enough how long one takes

Pictures: TypeAlias = Sequence[torch.Tensor]
"""For each preprocessing of a run, ``(N, H, W, 3)`` uint8 of the same N images."""
Rows: TypeAlias = tuple[torch.Tensor, ...]


class Recorded(NamedTuple):
    """How the rows of a store are computed already, as its manifest says."""

    precisions: tuple[str, ...]
    least_cosine: float | None
    is_compiled: bool | None

    @classmethod
    def of(cls, computation: Mapping[str, Any], *, same_run: bool) -> Recorded:
        """What a manifest says of the computation.

        Args:
            same_run: it is that of a run that goes on, and not of one that came to its end.
        """
        names = tuple(split_names(str(computation.get("precision"))))
        is_compiled = bool(computation.get("compiled")) if same_run else None
        return cls(names, computation.get("least_cosine"), is_compiled)


def tune(
    specs: Sequence[EmbeddingSpec],
    recorded: Sequence[Recorded | None],
    *,
    choose: bool,
    compile: str,
    images: int,
    batch_size: int,
    sample: Callable[[int], Pictures],
    pictures_of: Callable[[Backbone], int],
) -> list[EmbeddingSpec]:
    """The same specs, computed in the precision and the way that a run takes.

    Args:
        specs: in float32 where the precision is to be chosen.
        recorded: what each one's store says of rows that are there; None for a new one.
        choose: the precision; else the specs are in it already.
        compile: ``auto``, ``on`` or ``off``.
        images: how many there are to compute, about.
        batch_size: images in one forward pass.
        sample: decodes some of the images; gives fewer where some cannot be decoded.
        pictures_of: the place of a backbone's pictures among those.
    """
    known = _known(specs, recorded)
    before = [one.is_compiled for one in recorded if one and one.is_compiled is not None]
    count = min(max(images // SAMPLE_SHARE, LEAST_SAMPLE), LARGEST_SAMPLE)
    decoded = functools.cache(lambda: sample(count))
    tuned: dict[int, Backbone] = {}
    for backbone in {id(one): one for spec in specs for one in spec.backbones}.values():
        pictures = functools.partial(lambda place: decoded()[place], pictures_of(backbone))
        trial = _Trial(backbone, pictures, batch_size)
        if choose and id(backbone) in known:
            trial.take(*known[id(backbone)])
        elif choose and images >= LEAST_IMAGES:
            trial.try_half()
        if compile == "on" or (compile == "auto" and any(before)):
            trial.try_compiled(anyway=True)
        elif compile == "auto" and not before and images >= LEAST_IMAGES:
            gain = images * trial.seconds_per_image() * _compile_gain(trial.best)
            if gain > COMPILE_SECONDS.get(backbone.device.type, math.inf):
                trial.try_compiled(anyway=False)
        tuned[id(backbone)] = trial.best
    return [
        replace(
            spec, parts=tuple(EmbeddingPart(tuned[id(p.backbone)], p.index) for p in spec.parts)
        )
        for spec in specs
    ]


def _known(
    specs: Sequence[EmbeddingSpec], recorded: Sequence[Recorded | None]
) -> dict[int, tuple[str, float | None]]:
    """The precision of each backbone that a store has rows of already, by the backbone's id."""
    known: dict[int, tuple[str, float | None]] = {}
    for spec, one in zip(specs, recorded, strict=True):
        if one is None:
            continue
        names = one.precisions * (1 if len(one.precisions) > 1 else len(spec.backbones))
        # What does not fit is the store of something else, which is refused with all that differs.
        for backbone, name in zip(spec.backbones, names, strict=False):
            if name in WEIGHT_DTYPES:
                known.setdefault(id(backbone), (name, one.least_cosine))
    return known


class _Trial:
    """Tries a backbone in other ways; ``best`` is the one that is taken."""

    def __init__(
        self, backbone: Backbone, pictures: Callable[[], torch.Tensor], batch_size: int
    ) -> None:
        self.best = backbone
        self._model = backbone.provenance.model
        self._pictures = pictures
        self._batch_size = batch_size
        self._exact = backbone  # what others are compared with
        self._seconds_per_image: float | None = None

    def take(self, precision: str, least_cosine: float | None) -> None:
        """Compute as it was done before."""
        if precision != self.best.precision:
            self.best = self.best.to(self.best.device, precision)
        self.best = self._exact = replace(self.best, least_cosine=least_cosine)

    def try_half(self) -> None:
        """Take the first precision that is faster than float32 and near enough to it."""
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
            except Exception as error:  # a network that cannot compute so, in its own words
                log.info("%s: no %s: %s", self._model, precision, first_line(error))
                continue
            cosine = _least_cosine(expected, rows)
            for _ in range(SECOND_LOOKS):
                if cosine < SAMPLE_COSINE or half_seconds < (1 - LEAST_GAIN) * seconds:
                    break
                seconds = min(seconds, self._embed(exact)[1])
                half_seconds = min(half_seconds, self._embed(half)[1])
            log.info(
                "%s: %s keeps a cosine of %.5f to float32 on %d images, in %.2f of its time",
                *(self._model, precision, cosine, len(expected[0]), half_seconds / seconds),
            )
            if cosine >= SAMPLE_COSINE and half_seconds < (1 - LEAST_GAIN) * seconds:
                self.best = replace(half, least_cosine=round(cosine, 6))
                self._seconds_per_image = half_seconds
                return

    def _embed(self, backbone: Backbone) -> tuple[Rows, float]:
        """Embeddings of the pictures, and the time that an image takes in the fastest batch."""
        pictures = self._pictures()
        size = max(min(self._batch_size, len(pictures) // 2), 1)
        batches, seconds = [], []
        for start in range(0, len(pictures), size):
            rows, taken = _timed(backbone, pictures[start : start + size])
            batches.append(rows)
            seconds.append(taken / len(rows[0]))
        return tuple(torch.cat(parts) for parts in zip(*batches, strict=True)), min(seconds)

    def seconds_per_image(self) -> float:
        """That the best one takes, about."""
        if self._seconds_per_image is None:
            height, width = self.best.preprocess.input_size
            grey = torch.full((FEW_IMAGES, height, width, 3), 127, dtype=torch.uint8)
            self._seconds_per_image = min(_timed(self.best, grey)[1] for _ in range(2)) / FEW_IMAGES
        return self._seconds_per_image

    def try_compiled(self, *, anyway: bool) -> None:
        """Compile the best one, if that can be done and gains something.

        Args:
            anyway: also where it gains nothing.
        """
        try:
            pictures = self._pictures()
            if not len(pictures):
                return
            # The shape that all batches will have: others would be compiled anew.
            batch = pictures.repeat(-(-self._batch_size // len(pictures)), 1, 1, 1)
            batch = batch[: self._batch_size]
            fast = compiled(self.best)
            rows, _ = _timed(fast, batch)
            cosine = _least_cosine(_timed(self._exact, batch)[0], rows)
            if not cosine >= self._wanted_cosine():
                raise ExtractorError(f"compiled, its embeddings are others (cosine {cosine:.4f})")
        except Exception as error:  # whatever a compiler has to say
            log.warning("%s is not compiled: %s", self._model, first_line(error))
            return
        if not anyway:
            before, after = (
                min(_timed(one, batch)[1] for _ in range(2)) for one in (self.best, fast)
            )
            if after > (1 - LEAST_GAIN) * before:
                log.info("%s is not compiled: that makes it no faster", self._model)
                return
        self.best = fast

    def _wanted_cosine(self) -> float:
        if self.best.precision != self._exact.precision:
            return SAMPLE_COSINE
        return COMPILED_COSINE if self.best.precision == "float32" else LEAST_COSINE


def _compile_gain(backbone: Backbone) -> float:
    if backbone.device.type == "cpu" and backbone.precision != "float32" and has_matrix_units():
        return COMPILE_GAIN_AMX
    return COMPILE_GAIN.get(backbone.device.type, 0.0)


def _timed(backbone: Backbone, pictures: torch.Tensor) -> tuple[Rows, float]:
    """``(N, numbers)`` in host memory for each output of a backbone, and the seconds for that."""
    begun = time.perf_counter()
    with torch.inference_mode(), full_float32():
        given = backbone.embed(Normalise(backbone)(pictures.to(backbone.device)))
        rows = tuple(one.flatten(1).cpu() for one in given)
    return rows, time.perf_counter() - begun


def _least_cosine(expected: Rows, given: Rows) -> float:
    """The least cosine of any image in any output; -1 where one is not finite."""
    least = 1.0
    for one, other in zip(expected, given, strict=True):
        cosines = torch.nn.functional.cosine_similarity(one.double(), other.double())
        cosines[(one == other).all(1)] = 1.0  # also where both are zero
        least = min(least, float(cosines.nan_to_num(-1.0).min()))
    return least


def compiled(backbone: Backbone) -> Backbone:
    """The backbone with its network compiled, which happens in the first pass of each shape.

    Raises:
        ExtractorError: of a backbone that takes layers out of its network.
    """
    if backbone.taps is not None:
        raise ExtractorError("layers are taken out of a network by hooks, which do not compile")
    for name in ("torch._dynamo", "torch._inductor", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    choices: dict[str, Any] = {"freezing": True} if backbone.device.type == "cpu" else {}
    network: Any = torch.compile(without_packing(backbone.module), dynamic=False, options=choices)
    return replace(backbone, module=network, is_compiled=True)
