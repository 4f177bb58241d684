"""Files that appear complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from extractor.errors import StoreError

__all__ = [
    "NOT_SUPPORTED",
    "PARTIAL",
    "ignore_signals",
    "store_errors",
    "sync",
    "sync_folder",
    "write_atomically",
]

log = logging.getLogger(__name__)

# Errors of file systems that do not support fsync, or locks.
NOT_SUPPORTED = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})

# Ends the name of a file that is being written.
PARTIAL = ".partial"

# Signals that end a run.
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that its name never refers to half of it, even after a power cut."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            sync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync(descriptor: int) -> None:
    """Bring an open file to the disk; where the file system cannot, warn once and go on.

    Without fsync a killed process still loses nothing, but a power cut may cost data.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        _warn_about_sync(error.strerror or "")


@functools.cache
def _warn_about_sync(reason: str) -> None:
    log.warning("the file system does not support fsync (%s); a power cut may cost data", reason)


@contextlib.contextmanager
def ignore_signals() -> Iterator[None]:
    """Ignore signals that would end the run, while it can only succeed.

    Python delivers signals to the main thread only, so other threads have nothing to ignore.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = [(number, signal.signal(number, signal.SIG_IGN)) for number in _ENDING]
    try:
        yield
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)


@contextlib.contextmanager
def store_errors(out: Path) -> Iterator[None]:
    """Turn an :class:`OSError` into a :class:`StoreError` that names the store."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"cannot write the store {out}: {error.strerror or error}"
            f"{f' ({error.filename})' if error.filename else ''}; nothing already saved is lost"
        ) from error
