"""Images in memory and files, and what becomes of them."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from extractor.errors import DecodeError
from extractor.images import decode
from extractor.images.types import ImageInfo, ImageSource
from extractor.preprocess import GRAY_BITS, GrayBits, Preprocess

Pixels = npt.NDArray[np.uint8]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def decode_into(source: ImageSource, preprocess: Preprocess, out: np.ndarray) -> ImageInfo:
    """Decode an image into one picture. See test_several.py for several pictures."""
    return decode.decode_into(source, [preprocess], [out])


def unresized(width: int, height: int) -> Preprocess:
    """Return a transform without resizing: the picture is the image."""
    return Preprocess((height, width), "squash", (height, width), "bilinear", MEAN, STD)


def pixels(
    source: ImageSource, width: int, height: int, *, gray_bits: GrayBits = GRAY_BITS
) -> Pixels:
    """Return the decoded image without resizing."""
    out = np.full((height, width, 3), 201, np.uint8)
    info = decode_into(source, replace(unresized(width, height), gray_bits=gray_bits), out)
    assert (info.width, info.height) == (width, height)
    return out


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return an image with smooth colors, as a photo has."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (max(2, height // 12), max(2, width // 12), 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return an encoded image."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def furthest(one: npt.ArrayLike, other: npt.ArrayLike) -> int:
    """Return the largest difference between two arrays."""
    return int(np.abs(np.asarray(one, np.int64) - np.asarray(other, np.int64)).max())


def reason(source: ImageSource) -> str:
    """Return the reason why a source cannot be decoded."""
    with pytest.raises(DecodeError, match=r".") as caught:
        decode_into(source, unresized(8, 8), np.zeros((8, 8, 3), np.uint8))
    return caught.value.reason


def png(size: tuple[int, int], rows: bytes, *, depth: int = 8, color_type: int = 2) -> bytes:
    """Return a PNG file with unfiltered rows."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">L", len(body)) + name + body + struct.pack(">L", zlib.crc32(name + body))
        )

    header = struct.pack(">LLBBBBB", *size, depth, color_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


EXIF_KINDS = ("JPEG", "PNG", "WEBP", "TIFF")


def turned(image: Image.Image, kind: str, orientation: int) -> bytes:
    """Return an encoded image with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    by_kind: dict[str, Any] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}
    options = by_kind.get(kind, {})
    return encoded(image, kind, exif=exif, **options)
