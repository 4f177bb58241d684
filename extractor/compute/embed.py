"""Batches through the backbone: uint8 to the device, normalise, embed, bring the rows back."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from extractor.errors import UsageError
from extractor.images.types import Failure, ImageInfo
from extractor.loading.batch import Batch
from extractor.loading.nvjpeg import NvjpegDecoder
from extractor.models.backbone import Backbone
from extractor.models.embedding import EmbeddingSpec
from extractor.preprocess import Preprocess
from extractor.system.devices import device_errors
from extractor.system.timing import Timer

__all__ = ["Embedded", "Normalise", "embed", "full_float32", "pictures_of"]

log = logging.getLogger(__name__)

# Batches that a GPU may have been given before the first one's rows are waited for: while one
# computes, the next one's pixels move. More would only hold more buffers.
IN_FLIGHT = 2

# Batches that a CPU computes one after the other while the decoding threads rest: each change
# between the two costs some milliseconds, which small networks feel. Nobody waits longer for it.
TOGETHER = 4
TOGETHER_SECONDS = 0.25


class Embedded(NamedTuple):
    """One batch's embeddings.

    ``rows`` holds, for each spec, ``(len(outcomes), *shape)`` float32, in the order of the
    images; the row of an image whose outcome is a failure means nothing.
    """

    rows: tuple[npt.NDArray[np.float32], ...]
    outcomes: list[ImageInfo | Failure]


def pictures_of(specs: Sequence[EmbeddingSpec]) -> list[Preprocess]:
    """What must be made of each image for all specs, each picture once; order as in a batch."""
    every = (backbone.preprocess for spec in specs for backbone in spec.backbones)
    pictures: dict[object, Preprocess] = {}
    for preprocess in every:
        pictures.setdefault(preprocess.picture_key, preprocess)
    return list(pictures.values())


def embed(
    specs: Sequence[EmbeddingSpec],
    batches: Iterable[Batch],
    *,
    normalize: bool,
    timer: Timer | None = None,
    decoder: NvjpegDecoder | None = None,
) -> Iterator[Embedded]:
    """Embed batches in order, and release each as soon as its pixels are no longer needed.

    Args:
        specs: what to compute; all on one device, and each backbone once a batch.
        batches: with the pictures that :func:`pictures_of` lists.
        normalize: scale every embedding to unit Euclidean length.
        timer: sums what waiting for batches and the model take.
        decoder: draws the images of a batch that were left encoded.

    Raises:
        DeviceError: the device is full, busy or broken.
    """
    step = _Step(specs, normalize)
    with device_errors(step.device), full_float32():
        timer = timer or Timer()
        run = _embed_cuda if step.device.type == "cuda" else _embed_in_turn
        yield from run(step, _waited_for(batches, timer), timer, decoder)


def _waited_for(batches: Iterable[Batch], timer: Timer) -> Iterator[Batch]:
    """The same batches, with the time that they keep others waiting counted."""
    iterator = iter(batches)
    while True:
        with timer.spent("idle"):
            batch = next(iterator, None)
        if batch is None:
            return
        yield batch


class Normalise:
    """From a picture to a backbone's input."""

    def __init__(self, backbone: Backbone) -> None:
        # (x / 255 - mean) / std, folded into one multiplication and one addition; for a whole row
        # of pixels, since three numbers at a time make no use of a processor's vectors.
        width = backbone.preprocess.input_size[1]
        mean = torch.tensor(backbone.preprocess.mean, device=backbone.device)
        std = torch.tensor(backbone.preprocess.std, device=backbone.device)
        self._scale = (1 / (255 * std)).repeat(width)
        self._shift = (-mean / std).repeat(width)
        self._rounded = backbone.device.type == "cpu" and backbone.dtype == torch.bfloat16

    def __call__(self, uint8: torch.Tensor) -> torch.Tensor:
        """``(B, H, W, 3)`` uint8 to ``(B, 3, H, W)`` normalised, channels last.

        In float32; on a CPU in bfloat16 where the backbone takes that, each number the nearest one.
        """
        rows = self._to_bfloat16(uint8) if self._rounded else self._to_float32(uint8)
        return rows.view(uint8.shape).permute(0, 3, 1, 2)

    def _to_float32(self, uint8: torch.Tensor) -> torch.Tensor:
        rows = uint8.flatten(2).float()
        return torch.addcmul(self._shift, rows, self._scale, out=rows)

    def _to_bfloat16(self, uint8: torch.Tensor) -> torch.Tensor:
        # The levels themselves are exact in bfloat16, and a batch normalisation, here with nothing
        # to normalise, computes in float32 and rounds once: 0.6 of the time of rounding afterwards.
        rows = uint8.reshape(-1, len(self._scale)).bfloat16()
        none, one = torch.zeros_like(self._scale), torch.ones_like(self._scale)
        least = 1e-12  # which is nothing beside one, and torch 2.11 takes no zero
        return torch.nn.functional.batch_norm(rows, none, one, self._scale, self._shift, eps=least)


class _Step:
    """The computation of one batch on the device of its pictures."""

    def __init__(self, specs: Sequence[EmbeddingSpec], normalize: bool) -> None:
        self._specs = specs
        self._unit_length = normalize
        self._backbones = list({id(one): one for spec in specs for one in spec.backbones}.values())
        devices = {backbone.device for backbone in self._backbones}
        if len(devices) != 1:
            raise UsageError(f"backbones on {', '.join(map(str, devices))}, expected one device")
        (self.device,) = devices
        self._part = 0  # images at a time where the device takes no whole batch
        places = {one.picture_key: place for place, one in enumerate(pictures_of(specs))}
        self._picture = [places[backbone.preprocess.picture_key] for backbone in self._backbones]
        self._normalise = [Normalise(backbone) for backbone in self._backbones]

    def in_parts(self, pictures: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """As calling it, but in parts as large as the device's memory takes.

        Where it runs out, parts of half the size are tried, and kept from then on.

        Raises:
            torch.cuda.OutOfMemoryError: a single image does not fit.
        """
        while True:
            size = self._part or len(pictures[0])
            starts = range(0, len(pictures[0]), size)
            try:
                parts = [
                    self([one[start : start + size] for one in pictures], lambda: None)
                    for start in starts
                ]
            except torch.cuda.OutOfMemoryError:
                if size == 1:
                    raise
                self._part = (size + 1) // 2
            else:
                return [torch.cat(rows) for rows in zip(*parts, strict=True)]
            # Outside of the handler, which would keep the tensors of the failed pass alive.
            torch.cuda.empty_cache()
            log.warning(
                "%s is out of memory with %d images at a time; going on with %d",
                *(self.device, size, self._part),
            )

    def __call__(
        self, pictures: Sequence[torch.Tensor], taken: Callable[[], None]
    ) -> list[torch.Tensor]:
        """``(B, *shape)`` float32 for each spec, on the device.

        Args:
            pictures: ``(B, H, W, 3)`` uint8 on the device.
            taken: is called once they are no longer needed.
        """
        outputs: dict[int, tuple[torch.Tensor, ...]] = {}
        for place, backbone in enumerate(self._backbones):
            pixels = self._normalise[place](pictures[self._picture[place]])
            if place == len(self._backbones) - 1:
                taken()
            outputs[id(backbone)] = backbone.embed(pixels)
        return [self._rows(spec, outputs) for spec in self._specs]

    def _rows(
        self, spec: EmbeddingSpec, outputs: dict[int, tuple[torch.Tensor, ...]]
    ) -> torch.Tensor:
        parts = [outputs[id(part.backbone)][part.index] for part in spec.parts]
        if spec.unit_parts:
            parts = [torch.nn.functional.normalize(part) for part in parts]
        rows = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        return torch.nn.functional.normalize(rows) if self._unit_length else rows


def _embed_in_turn(
    step: _Step, batches: Iterable[Batch], timer: Timer, decoder: NvjpegDecoder | None
) -> Iterator[Embedded]:
    cores = torch.get_num_threads() if step.device.type == "cpu" else 0
    waiting = iter(batches)
    together = 1
    begun = time.perf_counter()
    while group := list(itertools.islice(waiting, together)):
        # A network waits for the last of its threads many times in a pass: one that shares its
        # core with a decoder keeps all others waiting.
        with group[0].alone_on(cores):
            computed = [_computed(step, batch, timer, decoder) for batch in group]
        seconds = (time.perf_counter() - begun) / len(group)  # also of waiting for them
        together = min(max(int(TOGETHER_SECONDS / max(seconds, 1e-6)), 1), TOGETHER) if cores else 1
        yield from computed
        begun = time.perf_counter()


@torch.inference_mode()
def _computed(step: _Step, batch: Batch, timer: Timer, decoder: NvjpegDecoder | None) -> Embedded:
    with timer.spent("transfer"):
        pictures = [picture.to(step.device) for picture in batch.pictures]
        if decoder is not None:
            decoder.decode_batch(batch, pictures)
    with timer.spent("model"):
        rows = [one.cpu() for one in step(pictures, batch.release)]
    return _collect(batch, rows)


class _Flight(NamedTuple):
    batch: Batch
    pictures: list[torch.Tensor]
    rows: list[torch.Tensor]
    begun: torch.cuda.Event
    copied_in: torch.cuda.Event
    computing: torch.cuda.Event
    copied_out: torch.cuda.Event


def _embed_cuda(
    step: _Step, batches: Iterable[Batch], timer: Timer, decoder: NvjpegDecoder | None
) -> Iterator[Embedded]:
    """Keep the GPU fed: it computes one batch while the next one's pixels are on their way.

    All launches are asynchronous, so the host only waits for rows that are :data:`IN_FLIGHT`
    batches old, and for decoded pixels.
    """
    copies: torch.cuda.Stream = torch.cuda.Stream(step.device)  # type: ignore[no-untyped-call]
    flights: deque[_Flight] = deque()
    try:
        for batch in batches:
            flights.append(_launch(step, batch, copies, decoder))
            if len(flights) == IN_FLIGHT:
                yield _land(flights.popleft(), timer)
        while flights:
            yield _land(flights.popleft(), timer)
    finally:
        copies.synchronize()  # no buffer may go while a copy still reads it


@torch.inference_mode()
def _launch(
    step: _Step, batch: Batch, copies: torch.cuda.Stream, decoder: NvjpegDecoder | None
) -> _Flight:
    begun, copied_in, computing, copied_out = (_event() for _ in range(4))
    with torch.cuda.device(step.device):
        compute = torch.cuda.current_stream()
        with torch.cuda.stream(copies):
            begun.record()
            pictures = [one.to(step.device, non_blocking=True) for one in batch.pictures]
            if decoder is not None:
                # Waits for this stream alone: the batch before is computed meanwhile on its own.
                decoder.decode_batch(batch, pictures)
            copied_in.record()
        compute.wait_event(copied_in)
        for picture in pictures:
            # Allocated on the copy stream, read on this one: not to be reused before both are done.
            picture.record_stream(compute)
        computing.record()
        host_rows = []
        for rows in step.in_parts(pictures):
            host_rows.append(torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True))
            host_rows[-1].copy_(rows, non_blocking=True)
        copied_out.record()
    return _Flight(batch, pictures, host_rows, begun, copied_in, computing, copied_out)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _land(flight: _Flight, timer: Timer) -> Embedded:
    begun = time.perf_counter()
    flight.copied_in.synchronize()
    flight.batch.release()
    flight.copied_out.synchronize()
    # As the device counts them; in a trace they stand where this thread waits for them.
    for kind, first, last in (
        ("transfer", flight.begun, flight.copied_in),
        ("model", flight.computing, flight.copied_out),
    ):
        seconds = first.elapsed_time(last) / 1000
        timer.add(kind, begun, time.perf_counter() - begun, counted=seconds)
    return _collect(flight.batch, flight.rows)


def _collect(batch: Batch, rows: Sequence[torch.Tensor]) -> Embedded:
    outcomes = [outcome for outcome in batch.outcomes if outcome is not None]
    return Embedded(tuple(one[: len(outcomes)].numpy() for one in rows), outcomes)


class _FullFloat32:
    """The setting is of the whole process: the last thread to leave brings it back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._allowed = False

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._allowed = torch.backends.cudnn.allow_tf32
                torch.backends.cudnn.allow_tf32 = False
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                torch.backends.cudnn.allow_tf32 = self._allowed


_full_float32 = _FullFloat32()


def full_float32() -> AbstractContextManager[None]:
    """Let float32 mean float32: convolutions on recent GPUs would round their inputs to TF32."""
    return _full_float32
