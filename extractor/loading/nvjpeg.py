"""JPEGs decoded on the GPU with nvJPEG, and rendered there.

Everything about GPU decoding is behind :class:`NvjpegDecoder`. The decoding threads leave plain
JPEGs encoded. Their bytes go to the GPU, which decodes, resizes and turns them, while the threads
decode all other images. What the GPU cannot decode is decoded by the CPU after all.
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
from extractor.loading.batch import Batch
from extractor.loading.crash_log import CrashLog
from extractor.preprocess import Preprocess
from extractor.text import first_line

__all__ = ["MAX_GROUP_IMAGES", "NvjpegDecoder", "render_group"]

log = logging.getLogger(__name__)

# Limits of one call of the decoder. A pixel takes 3 bytes, and 12 during the resize.
MAX_GROUP_PIXELS = 2**26
MAX_GROUP_IMAGES = 256

# The CPU decodes the first images too. Both decoders get the same coefficients, but each rounds and
# upsamples the color channels in its own way.
COMPARED_IMAGES = 8
MAX_MEAN_DIFFERENCE = 1.0  # of 255 levels, over one picture

FLAT_PIXELS = 8  # edge of a block


class NvjpegDecoder:
    """Renders the images that the decoding threads left encoded, on the GPU.

    The first images are compared with the result of the CPU. If they differ by more than a level,
    or cannot be decoded at all, the CPU decodes everything from then on.

    Args:
        device: GPU that decodes.
        preprocesses: Transforms for the pictures of each batch.
        max_pixels: Largest image that the CPU may have to decode after all.
        crash_log: Notes the images that are being decoded.
        first_slot: First slot of ``crash_log`` to use.
        decode: Turns encoded images into ``(3, H, W)`` uint8 on the device. For tests.

    Attributes:
        is_trusted: Whether the GPU still decodes.
    """

    def __init__(
        self,
        device: torch.device,
        preprocesses: Sequence[Preprocess],
        *,
        max_pixels: int,
        crash_log: CrashLog | None = None,
        first_slot: int = 0,
        decode: Callable[[list[torch.Tensor]], list[torch.Tensor]] | None = None,
    ) -> None:
        self._device = device
        self._preprocesses = tuple(preprocesses)
        self._max_pixels = max_pixels
        self._crash_log = crash_log
        self._first_slot = first_slot
        self._decode = decode or self._nvjpeg
        self._left_to_compare = COMPARED_IMAGES
        self.is_trusted = True

    def decode_batch(self, batch: Batch, pictures: Sequence[torch.Tensor]) -> None:
        """Render the encoded images of a batch. An undecodable image becomes a failure.

        Args:
            batch: Batch whose images were left encoded.
            pictures: Pictures of the batch on the device, ``(B, H, W, 3)`` uint8, written in place.
                On a GPU, the current stream must be the one on which they were made.
        """
        left = dict(sorted(batch.encoded.items()))
        for group in list(_groups(left)):
            if self.is_trusted:
                for index in self._render_images({i: left[i] for i in group}, pictures):
                    del left[index]
        for index, image in left.items():
            outcome = self._render_on_cpu(image)
            if isinstance(outcome, Failure):
                batch.outcomes[index] = outcome
                continue
            for picture, row in zip(pictures, outcome, strict=True):
                picture[index] = torch.from_numpy(row)
        if left and not self.is_trusted:
            batch.decode_on_host()

    def _render_images(
        self, images: Mapping[int, EncodedJpeg], pictures: Sequence[torch.Tensor]
    ) -> set[int]:
        """Return the indices that were rendered; none of them if the decoder proved wrong."""
        decoded = self._decode_images(images)
        doubtful = _with_flat_end(decoded)
        rendered: set[int] = set()
        same_layout: dict[StoredLayout, list[int]] = {}
        for index in decoded:
            same_layout.setdefault(images[index].layout, []).append(index)
        for layout, indices in same_layout.items():
            try:
                group = torch.stack([decoded.pop(index) for index in indices])
                for preprocess, picture in zip(self._preprocesses, pictures, strict=True):
                    rows = render_group(group, preprocess, layout)
                    picture[torch.tensor(indices, device=picture.device)] = rows
            except RuntimeError as error:  # out of memory, or a reduction beyond the filter's limit
                log.debug("the CPU renders %d JPEGs: %s", len(indices), first_line(error))
            else:
                rendered.update(indices)
        if self._left_to_compare and not self._is_right(images, rendered, pictures):
            self.is_trusted = False
            return set()
        return rendered - doubtful

    def _decode_images(self, images: Mapping[int, EncodedJpeg]) -> dict[int, torch.Tensor]:
        """Return ``(3, H, W)`` uint8 for each image that the device can decode."""
        encoded = {
            # A copy, because torch wants writable memory.
            index: torch.from_numpy(np.frombuffer(image.file.content, np.uint8).copy())
            for index, image in images.items()
        }
        with self._noted(images.values()):
            try:
                decoded = dict(zip(encoded, self._decode(list(encoded.values())), strict=True))
            except RuntimeError as error:  # it does not say which image failed
                log.debug("decoding %d JPEGs one by one: %s", len(encoded), first_line(error))
                decoded = {}
                for index, content in encoded.items():
                    with suppress(RuntimeError):
                        (decoded[index],) = self._decode([content])
        return {
            index: pixels
            for index, pixels in decoded.items()
            if pixels.shape == (3, images[index].layout.height, images[index].layout.width)
        }

    @contextmanager
    def _noted(self, images: Collection[EncodedJpeg]) -> Iterator[None]:
        """Note the images in the crash log during the block."""
        if self._crash_log is None:
            yield
            return
        for slot, image in enumerate(images, self._first_slot):
            self._crash_log.note(slot, os.fsencode(image.file.path))
        try:
            yield
        finally:
            for slot in range(self._first_slot, self._first_slot + len(images)):
                self._crash_log.note(slot, b"")

    def _nvjpeg(self, encoded: list[torch.Tensor]) -> list[torch.Tensor]:
        from torchvision.io import ImageReadMode, decode_jpeg

        # The engine does not wait for the work queued on this stream, and may be given memory that
        # this work still reads (pytorch/vision pull request 9606).
        torch.cuda.current_stream(self._device).synchronize()
        images: list[torch.Tensor] = decode_jpeg(encoded, ImageReadMode.RGB, self._device)
        return images

    def _is_right(
        self,
        images: Mapping[int, EncodedJpeg],
        rendered: Collection[int],
        pictures: Sequence[torch.Tensor],
    ) -> bool:
        """Return whether the first images equal those that the CPU decodes."""
        refused = 0
        for index, image in itertools.islice(images.items(), self._left_to_compare):
            expected = self._render_on_cpu(image)
            if isinstance(expected, Failure):
                continue
            self._left_to_compare -= 1
            if index not in rendered:
                refused += 1
                continue
            for picture, row in zip(pictures, expected, strict=True):
                difference = np.abs(picture[index].cpu().numpy().astype(np.int16) - row).mean()
                if difference > MAX_MEAN_DIFFERENCE:
                    log.warning(
                        "%s: %s decodes it to other pixels (mean difference %.2f levels); "
                        "decoding all images on the CPU",
                        *(os.fsdecode(image.file.path), self._device, difference),
                    )
                    return False
        if refused and not rendered:
            log.warning("%s decodes no JPEG; decoding all images on the CPU", self._device)
            return False
        return True

    def _render_on_cpu(self, image: EncodedJpeg) -> list[npt.NDArray[np.uint8]] | Failure:
        rows = [
            np.empty((*preprocess.input_size, 3), np.uint8) for preprocess in self._preprocesses
        ]
        try:
            with self._noted([image]):
                budget = PixelBudget(self._max_pixels)
                decode_into(image.file, self._preprocesses, rows, budget, "exact")
        except DecodeError as error:
            return Failure.from_error(error)
        return rows


def _with_flat_end(decoded: Mapping[int, torch.Tensor]) -> set[int]:
    """Return the images that end in one color, as those do whose data end early.

    The CPU decodes them again and sees whether data are missing. White paper and black frames are
    too common for that.
    """
    ends = {index: image[:, -FLAT_PIXELS:, -FLAT_PIXELS:] for index, image in decoded.items()}
    if not ends:
        return set()
    low = torch.stack([end.amin((1, 2)) for end in ends.values()]).int()
    high = torch.stack([end.amax((1, 2)) for end in ends.values()]).int()
    is_flat = ((high - low).amax(1) <= 1) & (low.amin(1) < 254) & (high.amax(1) > 1)
    return {index for index, flat in zip(ends, is_flat.tolist(), strict=True) if flat}


def _groups(images: Mapping[int, EncodedJpeg]) -> Iterator[list[int]]:
    """Split images into groups whose pixels fit into the memory of the device."""
    group: list[int] = []
    group_pixels = 0
    for index, image in images.items():
        pixels = image.layout.width * image.layout.height
        is_full = group_pixels + pixels > MAX_GROUP_PIXELS or len(group) == MAX_GROUP_IMAGES
        if group and is_full:
            yield group
            group, group_pixels = [], 0
        group.append(index)
        group_pixels += pixels
    if group:
        yield group


def render_group(
    images: torch.Tensor, preprocess: Preprocess, layout: StoredLayout
) -> torch.Tensor:
    """Render the pictures of one model from images of the same layout.

    Args:
        images: ``(N, 3, H, W)`` uint8, in the orientation of their files.
        preprocess: Transform of the model.
        layout: Size and orientation of each image.

    Returns:
        ``(N, height, width, 3)`` uint8 of the model's input size.
    """
    geometry = preprocess.geometry(*layout.upright)
    (width, height), (x0, y0, x1, y1) = resize_and_crop_box(geometry, layout.orientation)
    scale_x, scale_y = layout.width / width, layout.height / height
    filter_ = getattr(torch.ops.aten, f"_upsample_{preprocess.interpolation}2d_aa")
    resized = filter_(images.float(), (height, width), False, 1 / scale_y, 1 / scale_x)
    visible = resized[:, :, y0:y1, x0:x1].round_().clamp_(0, 255).to(torch.uint8)
    rows = _turn_upright(visible.permute(0, 2, 3, 1), layout.orientation)
    left, top = geometry.offset
    width, height = geometry.size
    if (height, width) == preprocess.input_size:
        return rows
    color = torch.tensor(preprocess.fill, dtype=torch.uint8, device=images.device)
    padded = color.expand(len(images), *preprocess.input_size, 3).clone()
    padded[:, top : top + height, left : left + width] = rows
    return padded


def _turn_upright(rows: torch.Tensor, orientation: int) -> torch.Tensor:
    """Turn pictures ``(N, H, W, 3)`` upright."""
    if orientation >= 5:
        rows = rows.transpose(1, 2)
    axes = [axis for axis, is_flipped in enumerate(flipped_axes(orientation), 1) if is_flipped]
    return rows.flip(axes) if axes else rows
