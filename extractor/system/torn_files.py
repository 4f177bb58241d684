"""Weights files of which a part is missing: what a broken download or a full disk leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["torn_safetensors"]

# What disks and downloads write at once: a file that was cut is whole up to a multiple of this.
PAGE_BYTES = 4096
# Width of the widest number in weights: its last bytes may be zero themselves.
NUMBER_BYTES = 8
BLOCK_BYTES = 2**20
# The format allows no longer header.
MAX_HEADER_BYTES = 100_000_000


def torn_safetensors(path: Path) -> str:
    """Return what is wrong with the size of a safetensors file; empty if it looks whole.

    Its header states the size of the file. A tail of zeros that starts inside a tensor, at the
    border of a page, was never written: downloads and file systems reserve space in advance.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 + header_bytes:
            if header_bytes > MAX_HEADER_BYTES:
                return ""
            return (
                f"it is truncated, its header alone takes {8 + header_bytes:,} bytes and the file "
                f"has {size:,}"
            )
        try:
            spans = _spans(json.loads(file.read(header_bytes)), 8 + header_bytes)
        except (ValueError, KeyError, TypeError, AttributeError):
            return ""  # the reader says what is wrong
    expected = max((end for _, end in spans), default=8 + header_bytes)
    if size < expected:
        return f"it is truncated, its header describes {expected:,} bytes and the file has {size:,}"
    if size > expected:
        return f"{size - expected:,} bytes follow the {expected:,} that its header describes"
    zeros = _zeros_at_end(path, size)
    page = -(-(size - zeros) // PAGE_BYTES) * PAGE_BYTES
    is_cut = page - (size - zeros) < NUMBER_BYTES and size - page >= PAGE_BYTES
    if is_cut and any(start < size - zeros and page < end for start, end in spans):
        return f"its last {size - page:,} bytes are zero, they were never written"
    return ""


def _spans(header: dict[str, Any], offset: int) -> list[tuple[int, int]]:
    """Return the bytes of the file that each tensor takes."""
    tensors = (entry for name, entry in header.items() if name != "__metadata__")
    offsets = (entry["data_offsets"] for entry in tensors)
    return [(offset + int(start), offset + int(end)) for start, end in offsets]


def _zeros_at_end(path: Path, size: int) -> int:
    """Return how many zero bytes end a file."""
    end = size
    with path.open("rb") as file:
        while end:
            start = max(0, end - BLOCK_BYTES)
            file.seek(start)
            block = file.read(end - start)
            if left := block.rstrip(b"\0"):
                return size - (start + len(left))
            end = start
    return size
