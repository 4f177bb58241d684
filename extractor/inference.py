"""Batches through the backbone: uint8 to the device, normalise, embed, bring the rows back."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from extractor.backbones import Backbone
from extractor.decode import Failure, ImageInfo
from extractor.devices import device_errors
from extractor.loader import Batch

__all__ = ["Embedded", "embed"]

# Batches that a GPU may have been given before the first one's rows are waited for: while one
# computes, the next one's pixels move. More would only hold more buffers.
IN_FLIGHT = 2


class Embedded(NamedTuple):
    """One batch's embeddings.

    ``rows`` is ``(len(outcomes), dim)`` float32, in the order of the images; the row of an image
    whose outcome is a failure means nothing.
    """

    rows: npt.NDArray[np.float32]
    outcomes: list[ImageInfo | Failure]


def embed(backbone: Backbone, batches: Iterable[Batch], *, normalize: bool) -> Iterator[Embedded]:
    """Embed batches in order, and release each as soon as its pixels are no longer needed.

    Args:
        normalize: scale every embedding to unit Euclidean length.

    Raises:
        DeviceError: the device is full, busy or broken.
    """
    with device_errors(backbone.device), _full_float32():
        run = _embed_cuda if backbone.device.type == "cuda" else _embed_in_turn
        yield from run(_Step(backbone, normalize), batches)


class _Step:
    """The computation of one batch on the device of its pixels."""

    def __init__(self, backbone: Backbone, normalize: bool) -> None:
        self.backbone = backbone
        self.device = backbone.device
        self._unit_length = normalize
        # (x / 255 - mean) / std, folded into one multiplication and one addition.
        mean = torch.tensor(backbone.preprocess.mean, device=self.device)
        std = torch.tensor(backbone.preprocess.std, device=self.device)
        self._scale = (1 / (255 * std)).view(1, 3, 1, 1)
        self._shift = (-mean / std).view(1, 3, 1, 1)

    def pixels(self, uint8: torch.Tensor) -> torch.Tensor:
        """``(B, H, W, 3)`` uint8 to ``(B, 3, H, W)`` normalised float32, channels last."""
        return uint8.permute(0, 3, 1, 2).float().mul_(self._scale).add_(self._shift)

    def rows(self, pixels: torch.Tensor) -> torch.Tensor:
        """``(B, dim)`` float32 embeddings of normalised pixels."""
        rows = self.backbone(pixels)
        return torch.nn.functional.normalize(rows) if self._unit_length else rows


def _embed_in_turn(step: _Step, batches: Iterable[Batch]) -> Iterator[Embedded]:
    for batch in batches:
        with torch.inference_mode():
            pixels = step.pixels(batch.pixels.to(step.device))
            batch.release()  # decoding goes on in this buffer while the model computes
            rows = step.rows(pixels)
        yield _collect(batch, rows.cpu())


class _Flight(NamedTuple):
    batch: Batch
    uint8: torch.Tensor
    rows: torch.Tensor
    copied_in: torch.cuda.Event
    copied_out: torch.cuda.Event


def _embed_cuda(step: _Step, batches: Iterable[Batch]) -> Iterator[Embedded]:
    """Keep the GPU fed: it computes one batch while the next one's pixels are on their way.

    All launches are asynchronous, so the host only waits for rows that are :data:`IN_FLIGHT`
    batches old, and for decoded pixels.
    """
    copies: torch.cuda.Stream = torch.cuda.Stream(step.device)  # type: ignore[no-untyped-call]
    flights: deque[_Flight] = deque()
    try:
        for batch in batches:
            flights.append(_launch(step, batch, copies))
            if len(flights) == IN_FLIGHT:
                yield _land(flights.popleft())
        while flights:
            yield _land(flights.popleft())
    finally:
        copies.synchronize()  # no buffer may go while a copy still reads it


@torch.inference_mode()
def _launch(step: _Step, batch: Batch, copies: torch.cuda.Stream) -> _Flight:
    copied_in, copied_out = _event(), _event()
    with torch.cuda.device(step.device):
        compute = torch.cuda.current_stream()
        with torch.cuda.stream(copies):
            uint8 = batch.pixels.to(step.device, non_blocking=True)
            copied_in.record()
        compute.wait_event(copied_in)
        # Allocated on the copy stream, read on this one: not to be reused before both are done.
        uint8.record_stream(compute)
        rows = step.rows(step.pixels(uint8))
        host_rows = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        host_rows.copy_(rows, non_blocking=True)
        copied_out.record()
    return _Flight(batch, uint8, host_rows, copied_in, copied_out)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _land(flight: _Flight) -> Embedded:
    flight.copied_in.synchronize()
    flight.batch.release()
    flight.copied_out.synchronize()
    return _collect(flight.batch, flight.rows)


def _collect(batch: Batch, rows: torch.Tensor) -> Embedded:
    outcomes = [outcome for outcome in batch.outcomes if outcome is not None]
    return Embedded(rows[: len(outcomes)].numpy(), outcomes)


@contextmanager
def _full_float32() -> Iterator[None]:
    """Let float32 mean float32: convolutions on recent GPUs would round their inputs to TF32."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
