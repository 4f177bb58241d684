"""TIFF: which image of a file is its picture, and whether the file is a camera's raw file."""

from __future__ import annotations

import io
import itertools
import os
import struct
from collections.abc import Iterator
from typing import IO, NamedTuple

from extractor.errors import DecodeError

__all__ = ["RAW_FILE", "TIFF_STARTS", "main_picture", "open_at"]

# Byte order, and whether offsets have 64 bits. Pillow accepts two wrong starts as well.
TIFF_STARTS = {
    b"II*\0": ("<", False),
    b"MM\0*": (">", False),
    b"II\0*": ("<", False),
    b"MM*\0": (">", False),
    b"II+\0": ("<", True),
    b"MM\0+": (">", True),
}

RAW_FILE = -1
"""Answer of :func:`main_picture` for a raw file."""

# Tags (TIFF 6.0; TIFF/EP; DNG 1.7).
NEW_SUBFILE_TYPE, SUBFILE_TYPE, COMPRESSION, PHOTOMETRIC = 254, 255, 259, 262
SUB_IFDS, DNG_VERSION = 330, 50706
TAGS = {NEW_SUBFILE_TYPE, SUBFILE_TYPE, COMPRESSION, PHOTOMETRIC, SUB_IFDS, DNG_VERSION}

# Bits of NewSubfileType: a reduced image, a transparency mask, a depth map.
NO_PICTURE = 1 | 4 | 8
OLD_REDUCED = 2  # value of SubfileType

# A color filter array, and linear raw values.
RAW_PHOTOMETRICS = frozenset({32803, 34892})
# ARW, SRW, KDC, NEF, DCR and PEF; no other files use them.
RAW_COMPRESSIONS = frozenset({32767, 32770, 32867, 34713, 65000, 65535})
# Bytes behind the start that tell CR2 and IIQ files. Those left out differ from file to file.
RAW_MARKS = (
    {4: b"\x10\0\0\0CR\x02"},
    {8: b"IIII", 13: b"waR"},
    {8: b"MMMMRaw"},
)

# Types of values that hold numbers: BYTE, SHORT, LONG, IFD, LONG8, IFD8.
NUMBERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}

# Limits for hostile files. Real ones have under 100 tags and 20 inner images.
MAX_TAGS, MAX_VALUES, MAX_PAGES = 4096, 64, 256

FEW_PAGES = 4  # old raw files have few, and documents have many


class _Page(NamedTuple):
    """One image file directory: its offset, the values of :data:`TAGS`, the next one's offset."""

    offset: int
    values: dict[int, tuple[int, ...]]
    next: int

    @property
    def is_raw(self) -> bool:
        photometric, compression = self.values.get(PHOTOMETRIC), self.values.get(COMPRESSION)
        return bool(
            (photometric and photometric[0] in RAW_PHOTOMETRICS)
            or (compression and compression[0] in RAW_COMPRESSIONS)
        )

    @property
    def is_picture(self) -> bool:
        if kind := self.values.get(NEW_SUBFILE_TYPE):
            return not kind[0] & NO_PICTURE
        return self.values.get(SUBFILE_TYPE) != (OLD_REDUCED,)


def main_picture(file: IO[bytes]) -> int:
    """Return the offset of the directory of a TIFF's picture, 0 for the first one.

    Returns:
        :data:`RAW_FILE` if a camera's raw values are the picture.

    Raises:
        DecodeError: The file holds no more than a reduced image, a mask or a depth map.
    """
    file.seek(0)
    head = file.read(16)
    order, is_big = TIFF_STARTS[head[:4]]
    if any(all(head.startswith(mark[at], at) for at in mark) for mark in RAW_MARKS):
        return RAW_FILE
    start = _number(head[8:16] if is_big else head[4:8], order)
    first = _read_page(file, start, order, is_big)
    if first is None:
        return 0  # Pillow will say what is wrong
    is_plain = first.is_picture and SUB_IFDS not in first.values
    pages = _other_pages(file, first, order, is_big)
    others = list(itertools.islice(pages, FEW_PAGES if is_plain else MAX_PAGES))
    is_raw = any(page.is_raw for page in (first, *others) if page is not None)
    if is_raw or (DNG_VERSION in first.values and not first.is_picture):
        return RAW_FILE
    if first.is_picture:
        return 0
    for page in others:
        if page is not None and page.is_picture:
            return page.offset
    if None in others:
        raise DecodeError("truncated", "the file ends before the directory of its picture")
    raise DecodeError(
        "no-picture", "the file holds a reduced image only, such as a preview, and no picture"
    )


def _other_pages(file: IO[bytes], first: _Page, order: str, is_big: bool) -> Iterator[_Page | None]:
    """Yield the inner images of the first page, and the pages behind it with theirs.

    Yields None for a page that lies outside of the file.
    """
    seen = {first.offset}
    waiting = [*first.values.get(SUB_IFDS, ()), first.next]
    while waiting:
        offset = waiting.pop(0)
        if not offset or offset in seen:
            continue
        seen.add(offset)
        page = _read_page(file, offset, order, is_big)
        yield page
        if page is not None:
            waiting += [*page.values.get(SUB_IFDS, ()), page.next]


def _read_page(file: IO[bytes], offset: int, order: str, is_big: bool) -> _Page | None:
    """Return a directory, or None if it lies outside of the file."""
    entry_bytes, inline_bytes, count_bytes = (20, 8, 8) if is_big else (12, 4, 2)
    if offset >= 2**63:
        return None
    file.seek(offset)
    head = file.read(count_bytes)
    count = _number(head, order)
    if not count or count > MAX_TAGS:
        return None
    table = file.read(count * entry_bytes + inline_bytes)
    values: dict[int, tuple[int, ...]] = {}
    for start in range(0, min(len(table), count * entry_bytes) - entry_bytes + 1, entry_bytes):
        entry = table[start : start + entry_bytes]
        tag, kind = struct.unpack(order + "HH", entry[:4])
        if tag in TAGS and kind in NUMBERS:
            size = struct.calcsize(NUMBERS[kind])
            number = min(_number(entry[4:-inline_bytes], order), MAX_VALUES)
            content = entry[-inline_bytes:]
            if number * size > inline_bytes:
                position = _number(content, order)
                if position >= 2**63:
                    continue
                file.seek(position)
                content = file.read(number * size)
            number = min(number, len(content) // size)
            if number:
                values[tag] = struct.unpack_from(f"{order}{number}{NUMBERS[kind]}", content)
    return _Page(offset, values, _number(table[count * entry_bytes :], order))


def _number(content: bytes, order: str) -> int:
    return int.from_bytes(content, "little" if order == "<" else "big")


def open_at(file: IO[bytes], offset: int) -> IO[bytes]:
    """Return a view of a TIFF file whose first directory is the one at an offset."""
    file.seek(0)
    head = file.read(16)
    order, is_big = TIFF_STARTS[head[:4]]
    start, code = (8, "Q") if is_big else (4, "I")
    return io.BufferedReader(_Patched(file, start, struct.pack(order + code, offset)))


class _Patched(io.RawIOBase):
    """A file with a few bytes replaced, without a copy.

    Args:
        file: A file that can seek.
        start: Offset of the replaced bytes.
        patch: Bytes to read there instead.
    """

    def __init__(self, file: IO[bytes], start: int, patch: bytes) -> None:
        self._file = file
        self._start = start
        self._patch = patch
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_CUR:
            self._file.seek(self._position)
        self._position = self._file.seek(offset, whence)
        return self._position

    def fileno(self) -> int:
        return self._file.fileno()  # libtiff is told the offset, and does not read the head's

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._file.seek(self._position)
        content = bytearray(self._file.read(len(buffer)))
        for i, byte in enumerate(self._patch, self._start - self._position):
            if 0 <= i < len(content):
                content[i] = byte
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)
