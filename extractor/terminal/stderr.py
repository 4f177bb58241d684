"""Standard error while the progress bar or the JSON log owns it."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TextIO

__all__ = ["capture_stderr", "duplicate_stderr"]

PIPE_BYTES = 2**20
F_SETPIPE_SZ = 1031  # linux/fcntl.h; in Python's fcntl since 3.10, on Linux only
JOIN_SECONDS = 1.0


def duplicate_stderr() -> TextIO | None:
    """Return a new file that writes to standard error, even while that is captured.

    None if standard error is closed or is not a file.
    """
    try:
        copy = os.dup(sys.stderr.fileno())
    except (AttributeError, OSError, ValueError):
        return None
    return os.fdopen(copy, "w", encoding="utf-8", errors="backslashreplace")


@contextlib.contextmanager
def capture_stderr(on_line: Callable[[str], None]) -> Iterator[None]:
    """Pass on each line that is written to standard error, by Python or by a C library.

    C libraries print to file descriptor 2. libtiff, for example, does so for damaged files. Such a
    line would tear a progress bar or a JSON log apart.

    Args:
        on_line: Called with each line, in another thread. It must not write to standard error, but
            to a file of :func:`duplicate_stderr`.
    """
    descriptor = sys.stderr.fileno()
    original = os.dup(descriptor)
    read, write = os.pipe()
    # A library that prints while it holds Python's lock must not wait for the reader, which needs
    # the lock. What does not fit into the pipe is dropped.
    os.set_blocking(write, False)
    _enlarge(write)
    sys.stderr.flush()
    os.dup2(write, descriptor)
    os.close(write)
    reader = threading.Thread(target=_pass_on, args=(read, on_line), daemon=True)
    reader.start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os.dup2(original, descriptor)  # closes the last writer, which ends the reader
        os.close(original)
        reader.join(JOIN_SECONDS)


def _enlarge(descriptor: int) -> None:
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        fcntl.fcntl(descriptor, F_SETPIPE_SZ, PIPE_BYTES)


def _pass_on(descriptor: int, on_line: Callable[[str], None]) -> None:
    with os.fdopen(descriptor, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.strip():
                on_line(line.rstrip())
