"""JPEG: decoding at a reduced size, and files that any decoder decodes alike."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image

from extractor.images.jpeg_scans import FRAMES, SEQUENTIAL_FRAMES
from extractor.images.orientation import read_orientation
from extractor.images.render import can_resize_whole
from extractor.images.types import EncodedJpeg, ImageInfo, ReadFile, StoredLayout
from extractor.preprocess import Preprocess

__all__ = ["JPEG_START", "LIBJPEG_FORMATS", "plain_jpeg", "reduce_size"]

LIBJPEG_FORMATS = frozenset({"JPEG", "MPO"})  # formats that libjpeg decodes

# Markers of a JPEG file (ITU-T T.81).
JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
HUFFMAN_TABLE, QUANTIZATION_TABLE, START_OF_SCAN = 0xC4, 0xDB, 0xDA
SCAN_START = b"\xff\xda"

# Sampling factors of brightness and the two color channels that every decoder knows: 4:4:4, 4:2:2
# and 4:2:0.
PLAIN_SAMPLINGS = [[factors, (1, 1), (1, 1)] for factors in ((1, 1), (2, 1), (2, 2))]

# A reduced JPEG keeps at least this many times the pixels of the picture along each edge. The mean
# difference from full decoding is then under 1 of 255 levels (docs/performance.md).
MIN_OVERSAMPLING = 2


def reduce_size(
    image: Image.Image, layout: StoredLayout, preprocesses: Iterable[Preprocess]
) -> int:
    """Make libjpeg decode a JPEG at a half, a quarter or an eighth of its size.

    Each picture keeps at least :data:`MIN_OVERSAMPLING` times its own pixels along each edge.

    Returns:
        The factor by which both edges become smaller, 1 if none.
    """
    width, height = layout.upright
    spare = math.inf
    for preprocess in preprocesses:
        if preprocess.interpolation == "nearest":
            return 1
        (left, top, right, bottom), size = preprocess.geometry(width, height)[:2]
        spare = min(spare, (right - left) / size[0], (bottom - top) / size[1])
    factor = next((n for n in (8, 4, 2) if n * MIN_OVERSAMPLING <= spare), 1)
    if factor == 1:
        return 1
    drafted = image.draft(image.mode, (layout.width // factor, layout.height // factor))
    return 1 if drafted is None else round(layout.width / drafted[1][2])


def plain_jpeg(
    file: ReadFile, preprocesses: Sequence[Preprocess], max_pixels: int
) -> tuple[ImageInfo, EncodedJpeg] | None:
    """Return a JPEG that every decoder turns into the same pictures, or None for other files.

    Such a file is sequential with one scan, complete to its last marker, and grayscale or YCbCr in
    a usual sampling. Its pictures need no filter that torch lacks.
    """
    content = file.content
    if not _is_sequential(content) or not content.rstrip(b"\0").endswith(JPEG_END):
        return None
    try:
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
            if image.format != "JPEG" or not _is_plain(image.info, getattr(image, "layer", ())):
                return None
            layout = StoredLayout(image.width, image.height, read_orientation(image))
    except Exception:  # the decoder of other files will report the reason
        return None
    width, height = layout.upright
    resizable = all(
        can_resize_whole(preprocess.geometry(width, height), preprocess.interpolation)
        for preprocess in preprocesses
    )
    if not resizable or width * height > max_pixels:
        return None
    digest = hashlib.sha256(content).digest()
    return ImageInfo(file.size, file.mtime_ns, width, height, digest), EncodedJpeg(file, layout)


def _is_sequential(content: bytes) -> bool:
    """Return whether a file is one sequential scan with Huffman codes and its own tables."""
    offset, markers = 2, []
    if not content.startswith(JPEG_START):
        return False
    while content[offset : offset + 1] == b"\xff" and offset + 4 <= len(content):
        marker = content[offset + 1]
        markers.append(marker)
        offset += 2 + int.from_bytes(content[offset + 2 : offset + 4], "big")
        if marker == START_OF_SCAN:
            frames = [seen for seen in markers if seen in FRAMES]
            complete = {HUFFMAN_TABLE, QUANTIZATION_TABLE} <= set(markers) and len(frames) == 1
            # Inside the scan, 0xff comes before a zero or a restart marker only.
            others = [content.find(start, offset) for start in (JPEG_START[:2], SCAN_START)]
            return complete and frames[0] in SEQUENTIAL_FRAMES and max(others) < 0
    return False


def _is_plain(info: Mapping[str | tuple[int, int], Any], layers: Sequence[Sequence[int]]) -> bool:
    """Return whether the components are grayscale, or YCbCr in one of the usual samplings."""
    names, sampling = [layer[0] for layer in layers], [tuple(layer[1:3]) for layer in layers]
    if info.get("adobe_transform", 1) != 1:
        return False
    if len(layers) == 1:
        return sampling == [(1, 1)]
    return names == [1, 2, 3] and sampling in PLAIN_SAMPLINGS
