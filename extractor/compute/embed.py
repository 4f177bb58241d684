"""Forward passes: copy pictures to the device, normalize, embed, copy the rows back."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from extractor.compute.inputs import pictures_of
from extractor.errors import UsageError
from extractor.images.types import Failure, ImageInfo
from extractor.loading.batch import Batch
from extractor.loading.buffers import MIN_BUFFERS
from extractor.loading.nvjpeg import NvjpegDecoder
from extractor.models.backbone import Backbone
from extractor.models.embedding import EmbeddingSpec, backbones_of
from extractor.system.devices import device_errors, empty_cache, is_out_of_memory
from extractor.system.float32 import full_float32
from extractor.system.timing import Timer

__all__ = ["Embedded", "Normalize", "PictureEmbedder", "embed"]

log = logging.getLogger(__name__)

NO_EPSILON = 1e-12  # nothing beside a variance of 1; torch 2.11 refuses 0

# Batches on a GPU at a time: while one computes, the pixels of the next are copied. More would only
# hold more buffers.
GPU_BATCHES = 2

# Batches that a CPU computes in a row while the decoding threads rest. Switching between the two
# costs some milliseconds, which small networks feel. A group takes at most GROUP_SECONDS.
GROUP_BATCHES = 4
GROUP_SECONDS = 0.25


class Embedded(NamedTuple):
    """Embeddings of one batch.

    Attributes:
        rows: For each spec ``(len(outcomes), *shape)`` float32, in the order of the images. Rows
            of failed images are undefined.
        outcomes: For each image its file and size, or why it has no embedding.
    """

    rows: tuple[npt.NDArray[np.float32], ...]
    outcomes: list[ImageInfo | Failure]


def embed(
    specs: Sequence[EmbeddingSpec],
    batches: Iterable[Batch],
    *,
    normalize: bool,
    timer: Timer | None = None,
    decoder: NvjpegDecoder | None = None,
) -> Generator[Embedded, None, None]:
    """Embed batches in order, and release each one once its pixels are no longer needed.

    Close it with :func:`contextlib.closing` where it may not come to its end. Until then it keeps
    memory of the device and a setting of the process, see
    :func:`~extractor.system.float32.full_float32`.

    Args:
        specs: Embeddings to compute, all on one device. Each backbone runs once per batch.
        batches: Batches with the pictures that :func:`~extractor.compute.inputs.pictures_of` lists.
        normalize: Scale every embedding to unit Euclidean length.
        timer: Sums the time of waiting for batches and of the model.
        decoder: Decodes the images that a batch left encoded.

    Yields:
        The embeddings of each batch.

    Raises:
        DeviceError: The device is full, busy or broken.
    """
    step = _Step(specs, normalize)
    with device_errors(step.device), full_float32():
        timer = timer or Timer()
        run = _embed_cuda if step.device.type == "cuda" else _embed_in_turn
        yield from run(step, _timed(batches, timer), timer, decoder)


def _timed(batches: Iterable[Batch], timer: Timer) -> Iterator[Batch]:
    """Yield the batches, and count the time of waiting for them."""
    iterator = iter(batches)
    while True:
        with timer.spent("idle"):
            batch = next(iterator, None)
        if batch is None:
            return
        yield batch


class Normalize:
    """Turns pictures into the input of a backbone."""

    def __init__(self, backbone: Backbone) -> None:
        # (x / 255 - mean) / std as one multiplication and one addition, for a whole row of pixels:
        # three numbers at a time would not fill a processor's vectors.
        width = backbone.preprocess.input_size[1]
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=backbone.device)
            for values in (backbone.preprocess.mean, backbone.preprocess.std)
        )
        self._scale = (1 / (255 * std)).repeat(width)
        self._shift = (-mean / std).repeat(width)
        self._rounded = backbone.device.type == "cpu" and backbone.dtype == torch.bfloat16

    def __call__(self, uint8: torch.Tensor) -> torch.Tensor:
        """Return ``(B, 3, H, W)`` normalized pixels, channels last, of ``(B, H, W, 3)`` uint8.

        The result is float32. On a CPU it is bfloat16, rounded once, if the backbone takes that.
        """
        rows = self._to_bfloat16(uint8) if self._rounded else self._to_float32(uint8)
        return rows.view(uint8.shape).permute(0, 3, 1, 2)

    def _to_float32(self, uint8: torch.Tensor) -> torch.Tensor:
        rows = uint8.flatten(2).float()
        return torch.addcmul(self._shift, rows, self._scale, out=rows)

    def _to_bfloat16(self, uint8: torch.Tensor) -> torch.Tensor:
        # Levels from 0 to 255 are exact in bfloat16. A batch normalization with mean 0 and variance
        # 1 computes in float32 and rounds once, in 0.6 of the time of rounding afterwards.
        rows = uint8.reshape(-1, len(self._scale)).bfloat16()
        mean, variance = torch.zeros_like(self._scale), torch.ones_like(self._scale)
        return torch.nn.functional.batch_norm(
            rows, mean, variance, self._scale, self._shift, eps=NO_EPSILON
        )


class _Step:
    """Computes one batch on a device."""

    def __init__(self, specs: Sequence[EmbeddingSpec], normalize: bool) -> None:
        self._specs = specs
        self._unit_length = normalize
        self._backbones = backbones_of(specs)
        devices = {backbone.device for backbone in self._backbones}
        if len(devices) != 1:
            raise UsageError(f"backbones on {', '.join(map(str, devices))}, expected one device")
        (self.device,) = devices
        self._running = self._backbones  # the eager ones while a batch is computed in parts
        self._images_at_a_time = 0  # 0 for a whole batch
        self._checked = 0  # number of images that are known to fit
        keys = [preprocess.picture_key for preprocess in pictures_of(specs)]
        self._picture = [
            keys.index(backbone.preprocess.picture_key) for backbone in self._backbones
        ]
        self._normalize = [Normalize(backbone) for backbone in self._backbones]

    def in_fitting_parts(
        self, pictures: Sequence[torch.Tensor], release: Callable[[], None]
    ) -> list[torch.Tensor]:
        """Compute a batch whole if the memory suffices, else in parts that fit.

        Args:
            pictures: ``(B, H, W, 3)`` uint8 on the device.
            release: Called once the pictures are no longer needed.

        Raises:
            DeviceError: A single image does not fit in the memory of the CPU.
        """
        self._check_memory(pictures)
        if not 0 < self._images_at_a_time < len(pictures[0]):
            pending = [release]
            try:
                return self(pictures, lambda: pending.pop()())
            except (RuntimeError, MemoryError) as error:
                if not (pending and is_out_of_memory(error) and len(pictures[0]) > 1):
                    raise
            self._halve(len(pictures[0]))
        rows = self.in_parts(pictures)
        release()
        return rows

    def _check_memory(self, pictures: Sequence[torch.Tensor]) -> None:
        """Choose the size of parts before a CPU runs out of memory, of which it cannot tell."""
        count = len(pictures[0])
        if self.device.type != "cpu" or self._images_at_a_time or count <= self._checked:
            return
        reserved = MIN_BUFFERS * sum(picture.nbytes for picture in pictures)
        fitting = min(
            backbone.images_at_a_time(count, reserved_bytes=reserved)
            for backbone in self._backbones
        )
        self._checked = count
        if fitting < count:
            self._compute_parts(fitting)
            log.warning(
                "the memory does not suffice for a batch of %d images; computing %d at a time",
                *(count, fitting),
            )

    def in_parts(self, pictures: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Compute a batch in parts that fit the memory of the device.

        Where memory runs out, parts of half the size are tried, and used from then on.

        Raises:
            torch.cuda.OutOfMemoryError: A single image does not fit.
            RuntimeError: The same on a CPU.
        """
        self._check_memory(pictures)
        while True:
            size = self._images_at_a_time or len(pictures[0])
            starts = range(0, len(pictures[0]), size)
            try:
                parts = [
                    self([picture[start : start + size] for picture in pictures], lambda: None)
                    for start in starts
                ]
            except (RuntimeError, MemoryError) as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
            else:
                return [torch.cat(rows) for rows in zip(*parts, strict=True)]
            # Outside of the handler, which would keep the tensors of the failed pass alive.
            self._halve(size)

    def _halve(self, size: int) -> None:
        """Compute at most half as many images at a time from now on."""
        empty_cache(self.device)
        self._compute_parts((size + 1) // 2)
        log.warning(
            "%s is out of memory with %d images at a time; continuing with %d",
            *(self.device, size, self._images_at_a_time),
        )

    def _compute_parts(self, size: int) -> None:
        """Compute so many images at a time from now on."""
        self._images_at_a_time = size
        # A compiled network would compile again for every size of parts.
        self._running = list(map(_eager, self._backbones))

    def __call__(
        self, pictures: Sequence[torch.Tensor], release: Callable[[], None]
    ) -> list[torch.Tensor]:
        """Return ``(B, *shape)`` float32 for each spec, on the device.

        Args:
            pictures: ``(B, H, W, 3)`` uint8 on the device.
            release: Called once the pictures are no longer needed.
        """
        outputs: dict[int, tuple[torch.Tensor, ...]] = {}
        for index, backbone in enumerate(self._backbones):
            pixels = self._normalize[index](pictures[self._picture[index]])
            if index == len(self._backbones) - 1:
                release()
            outputs[id(backbone)] = self._embed(index, pixels)
        return [self._rows(spec, outputs) for spec in self._specs]

    def _embed(self, index: int, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run a backbone. Where memory runs out, compute halves, unless :meth:`in_parts` does."""
        try:
            return self._running[index].embed(pixels)
        except (RuntimeError, MemoryError) as error:
            if len(pixels) == 1 or self.device.type == "cuda" or not is_out_of_memory(error):
                raise
        self._halve(len(pixels))
        halves = torch.split(pixels, self._images_at_a_time)
        parts = [self._embed(index, half) for half in halves]
        return tuple(torch.cat(rows) for rows in zip(*parts, strict=True))

    def _rows(
        self, spec: EmbeddingSpec, outputs: dict[int, tuple[torch.Tensor, ...]]
    ) -> torch.Tensor:
        parts = [outputs[id(part.backbone)][part.index] for part in spec.parts]
        if spec.unit_parts:
            parts = [torch.nn.functional.normalize(part) for part in parts]
        rows = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        return torch.nn.functional.normalize(rows) if self._unit_length else rows


def _eager(backbone: Backbone) -> Backbone:
    """Return the backbone with its network as it was before it was compiled."""
    network = getattr(backbone.module, "_orig_mod", None)
    if network is None:
        return backbone
    return replace(backbone, module=network, is_compiled=False)


class PictureEmbedder:
    """Embeds pictures that lie in host memory; for one thread at a time.

    Args:
        spec: Embedding to compute.
        normalize: Scale every embedding to unit Euclidean length.
        pad_to: Number of images in every forward pass. Shorter ones are padded with black
            pictures, as batches of a run are. None computes as many images as there are.
    """

    def __init__(self, spec: EmbeddingSpec, *, normalize: bool, pad_to: int | None = None) -> None:
        self._step = _Step([spec], normalize)
        self._pad_to = pad_to

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
        """Return ``(N, *shape)`` float32.

        Args:
            pictures: For each transform ``(N, H, W, 3)`` uint8 RGB, in the order of
                :func:`~extractor.compute.inputs.pictures_of`.

        Raises:
            DeviceError: The device is full, busy or broken.
        """
        count = len(pictures[0])
        size = self._pad_to or count
        with device_errors(self._step.device), full_float32():
            passes = [
                self._pass([_padded(rows[start : start + size], self._pad_to) for rows in pictures])
                for start in range(0, count, size)
            ]
        return np.concatenate(passes)[:count] if len(passes) > 1 else passes[0][:count]

    def _pass(self, pictures: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
        on_device = [torch.from_numpy(rows).to(self._step.device) for rows in pictures]
        rows: npt.NDArray[np.float32] = self._step.in_parts(on_device)[0].cpu().numpy()
        return rows


def _padded(rows: npt.NDArray[np.uint8], size: int | None) -> npt.NDArray[np.uint8]:
    """Return rows followed by black pictures up to a size."""
    if size is None or len(rows) == size:
        return rows
    black = np.zeros((size - len(rows), *rows.shape[1:]), np.uint8)
    return np.concatenate([rows, black])


def _embed_in_turn(
    step: _Step, batches: Iterable[Batch], timer: Timer, decoder: NvjpegDecoder | None
) -> Iterator[Embedded]:
    cores = torch.get_num_threads() if step.device.type == "cpu" else 0
    waiting = iter(batches)
    group_size = 1
    begun = time.perf_counter()
    while group := list(itertools.islice(waiting, group_size)):
        # A network waits for the slowest of its threads many times in a pass. A thread that shares
        # its core with a decoder would keep all others waiting.
        with group[0].alone_on(cores):
            computed = [_computed(step, batch, timer, decoder) for batch in group]
        seconds = (time.perf_counter() - begun) / len(group)  # waiting for the batches included
        if cores:
            group_size = min(max(int(GROUP_SECONDS / max(seconds, 1e-6)), 1), GROUP_BATCHES)
        yield from computed
        begun = time.perf_counter()


@torch.inference_mode()
def _computed(step: _Step, batch: Batch, timer: Timer, decoder: NvjpegDecoder | None) -> Embedded:
    with timer.spent("transfer"):
        pictures = [picture.to(step.device) for picture in batch.pictures]
        if decoder is not None:
            decoder.decode_batch(batch, pictures, step.in_parts)
    with timer.spent("model"):
        rows = [output.cpu() for output in step.in_fitting_parts(pictures, batch.release)]
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
    """Compute one batch on the GPU while the pixels of the next one are copied.

    All launches are asynchronous. The host waits only for decoded pixels, and for rows that are
    :data:`GPU_BATCHES` batches old.
    """
    copies: torch.cuda.Stream = torch.cuda.Stream(step.device)  # type: ignore[no-untyped-call]
    # A decoder computes on this stream, with weights that another one may not have written yet.
    copies.wait_stream(torch.cuda.current_stream(step.device))
    flights: deque[_Flight] = deque()
    try:
        for batch in batches:
            flights.append(_launch(step, batch, copies, decoder))
            if len(flights) == GPU_BATCHES:
                yield _land(flights.popleft(), timer)
        while flights:
            yield _land(flights.popleft(), timer)
    except BaseException:
        # A copy may still read from a buffer. Its error would only hide the first one.
        with contextlib.suppress(RuntimeError):
            copies.synchronize()
        raise


@torch.inference_mode()
def _launch(
    step: _Step, batch: Batch, copies: torch.cuda.Stream, decoder: NvjpegDecoder | None
) -> _Flight:
    begun, copied_in, computing, copied_out = (_event() for _ in range(4))
    with torch.cuda.device(step.device):
        compute = torch.cuda.current_stream()
        with torch.cuda.stream(copies):
            begun.record()
            pictures = [p.to(step.device, non_blocking=True) for p in batch.pictures]
            if decoder is not None:
                # Waits for this stream only; meanwhile the batch before computes on another.
                decoder.decode_batch(batch, pictures, step.in_parts)
            copied_in.record()
        compute.wait_event(copied_in)
        for picture in pictures:
            # Allocated on the copy stream and read on this one; keep it until both are done.
            picture.record_stream(compute)
        computing.record()
        host_rows = []
        pin = batch.pictures[0].is_pinned()  # unless no memory can be page-locked
        for rows in step.in_parts(pictures):
            host_rows.append(torch.empty(rows.shape, dtype=rows.dtype, pin_memory=pin))
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
    # Seconds as the device counts them. A trace shows them where this thread waits.
    for kind, first, last in (
        ("transfer", flight.begun, flight.copied_in),
        ("model", flight.computing, flight.copied_out),
    ):
        seconds = first.elapsed_time(last) / 1000
        timer.add(kind, begun, time.perf_counter() - begun, counted=seconds)
    return _collect(flight.batch, flight.rows)


def _collect(batch: Batch, rows: Sequence[torch.Tensor]) -> Embedded:
    outcomes = [outcome for outcome in batch.outcomes if outcome is not None]
    return Embedded(tuple(output[: len(outcomes)].numpy() for output in rows), outcomes)
