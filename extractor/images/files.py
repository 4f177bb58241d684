"""Reading image files: regular files only, with their size, time and digest."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator
from typing import IO

from PIL import Image

from extractor.errors import DecodeError
from extractor.images.types import FilePath, ReadFile
from extractor.system.hashing import hash_file

__all__ = [
    "READ_WHOLE_BYTES",
    "as_decode_errors",
    "digest_of",
    "open_regular",
    "read_file",
    "size_and_mtime",
    "with_file_status",
]

# Pillow reads larger files piece by piece, instead of from memory.
READ_WHOLE_BYTES = 64 * 2**20

# Range of the integers that the index stores.
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

# Phrases with which decoders report a file that ends too early.
_ENDS_EARLY = re.compile("trunca|not enough", re.IGNORECASE)


def read_file(path: FilePath, max_bytes: int = READ_WHOLE_BYTES) -> ReadFile | FilePath:
    """Return the content of an image file, or the path itself if the file is larger.

    Raises:
        DecodeError: The file cannot be read.
    """
    with with_file_status(path), as_decode_errors(), open_regular(path) as file:
        status = os.fstat(file.fileno())
        if status.st_size > min(max_bytes, READ_WHOLE_BYTES):
            return path
        return ReadFile(path, file.read(), *size_and_mtime(status))


def size_and_mtime(status: os.stat_result) -> tuple[int, int]:
    """Return size and modification time of a file as they are stored and compared.

    File systems know dates that nanoseconds in 64 bits do not reach, before 1678 and after 2262.
    These become the nearest time that can be stored.

    Returns:
        Bytes, 0 or more, and nanoseconds since 1970, both within int64.
    """
    size = min(max(status.st_size, 0), INT64_MAX)
    return size, min(max(status.st_mtime_ns, INT64_MIN), INT64_MAX)


def open_regular(path: FilePath) -> IO[bytes]:
    """Open a regular file. Refuse a pipe, a device or a folder without waiting for it.

    Raises:
        DecodeError: The path leads to something else, or cannot be a path.
        OSError: The file cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError as error:  # no path can hold a zero byte
        raise DecodeError("unreadable", str(error)) from error
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        kind = _kind(os.stat(path).st_mode)
        raise DecodeError("not-a-file", f"expected a regular file, got {kind}") from error
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise DecodeError("not-a-file", f"expected a regular file, got {_kind(mode)}")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")


def digest_of(path: FilePath) -> bytes:
    """Return the SHA-256 of a regular file, or no bytes if it cannot be read."""
    try:
        with open_regular(path) as file:
            return hash_file(file)[0]
    except (OSError, DecodeError):
        return b""


@contextlib.contextmanager
def with_file_status(path: FilePath) -> Iterator[None]:
    """Add the size and the time of a file to a ``DecodeError`` of the block."""
    try:
        yield
    except DecodeError as error:
        with contextlib.suppress(OSError, ValueError):
            error.size, error.mtime_ns = size_and_mtime(os.stat(path))
        raise


@contextlib.contextmanager
def as_decode_errors() -> Iterator[None]:
    """Turn any error of the block into a ``DecodeError`` with a documented reason."""
    try:
        yield
    except DecodeError:
        raise
    except OSError as error:
        if error.errno is not None:
            raise DecodeError("unreadable", error.strerror or str(error)) from error
        reason = "truncated" if _ENDS_EARLY.search(str(error)) else "corrupt"
        raise DecodeError(reason, str(error)) from error
    except Image.DecompressionBombError as error:
        raise DecodeError("too-large", str(error)) from error
    except MemoryError as error:
        raise DecodeError("out-of-memory", "the decoded image does not fit in memory") from error
    except Exception as error:  # decoders meet hostile bytes and raise whatever they like
        raise DecodeError("corrupt", f"{type(error).__name__}: {error}") from error
