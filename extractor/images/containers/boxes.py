"""ISO base media files, such as HEIC: whether they are complete (ISO/IEC 14496-12)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import IO, NamedTuple

__all__ = ["ends_early"]

# Boxes that hold images and what belongs to them. Others may be rubbish behind the file.
KNOWN = frozenset({b"ftyp", b"meta", b"mdat", b"moov"})
MAX_BOXES = 10_000


class _Box(NamedTuple):
    """A box of the outermost level: its kind, and where it ends by its own account."""

    kind: bytes
    end: int


def ends_early(file: IO[bytes]) -> bool:
    """Return whether a file ends inside a box.

    Decoders find out where the first tile of an image lies behind the end. Other tiles they leave
    gray.
    """
    size = file.seek(0, os.SEEK_END)
    return any(box.end > size for box in _boxes(file, size) if box.kind in KNOWN)


def _boxes(file: IO[bytes], size: int) -> Iterator[_Box]:
    offset = 0
    for _ in range(MAX_BOXES):
        file.seek(offset)
        head = file.read(16)
        if len(head) < 8:
            return
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if length == 1:
            length = int.from_bytes(head[8:], "big")
        if length == 0:  # to the end of the file
            length = size - offset
        yield _Box(kind, offset + length)
        if length < 8 or offset + length > size:
            return
        offset += length
