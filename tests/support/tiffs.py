"""TIFF files written tag by tag, and raw files as cameras write them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Values = npt.NDArray[Any]
Tags = dict[int, tuple[int, Sequence[int]]]
"""By tag number, the type (3 SHORT, 4 LONG, ...) and the values."""

BYTE, ASCII, SHORT, LONG, RATIONAL, SIGNED_RATIONAL = 1, 2, 3, 4, 5, 10
CODES = {BYTE: "B", ASCII: "B", SHORT: "H", LONG: "I", RATIONAL: "I", SIGNED_RATIONAL: "i"}


class TiffFile:
    """A TIFF file that grows by directories. The last one added is not linked by itself.

    Args:
        order: ``<`` or ``>``.
        big: Whether offsets have 64 bits.
    """

    def __init__(self, order: str = "<", *, big: bool = False) -> None:
        self.order, self.big = order, big
        self.offset_code = "Q" if big else "I"
        mark = b"II" if order == "<" else b"MM"
        version = (43, 8, 0, 0) if big else (42, 0)
        code = "HHHQ" if big else "HI"
        self.data = bytearray(mark + struct.pack(order + code, *version))

    def put(self, content: bytes) -> int:
        """Append bytes and return their offset."""
        self.data.extend(bytes(len(self.data) % 2))
        self.data.extend(content)
        return len(self.data) - len(content)

    def directory(self, tags: Tags, following: int = 0) -> int:
        """Append a directory and return its offset."""
        entries = b""
        inline = 8 if self.big else 4
        for tag, (kind, values) in sorted(tags.items()):
            content = struct.pack(f"{self.order}{len(values)}{CODES[kind]}", *values)
            count = len(values) // (2 if kind in (RATIONAL, SIGNED_RATIONAL) else 1)
            if len(content) > inline:
                content = struct.pack(self.order + self.offset_code, self.put(content))
            head = struct.pack(f"{self.order}HH{self.offset_code}", tag, kind, count)
            entries += head + content.ljust(inline, b"\0")
        count_code = "Q" if self.big else "H"
        table = struct.pack(self.order + count_code, len(tags)) + entries
        return self.put(table + struct.pack(self.order + self.offset_code, following))

    def picture(self, image: Image.Image, kind: int | None, more: Tags | None = None) -> Tags:
        """Append the pixels of an RGB image and return its tags. ``kind`` is NewSubfileType."""
        pixels = np.asarray(image.convert("RGB"))
        height, width, _ = pixels.shape
        tags: Tags = {
            256: (LONG, [width]),
            257: (LONG, [height]),
            258: (SHORT, [8, 8, 8]),
            259: (SHORT, [1]),
            262: (SHORT, [2]),
            273: (LONG, [self.put(pixels.tobytes())]),
            277: (SHORT, [3]),
            278: (LONG, [height]),
            279: (LONG, [pixels.nbytes]),
        }
        if kind is not None:
            tags[254] = (LONG, [kind])
        return tags | (more or {})

    def finish(self, first: int) -> bytes:
        """Return the file, which starts with the directory at an offset."""
        struct.pack_into(self.order + self.offset_code, self.data, 8 if self.big else 4, first)
        return bytes(self.data)


def dng(
    levels: Values,
    preview: Image.Image | None,
    orientation: int = 1,
    neutral: tuple[int, int] = (1, 1),
) -> bytes:
    """Return a raw file of a made-up camera whose colors are those of sRGB.

    Args:
        levels: ``(H, W, 3)`` linear values 0 to 65535, of which each raw pixel keeps one (RGGB).
        preview: Image of the first directory, marked as reduced; None for the raw image itself.
        orientation: Value of the orientation tag.
        neutral: Red of a gray object, as a fraction of its green and blue.
    """
    file = TiffFile()
    height, width, _ = levels.shape
    mosaic = np.empty((height, width), "<u2")
    for row, column, channel in ((0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 2)):
        mosaic[row::2, column::2] = levels[row::2, column::2, channel]
    raw: Tags = {
        254: (LONG, [0]),
        256: (LONG, [width]),
        257: (LONG, [height]),
        258: (SHORT, [16]),
        259: (SHORT, [1]),
        262: (SHORT, [32803]),
        273: (LONG, [file.put(mosaic.tobytes())]),
        277: (SHORT, [1]),
        278: (LONG, [height]),
        279: (LONG, [mosaic.nbytes]),
        33421: (SHORT, [2, 2]),  # CFARepeatPatternDim
        33422: (BYTE, [0, 1, 1, 2]),  # CFAPattern
        50714: (SHORT, [0]),  # BlackLevel
        50717: (LONG, [65535]),  # WhiteLevel
    }
    # XYZ to linear sRGB (IEC 61966-2-1), in ten thousandths.
    matrix = [32406, -15372, -4986, -9689, 18758, 415, 557, -2040, 10570]
    camera: Tags = {
        271: (ASCII, list(b"Maker\0")),
        272: (ASCII, list(b"Model\0")),
        274: (SHORT, [orientation]),
        50706: (BYTE, [1, 4, 0, 0]),  # DNGVersion
        50708: (ASCII, list(b"Maker Model\0")),  # UniqueCameraModel
        50721: (SIGNED_RATIONAL, [n for value in matrix for n in (value, 10000)]),  # ColorMatrix1
        50728: (RATIONAL, [*neutral, 1, 1, 1, 1]),  # AsShotNeutral
        50778: (SHORT, [21]),  # CalibrationIlluminant1: D65
    }
    if preview is None:
        return file.finish(file.directory(raw | camera))
    inner = file.directory(raw)
    return file.finish(file.directory(file.picture(preview, 1, camera | {330: (LONG, [inner])})))
