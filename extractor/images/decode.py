"""Decode one image into the pictures of several models: the path from a source to pixels."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from extractor.errors import DecodeError
from extractor.images import files
from extractor.images.budget import PixelBudget, pillow_allows
from extractor.images.color import to_rgb
from extractor.images.containers.png import without_long_metadata
from extractor.images.files import as_decode_errors, read_file, with_file_status
from extractor.images.formats import open_image
from extractor.images.jpeg import LIBJPEG_FORMATS, reduce_size
from extractor.images.jpeg_scans import check_scans
from extractor.images.orientation import read_orientation
from extractor.images.render import render
from extractor.images.types import (
    EncodedImage,
    FilePath,
    ImageInfo,
    ImageSource,
    ReadFile,
    StoredLayout,
)
from extractor.options import DECODE, MAX_PIXELS
from extractor.preprocess import GrayBits, Preprocess
from extractor.system.hashing import hash_file

__all__ = ["decode_into"]

# Pillow reads an image of the caller's when it is first used, which one thread may do at a time.
_loading = tuple(threading.Lock() for _ in range(61))

Size: TypeAlias = tuple[int, int]
"""Width and height of an upright image in pixels."""


def decode_into(
    source: ImageSource,
    preprocesses: Sequence[Preprocess],
    outs: Sequence[npt.NDArray[np.uint8]],
    budget: PixelBudget | None = None,
    decode_mode: str = DECODE,
) -> ImageInfo:
    """Decode an image once, and render it into the picture of each model.

    Args:
        source: A path, the content of a file, an :class:`EncodedImage`, a PIL image, or a uint8
            array ``(H, W)`` or ``(H, W, 1 | 3 | 4)`` in RGB order.
        preprocesses: Transforms of the models.
        outs: For each transform ``(height, width, 3)`` uint8 of its ``input_size``. Written in
            place, RGB.
        budget: Limit on the pixels of images before they are resized. Calls that share a budget
            wait for each other instead of exceeding it together.
        decode_mode: ``scaled`` lets libjpeg reduce JPEGs that are much larger than all pictures.
            Any other value decodes every pixel.

    Returns:
        Facts about the image: size, time and digest of its file, width and height.

    Raises:
        DecodeError: The image cannot be decoded. ``outs`` may be partly written.
        TypeError: ``source`` is none of the types above.
        ValueError: ``outs`` has another shape or type.
    """
    for preprocess, out in zip(preprocesses, outs, strict=True):
        if out.shape != (*preprocess.input_size, 3) or out.dtype != np.uint8:
            raise ValueError(
                f"out: got {out.dtype} {out.shape}, expected uint8 {(*preprocess.input_size, 3)}"
            )
    budget = budget or PixelBudget(MAX_PIXELS)
    decoder = _Decoder(tuple(preprocesses), tuple(outs), budget, decode_mode)
    with pillow_allows(budget.max_pixels):
        return decoder.decode(source)


@dataclass(frozen=True)
class _Decoder:
    """Decodes one image into the given pictures; see :func:`decode_into`."""

    preprocesses: tuple[Preprocess, ...]
    outs: tuple[npt.NDArray[np.uint8], ...]
    budget: PixelBudget
    decode_mode: str

    def decode(self, source: ImageSource) -> ImageInfo:
        """Decode an image from any source."""
        if isinstance(source, (str, bytes, os.PathLike)):
            source = read_file(source)
        if isinstance(source, ReadFile):
            return self.decode_read_file(source)
        if isinstance(source, (str, bytes, os.PathLike)):
            return self.decode_large_file(source)
        if not isinstance(source, (EncodedImage, Image.Image, np.ndarray)):
            raise TypeError(f"source: got {type(source).__name__}, expected a path or an image")
        with as_decode_errors():
            if isinstance(source, EncodedImage):
                return ImageInfo(len(source.data), -1, *self.decode_bytes(source.data))
            if isinstance(source, np.ndarray):
                return ImageInfo(-1, -1, *self.render_all(_from_array(source)))
            with _loading[id(source) % len(_loading)]:  # several threads may have this image
                return ImageInfo(-1, -1, *self.render_all(source, may_reduce=False))

    def decode_read_file(self, file: ReadFile) -> ImageInfo:
        """Decode a file whose content is in memory."""
        try:
            with as_decode_errors():
                width, height = self.decode_bytes(file.content)
        except DecodeError as error:
            error.size, error.mtime_ns = file.size, file.mtime_ns
            raise
        digest = hashlib.sha256(file.content).digest()
        return ImageInfo(file.size, file.mtime_ns, width, height, digest)

    def decode_large_file(self, path: FilePath) -> ImageInfo:
        """Decode a file that Pillow reads piece by piece."""
        with with_file_status(path), as_decode_errors(), files.open_regular(path) as file:
            status = os.fstat(file.fileno())
            digest, _ = hash_file(file)
            file.seek(0)
            width, height = self.decode_stream(file)
            return ImageInfo(*files.size_and_mtime(status), width, height, digest)

    def decode_bytes(self, content: bytes) -> Size:
        """Decode an encoded image in memory."""
        return self.decode_stream(io.BytesIO(content))

    def decode_stream(self, file: IO[bytes]) -> Size:
        """Decode an encoded image in a file or in memory."""
        try:
            with open_image(file, self.budget) as image:
                return self.render_all(image)
        except ValueError:
            shorter = without_long_metadata(file)
            if shorter is None:
                raise
        with open_image(shorter, self.budget) as image:
            return self.render_all(image)

    def render_all(self, image: Image.Image, *, may_reduce: bool = True) -> Size:
        """Load an image, and render it into every picture.

        Args:
            image: Opened by Pillow, not yet loaded.
            may_reduce: Whether libjpeg may reduce it. That changes ``image``, so it is not done to
                an image of the caller's.
        """
        with self.budget.claim(image.width, image.height):
            reduced_by = 1
            if image.format in LIBJPEG_FORMATS:
                layout = StoredLayout(*image.size, read_orientation(image))
                if may_reduce and self.decode_mode == "scaled":
                    reduced_by = reduce_size(image, layout, self.preprocesses)
                check_scans(image)
                image.load()
            else:
                image.load()  # some formats turn the image, or find its orientation, only here
                layout = StoredLayout(*image.size, read_orientation(image))
            rgb: dict[GrayBits, Image.Image] = {}
            for preprocess, out in zip(self.preprocesses, self.outs, strict=True):
                bits = preprocess.gray_bits
                if bits not in rgb:
                    rgb[bits] = to_rgb(image, bits)
                render(rgb[bits], preprocess, out, layout, reduced_by)
        return layout.upright


def _from_array(array: npt.NDArray[np.uint8]) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or 0 in array.shape:
        raise DecodeError(
            "not-an-image",
            f"expected a uint8 array (H, W) or (H, W, 1|3|4), got {array.dtype} {array.shape}",
        )
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4):
        raise DecodeError("not-an-image", f"expected 1, 3 or 4 channels last, got {array.shape}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(array))
