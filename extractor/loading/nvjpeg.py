"""JPEGs decoded on the GPU with nvJPEG, and rendered there. Experimental: measured on one GPU.

Everything about GPU decoding is behind :class:`NvjpegDecoder`. The decoding threads leave plain
JPEGs encoded. Their bytes go to the GPU, which decodes, turns and resizes them, while the threads
decode all other images. What the GPU cannot decode is decoded by the CPU after all.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from extractor.errors import DecodeError
from extractor.images.budget import PixelBudget
from extractor.images.decode import decode_into
from extractor.images.types import EncodedJpeg, Failure
from extractor.loading.batch import Batch
from extractor.loading.crash_log import CrashLog
from extractor.loading.device_render import block_of, render_block, turned_upright
from extractor.preprocess import Preprocess
from extractor.system.devices import is_broken_device
from extractor.text import first_line

__all__ = ["MAX_GROUP_IMAGES", "NvjpegDecoder"]

log = logging.getLogger(__name__)

# Limits of one call of the decoder. Each call waits for the device, so that few calls are better.
MAX_GROUP_PIXELS = 2**27
MAX_GROUP_IMAGES = 256

# Limits of one block of decoded images. A pixel takes 3 bytes, and 12 during the resize. An image
# much larger than the others would fill a block with padding.
MAX_BLOCK_PIXELS = 2**26
MAX_PADDING = 2.0  # pixels of a block for each pixel of its images

# Both sides decode the first images. nvJPEG repeats the color of 4:2:0 images where libjpeg
# interpolates it. With libjpeg made to repeat it, 334 photos differ by 0.48 of 255 levels in the
# mean and by 2.9 in the worst photo. The embeddings of 112 of them keep a cosine of 0.995 or more.
TRIAL_IMAGES = 64
MAX_MEAN_DIFFERENCE = 1.0  # over all pictures
MAX_DIFFERENCE = 8.0  # over one picture
LEAST_COSINE = 0.99

# After the trial, a GPU that refuses more images of one batch than it decodes, and more than these,
# is not trusted any longer: this process would decode them with a single thread.
MAX_REFUSED = 8

FLAT_PIXELS = 8  # edge of a block

Embed = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]


@dataclass
class _Trial:
    """Comparison of the first images with what the CPU makes of them."""

    compared: int = 0
    refused: int = 0
    mean_difference: float = 0.0
    worst_difference: float = 0.0
    worst_path: str = ""
    least_cosine: float = 1.0
    last_error: str = ""

    @property
    def is_over(self) -> bool:
        return self.compared + self.refused >= TRIAL_IMAGES

    def compare(self, path: str, difference: float) -> None:
        """Take in the mean difference of one picture."""
        self.compared += 1
        self.mean_difference += (difference - self.mean_difference) / self.compared
        if difference >= self.worst_difference:
            self.worst_difference, self.worst_path = difference, path

    def objection(self) -> str:
        """Return why the decoder is not to be trusted; empty if it is."""
        if self.compared < self.refused:
            error = f" ({self.last_error})" if self.last_error else ""
            return f"decodes only {self.compared} of {self.compared + self.refused} JPEGs{error}"
        if self.mean_difference > MAX_MEAN_DIFFERENCE or self.worst_difference > MAX_DIFFERENCE:
            return (
                f"decodes JPEGs to other pixels (mean difference {self.mean_difference:.2f} of 255 "
                f"levels, {self.worst_difference:.2f} in {self.worst_path})"
            )
        if self.least_cosine < LEAST_COSINE:
            return f"decodes JPEGs to other embeddings (least cosine {self.least_cosine:.4f})"
        return ""


@dataclass
class _Rendered:
    """What became of the images of one batch, by index. An index in neither set is doubtful."""

    done: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)


class NvjpegDecoder:
    """Renders the images that the decoding threads left encoded, on the GPU.

    The first :data:`TRIAL_IMAGES` images are decoded by both sides, and their pictures and
    embeddings are compared. Until that is decided, the pictures of the CPU are used. If the GPU is
    wrong, or refuses most images later, the CPU decodes everything from then on.

    Args:
        device: GPU that decodes.
        preprocesses: Transforms for the pictures of each batch.
        max_pixels: Largest image that the CPU may have to decode after all.
        crash_log: Notes the images that are being decoded.
        first_slot: First slot of ``crash_log`` to use.
        decode: Turns encoded images into ``(3, H, W)`` uint8 on the device. For tests.

    Attributes:
        is_trusted: Whether the GPU decodes; None during the trial.
        objection: Why it is not trusted; empty if it is.
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
        self._trial = _Trial()
        self.is_trusted: bool | None = None
        self.objection = ""

    def decode_batch(
        self, batch: Batch, pictures: Sequence[torch.Tensor], embed: Embed | None = None
    ) -> None:
        """Render the encoded images of a batch. An undecodable image becomes a failure.

        Args:
            batch: Batch whose images were left encoded.
            pictures: Pictures of the batch on the device, ``(B, H, W, 3)`` uint8, written in place.
                On a GPU, the current stream must be the one on which they were made.
            embed: Returns embeddings of such pictures, to be compared as well.

        Raises:
            RuntimeError: The device is broken.
        """
        images = dict(sorted(batch.encoded.items()))
        rendered = _Rendered()
        if self.is_trusted is not False:
            for group in _groups(images):
                self._render(group, pictures, rendered)
        if self.is_trusted is None:
            self._compare(images, rendered, pictures, embed)
        done = rendered.done if self.is_trusted else set()
        refused, count = len(rendered.refused), len(images)
        if self.is_trusted and refused > max(count - refused, MAX_REFUSED):
            error = self._trial.last_error or "other sizes"
            self._distrust(f"refuses {refused} of {count} JPEGs now ({error})")
        for index, image in images.items():
            if index in done:
                continue
            outcome = self._render_on_cpu(image)
            if isinstance(outcome, Failure):
                batch.outcomes[index] = outcome
                for picture in pictures:
                    picture[index] = 0
                continue
            for picture, row in zip(pictures, outcome, strict=True):
                picture[index] = torch.from_numpy(row)
        if self.is_trusted is False:
            batch.decode_on_host()

    # -- on the GPU

    def _render(
        self, images: Mapping[int, EncodedJpeg], pictures: Sequence[torch.Tensor], to: _Rendered
    ) -> None:
        """Render a group; if that fails, its halves.

        The decoder does not say which image it refuses, and memory may suffice for fewer images.
        """
        try:
            self._render_group(images, pictures, to)
        except RuntimeError as error:
            self._raise_if_broken(error)
            self._trial.last_error = first_line(error)
            log.debug("%s refuses %d JPEGs: %s", self._device, len(images), first_line(error))
        else:
            return
        # Outside of the handler, which would keep the tensors of the failed attempt alive.
        if len(images) == 1:
            to.refused.update(images)
            return
        indices = list(images)
        middle = len(indices) // 2
        for half in (indices[:middle], indices[middle:]):
            self._render({index: images[index] for index in half}, pictures, to)

    def _render_group(
        self, images: Mapping[int, EncodedJpeg], pictures: Sequence[torch.Tensor], to: _Rendered
    ) -> None:
        # A copy of the bytes, because torch wants writable memory.
        encoded = [
            torch.from_numpy(np.frombuffer(image.file.content, np.uint8).copy())
            for image in images.values()
        ]
        with self._noted(images.values()):
            decoded = dict(zip(images, self._decode(encoded), strict=True))
        for index, pixels in list(decoded.items()):
            layout = images[index].layout
            if pixels.shape != (3, layout.height, layout.width):
                to.refused.add(index)
                del decoded[index]
        for block in _blocks({index: images[index] for index in decoded}):
            self._render_block({index: decoded[index] for index in block}, block, pictures)
        # Waits for the device, after all of the work was queued.
        to.done.update(decoded.keys() - _with_flat_end(decoded))

    def _render_block(
        self,
        decoded: Mapping[int, torch.Tensor],
        images: Mapping[int, EncodedJpeg],
        pictures: Sequence[torch.Tensor],
    ) -> None:
        layouts = [image.layout for image in images.values()]
        block = block_of(
            [
                turned_upright(pixels, layout.orientation)
                for pixels, layout in zip(decoded.values(), layouts, strict=True)
            ]
        )
        at = torch.tensor(list(decoded)).to(block.device, non_blocking=True)
        sizes = [layout.upright for layout in layouts]
        for preprocess, picture in zip(self._preprocesses, pictures, strict=True):
            picture[at] = render_block(block, sizes, preprocess)

    def _raise_if_broken(self, error: RuntimeError) -> None:
        """Raise an error that all later calls would meet, too."""
        if is_broken_device(error):
            raise error
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # raises what earlier work ran into

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
        try:
            from torchvision.io import ImageReadMode, decode_jpeg
        except ImportError as error:
            raise RuntimeError("this torchvision has no JPEG decoder") from error
        # The engine does not wait for the work queued on this stream, and may be given memory that
        # this work still reads (pytorch/vision pull request 9606).
        torch.cuda.current_stream(self._device).synchronize()
        images: list[torch.Tensor] = decode_jpeg(encoded, ImageReadMode.RGB, self._device)
        return images

    # -- on the CPU

    def _compare(
        self,
        images: Mapping[int, EncodedJpeg],
        rendered: _Rendered,
        pictures: Sequence[torch.Tensor],
        embed: Embed | None,
    ) -> None:
        """Compare pictures of the device with those of the CPU, and decide if there are enough."""
        trial = self._trial
        expected = [picture.clone() for picture in pictures]
        compared: list[int] = []
        for index, image in images.items():
            if trial.is_over:
                break
            if index in rendered.refused:
                trial.refused += 1
            if index not in rendered.done:
                continue
            rows = self._render_on_cpu(image)
            if isinstance(rows, Failure):
                rendered.done.discard(index)
                continue
            for picture, row in zip(expected, rows, strict=True):
                picture[index] = torch.from_numpy(row)
            difference = max(
                float((picture[index].float() - exact[index]).abs().mean())
                for picture, exact in zip(pictures, expected, strict=True)
            )
            trial.compare(os.fsdecode(image.file.path), difference)
            compared.append(index)
        if embed is not None and compared:
            cosine = _least_cosine(embed(pictures), embed(expected), compared)
            trial.least_cosine = min(trial.least_cosine, cosine)
        if not trial.is_over:
            return
        self.is_trusted = True
        if objection := trial.objection():
            self._distrust(objection)

    def _distrust(self, objection: str) -> None:
        """Leave all images to the CPU from the next batch on."""
        self.is_trusted, self.objection = False, objection
        log.warning("%s %s; decoding all images on the CPU", self._device, objection)

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


def _least_cosine(
    rows: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], indices: Sequence[int]
) -> float:
    """Return the least cosine of two embeddings of an image, over all models."""
    cosines = [
        torch.cosine_similarity(a[indices].flatten(1).double(), b[indices].flatten(1).double())
        for a, b in zip(rows, expected, strict=True)
    ]
    # Values that overflow in half precision say nothing about pixels.
    return float(torch.stack(cosines).nan_to_num(1.0).min())


def _with_flat_end(decoded: Mapping[int, torch.Tensor]) -> set[int]:
    """Return the images that end in one color, as those do whose data end early.

    The CPU decodes them again and sees whether data are missing. White paper and black frames are
    too common for that. Tiny images are among them.
    """
    large = {
        index: image for index, image in decoded.items() if min(image.shape[1:]) >= FLAT_PIXELS
    }
    small = decoded.keys() - large.keys()
    if not large:
        return small
    ends = torch.stack([image[:, -FLAT_PIXELS:, -FLAT_PIXELS:] for image in large.values()])
    low, high = (values.int() for values in torch.aminmax(ends.flatten(2), dim=2))
    is_flat = ((high - low).amax(1) <= 1) & (low.amin(1) < 254) & (high.amax(1) > 1)
    return small | {index for index, flat in zip(large, is_flat.tolist(), strict=True) if flat}


def _groups(images: Mapping[int, EncodedJpeg]) -> Iterator[dict[int, EncodedJpeg]]:
    """Split images into groups that are decoded at once."""
    group: dict[int, EncodedJpeg] = {}
    pixels = 0
    for index, image in images.items():
        more = math.prod(image.layout.upright)
        is_full = pixels + more > MAX_GROUP_PIXELS or len(group) == MAX_GROUP_IMAGES
        if group and is_full:
            yield group
            group, pixels = {}, 0
        group[index] = image
        pixels += more
    if group:
        yield group


def _blocks(images: Mapping[int, EncodedJpeg]) -> Iterator[dict[int, EncodedJpeg]]:
    """Split images of about the same size into blocks with little padding."""
    block: dict[int, EncodedJpeg] = {}
    width = height = pixels = 0
    for index, image in sorted(images.items(), key=lambda item: item[1].layout.upright):
        size = image.layout.upright
        width, height = max(width, size[0]), max(height, size[1])
        pixels += math.prod(size)
        padded = (len(block) + 1) * width * height
        if block and (padded > MAX_BLOCK_PIXELS or padded > MAX_PADDING * pixels):
            yield block
            block, (width, height), pixels = {}, size, math.prod(size)
        block[index] = image
    if block:
        yield block
