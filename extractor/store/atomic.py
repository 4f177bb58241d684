"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from extractor.store.format import FileEntry

__all__ = ["NOT_SUPPORTED", "describe", "sync", "sync_folder", "undisturbed", "write_whole"]

log = logging.getLogger(__name__)

# What file systems answer that know no fsync, or no locks.
NOT_SUPPORTED = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that its name never stands for half of it, even after a power cut."""
    beside = path.with_name(path.name + ".partial")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        sync(file.fileno())
    os.replace(beside, path)


def sync_folder(path: Path) -> None:
    """Make the names in a folder last."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync(descriptor: int) -> None:
    """Bring an open file to the disk; where no file system does that, say so once and go on.

    A killed process loses nothing there either, but a power cut may.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        _warn_of_no_sync(error.strerror or "")


@functools.cache
def _warn_of_no_sync(why: str) -> None:
    log.warning("files cannot be brought to the disk there (%s); mind power cuts", why)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Let no signal that ends a run in between; for the moments in which it can only succeed.

    Signals reach the main thread alone, so elsewhere there is nothing to hold off.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [(number, signal.signal(number, signal.SIG_IGN)) for number in _ENDING]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)


def describe(path: Path, name: str) -> FileEntry:
    """Size and SHA-256 of a file, under its name in the store."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
            size += len(block)
    return FileEntry(name, size, digest.hexdigest())
