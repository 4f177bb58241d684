"""JPEGs decoded by the GPU that computes, with nvJPEG, and drawn there.

The decoding threads read the files and look at their headers; what is a plain JPEG stays encoded,
crosses to the device as it is, and is decoded, resized and turned there, while they decode all
others. What the device cannot decode is decoded by the CPU after all.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import numpy as np
import numpy.typing as npt
import torch

from extractor.errors import DecodeError
from extractor.images.budget import PixelBudget
from extractor.images.decode import decode_into
from extractor.images.orientation import flipped_axes
from extractor.images.render import resize_and_crop_box
from extractor.images.types import EncodedJpeg, Failure, StoredLayout
from extractor.loading.crash_log import InFlight
from extractor.loading.loader import Batch
from extractor.preprocess import Preprocess
from extractor.text import first_line

__all__ = ["IMAGES_TOGETHER", "DeviceDecoder", "draw_all"]

log = logging.getLogger(__name__)

# What is decoded together at most; a pixel takes 3 bytes, and 12 while it is resized.
PIXELS_TOGETHER = 2**26
IMAGES_TOGETHER = 256

# The first images are decoded by the CPU, too. Both have the same coefficients; how they round, and
# how they enlarge the colours, is up to each decoder.
COMPARED = 8
MOST_APART = 1.0  # of 255 levels, on the mean of a picture


class DeviceDecoder:
    """Draws what the decoding threads left to the device into the rows of a batch.

    The first images are compared with what the CPU makes of them. Where they differ by more than a
    level, or cannot be decoded at all, the CPU decodes everything from then on.

    Args:
        preprocesses: of the pictures of each batch.
        max_pixels: of an image that the CPU has to decode after all.
        in_flight: where the paths stand of what is being decoded, from slot ``first_slot`` on.
        decode: gets encoded images, gives ``(3, H, W)`` uint8 of each on the device.
    """

    def __init__(
        self,
        device: torch.device,
        preprocesses: Sequence[Preprocess],
        *,
        max_pixels: int,
        in_flight: InFlight | None = None,
        first_slot: int = 0,
        decode: Callable[[list[torch.Tensor]], list[torch.Tensor]] | None = None,
    ) -> None:
        self._device = device
        self._preprocesses = tuple(preprocesses)
        self._max_pixels = max_pixels
        self._in_flight = in_flight
        self._first_slot = first_slot
        self._decode = decode or self._nvjpeg
        self._to_compare = COMPARED
        self.is_trusted = True

    def fill(self, batch: Batch, pictures: Sequence[torch.Tensor]) -> None:
        """Draw the encoded images of a batch; one that nothing can decode becomes a failure.

        Args:
            pictures: those of the batch on the device, ``(B, H, W, 3)`` uint8, written in place.
                On a GPU the current stream must be that on which they were made.
        """
        left = dict(sorted(batch.encoded.items()))
        for part in list(_together(left)):
            if self.is_trusted:
                for position in self._fill({place: left[place] for place in part}, pictures):
                    del left[position]
        for position, image in left.items():
            outcome = self._draw_on_host(image)
            if isinstance(outcome, Failure):
                batch.outcomes[position] = outcome
                continue
            for picture, row in zip(pictures, outcome, strict=True):
                picture[position] = torch.from_numpy(row)
        if left and not self.is_trusted:
            batch.decode_on_host()

    def _fill(
        self, images: Mapping[int, EncodedJpeg], pictures: Sequence[torch.Tensor]
    ) -> set[int]:
        """Which images were drawn: of those that the device decoded, all, or none at all."""
        decoded = self._decoded(images)
        drawn: set[int] = set()
        alike: dict[StoredLayout, list[int]] = {}
        for position in decoded:
            alike.setdefault(images[position].layout, []).append(position)
        for stored, positions in alike.items():
            try:
                group = torch.stack([decoded.pop(position) for position in positions])
                for preprocess, picture in zip(self._preprocesses, pictures, strict=True):
                    rows = draw_all(group, preprocess, stored)
                    picture[torch.tensor(positions, device=picture.device)] = rows
            except RuntimeError as error:  # no memory, or more made smaller than its filter takes
                log.debug("%d JPEGs are drawn by the CPU: %s", len(positions), first_line(error))
            else:
                drawn.update(positions)
        if self._to_compare and not self._is_right(images, drawn, pictures):
            self.is_trusted = False
            return set()
        return drawn

    def _decoded(self, images: Mapping[int, EncodedJpeg]) -> dict[int, torch.Tensor]:
        """``(3, H, W)`` uint8 of each image that the device can decode."""
        encoded = {
            # A copy, since torch wants what it may write to.
            position: torch.from_numpy(np.frombuffer(image.file.content, np.uint8).copy())
            for position, image in images.items()
        }
        with self._noted(images.values()):
            try:
                found = dict(zip(encoded, self._decode(list(encoded.values())), strict=True))
            except RuntimeError as error:  # it does not say of which image
                log.debug("%d JPEGs one by one: %s", len(encoded), first_line(error))
                found = {}
                for position, one in encoded.items():
                    with suppress(RuntimeError):
                        (found[position],) = self._decode([one])
        shapes = {place: (3, one.layout.height, one.layout.width) for place, one in images.items()}
        return {place: image for place, image in found.items() if image.shape == shapes[place]}

    @contextmanager
    def _noted(self, images: Collection[EncodedJpeg]) -> Iterator[None]:
        """Have it known which images were at hand, should the decoder end this process."""
        if self._in_flight is None:
            yield
            return
        for slot, image in enumerate(images, self._first_slot):
            self._in_flight.note(slot, os.fsencode(image.file.path))
        try:
            yield
        finally:
            for slot in range(self._first_slot, self._first_slot + len(images)):
                self._in_flight.note(slot, b"")

    def _nvjpeg(self, encoded: list[torch.Tensor]) -> list[torch.Tensor]:
        from torchvision.io import ImageReadMode, decode_jpeg

        # The engine writes without waiting for what is queued on this stream, and may be given
        # memory that something queued still reads (pytorch/vision pull request 9606).
        torch.cuda.current_stream(self._device).synchronize()
        images: list[torch.Tensor] = decode_jpeg(encoded, ImageReadMode.RGB, self._device)
        return images

    def _is_right(
        self,
        images: Mapping[int, EncodedJpeg],
        drawn: Collection[int],
        pictures: Sequence[torch.Tensor],
    ) -> bool:
        """Compare the first few images with what the CPU makes of them."""
        refused = 0
        for position, image in itertools.islice(images.items(), self._to_compare):
            expected = self._draw_on_host(image)
            if isinstance(expected, Failure):
                continue
            self._to_compare -= 1
            if position not in drawn:
                refused += 1
                continue
            for picture, row in zip(pictures, expected, strict=True):
                apart = np.abs(picture[position].cpu().numpy().astype(np.int16) - row).mean()
                if apart > MOST_APART:
                    log.warning(
                        "%s: %s decodes it to other pixels (mean difference %.2f levels); all "
                        "images are decoded by the CPU",
                        *(os.fsdecode(image.file.path), self._device, apart),
                    )
                    return False
        if refused and not drawn:
            log.warning("%s decodes no JPEG; all images are decoded by the CPU", self._device)
            return False
        return True

    def _draw_on_host(self, image: EncodedJpeg) -> list[npt.NDArray[np.uint8]] | Failure:
        rows = [np.empty((*one.input_size, 3), np.uint8) for one in self._preprocesses]
        try:
            with self._noted([image]):
                budget = PixelBudget(self._max_pixels)
                decode_into(image.file, self._preprocesses, rows, budget, "exact")
        except DecodeError as error:
            return Failure(error.reason, str(error), error.size, error.mtime_ns)
        return rows


def _together(images: Mapping[int, EncodedJpeg]) -> Iterator[list[int]]:
    """Images that are decoded together, so that they fit in the device's memory."""
    part: list[int] = []
    pixels = 0
    for position, image in images.items():
        more = image.layout.width * image.layout.height
        if part and (pixels + more > PIXELS_TOGETHER or len(part) == IMAGES_TOGETHER):
            yield part
            part, pixels = [], 0
        part.append(position)
        pixels += more
    if part:
        yield part


def draw_all(images: torch.Tensor, preprocess: Preprocess, stored: StoredLayout) -> torch.Tensor:
    """Draw the picture of one model, of several images that are stored alike.

    Args:
        images: ``(N, 3, H, W)`` uint8, turned as they are stored.

    Returns:
        ``(N, height, width, 3)`` uint8 of the model's input.
    """
    geometry = preprocess.geometry(*stored.upright)
    (across, down), (x0, y0, x1, y1) = resize_and_crop_box(geometry, stored.orientation)
    shares = stored.width / across, stored.height / down
    filter_ = getattr(torch.ops.aten, f"_upsample_{preprocess.interpolation}2d_aa")
    resized = filter_(images.float(), (down, across), False, 1 / shares[1], 1 / shares[0])
    seen = resized[:, :, y0:y1, x0:x1].round_().clamp_(0, 255).to(torch.uint8)
    rows = _upright(seen.permute(0, 2, 3, 1), stored.orientation)
    left, top = geometry.offset
    width, height = geometry.size
    if (height, width) == preprocess.input_size:
        return rows
    fill = torch.tensor(preprocess.fill, dtype=torch.uint8, device=images.device)
    whole = fill.expand(len(images), *preprocess.input_size, 3).clone()
    whole[:, top : top + height, left : left + width] = rows
    return whole


def _upright(rows: torch.Tensor, orientation: int) -> torch.Tensor:
    """``(N, H, W, 3)`` pictures turned as their orientation says."""
    if orientation >= 5:
        rows = rows.transpose(1, 2)
    axes = [axis for axis, is_flipped in enumerate(flipped_axes(orientation), 1) if is_flipped]
    return rows.flip(axes) if axes else rows
