"""Paths of the images that are being decoded, kept in a file that outlives a crash.

A decoder that crashes the process cannot say which image it was. So each decoding thread notes its
image in a file that is mapped into memory. The next run reads the paths there, and decodes these
images in a process of their own.
"""

from __future__ import annotations

import mmap
from pathlib import Path

from extractor.errors import StoreError

__all__ = ["CrashLog"]

SLOT_BYTES = 8192  # a length of two bytes and a path; Linux limits paths to 4095 bytes
LENGTH_BYTES = 2


class CrashLog:
    """File in which each thread notes the path of the image that it is decoding.

    Use it as a context manager. Leaving it removes the file; only a process that dies leaves the
    file behind.

    Args:
        path: File to create.
        slots: Number of images that can be noted at the same time.

    Raises:
        StoreError: The file cannot be written. Raised on entering.
    """

    def __init__(self, path: Path, slots: int) -> None:
        self._path = path
        self._slots = slots

    def __enter__(self) -> CrashLog:
        """Create the file."""
        size = self._slots * SLOT_BYTES
        try:
            with self._path.open("w+b") as file:
                # Write the zeros instead of extending the file: on a full disk, the first access to
                # an unwritten page would kill the process.
                file.write(bytes(size))
                file.flush()
                self._map = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise StoreError(f"cannot write {self._path}: {error.strerror or error}") from error
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)
        # Keep the map open: an abandoned thread may still note something.

    def note(self, slot: int, path: bytes) -> None:
        """Note a path in a slot. ``b""`` clears it."""
        if slot >= self._slots or len(path) > SLOT_BYTES - LENGTH_BYTES:
            return
        start = slot * SLOT_BYTES
        # The length becomes valid last, so a crash in between leaves no torn path.
        self._map[start : start + LENGTH_BYTES] = bytes(LENGTH_BYTES)
        self._map[start + LENGTH_BYTES : start + LENGTH_BYTES + len(path)] = path
        self._map[start : start + LENGTH_BYTES] = len(path).to_bytes(LENGTH_BYTES, "little")

    @staticmethod
    def read(path: Path) -> list[bytes]:
        """Return the sorted paths that a process left when it died, or [] if it did not die."""
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return []
        paths = set()
        for start in range(0, len(content), SLOT_BYTES):
            slot = content[start : start + SLOT_BYTES]
            length = int.from_bytes(slot[:LENGTH_BYTES], "little")
            paths.add(slot[LENGTH_BYTES : LENGTH_BYTES + length])
        return sorted(paths - {b""})
