"""PNG: files whose texts or color profile exceed Pillow's limits."""

from __future__ import annotations

import bisect
import io
import itertools
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import IO

from PIL import PngImagePlugin

__all__ = ["PNG_START", "without_long_metadata"]

PNG_START = b"\x89PNG\r\n\x1a\n"

# Chunks that Pillow inflates, and that the pixels do not depend on (PNG, third edition, 11.3).
TEXTS, PROFILE = frozenset({b"tEXt", b"zTXt", b"iTXt"}), b"iCCP"

# Texts that may hold the orientation of the image. They are kept if they are short.
ORIENTATION_TEXTS = (b"Raw profile type exif", b"XML:com.adobe.xmp", b"exif")

# A chunk with a length, a kind and a checksum.
HEAD_BYTES, CHECKSUM_BYTES = 8, 4

MAX_PARTS = 2**16  # bounds the memory that a hostile file costs


def without_long_metadata(file: IO[bytes]) -> IO[bytes] | None:
    """Return a view of a PNG file without its texts and color profile, which Pillow limits.

    Short texts that may hold the orientation stay. Nothing that is left out is inflated, so it
    costs no memory and no time.

    Returns:
        None if the file is no PNG, has nothing to leave out, or consists of too many parts.
    """
    file.seek(0)
    if file.read(len(PNG_START)) != PNG_START:
        return None
    parts: list[tuple[int, int]] = [(0, len(PNG_START))]
    left_out = False
    kept: set[bytes] = set()
    for start, kind, length in _chunks(file):
        if kind == PROFILE or (kind in TEXTS and not _keep_text(file, kind, length, kept)):
            left_out = True
        elif sum(parts[-1]) == start:
            parts[-1] = (parts[-1][0], parts[-1][1] + HEAD_BYTES + length + CHECKSUM_BYTES)
        else:
            parts.append((start, HEAD_BYTES + length + CHECKSUM_BYTES))
        if len(parts) > MAX_PARTS:
            return None
    return io.BufferedReader(_PartsOfFile(file, parts)) if left_out else None


def _chunks(file: IO[bytes]) -> Iterator[tuple[int, bytes, int]]:
    """Yield the offset, the kind and the length of each chunk, with the file behind its head."""
    offset = len(PNG_START)
    while True:
        file.seek(offset)
        head = file.read(HEAD_BYTES)
        if not head:
            return
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        yield offset, kind, length
        offset += HEAD_BYTES + length + CHECKSUM_BYTES


def _keep_text(file: IO[bytes], kind: bytes, length: int, kept: set[bytes]) -> bool:
    """Return whether a text may hold the orientation, is the first of its name, and is short."""
    limit = PngImagePlugin.MAX_TEXT_CHUNK
    if length > limit:
        return False
    content = file.read(length)
    name, _, rest = content.partition(b"\0")
    if name not in ORIENTATION_TEXTS or name in kept:
        return False
    kept.add(name)
    if kind == b"zTXt":
        return _inflates_within(rest[1:], limit)
    if kind == b"iTXt" and rest[:1] != b"\0":  # compression flag and method, language, translation
        return _inflates_within(rest[2:].split(b"\0", 2)[-1], limit)
    return True


def _inflates_within(content: bytes, limit: int) -> bool:
    inflater = zlib.decompressobj()
    try:
        inflater.decompress(content, limit)
    except zlib.error:
        return True  # Pillow ignores it
    return not inflater.unconsumed_tail


class _PartsOfFile(io.RawIOBase):
    """Parts of a file as one file, without a copy.

    Args:
        file: A file that can seek.
        parts: Offset and length of each part.
    """

    def __init__(self, file: IO[bytes], parts: Sequence[tuple[int, int]]) -> None:
        self._file = file
        self._parts = parts
        self._ends = list(itertools.accumulate(length for _, length in parts))
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._ends[-1]}
        self._position = max(0, start[whence] + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        number = bisect.bisect_right(self._ends, self._position)
        if number == len(self._parts):
            return 0
        left = self._ends[number] - self._position
        self._file.seek(sum(self._parts[number]) - left)
        content = self._file.read(min(len(buffer), left))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)
