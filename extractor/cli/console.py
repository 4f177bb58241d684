"""What a person sees of the command: the bar, warnings, and text that any terminal takes."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from extractor.report import Progress

__all__ = ["Bar", "logging_to", "print_lines", "printable", "say", "warn"]


class Bar:
    """A tqdm bar on stderr: images, images/s, time left, failures; nothing without a terminal."""

    def __init__(self, *, quiet: bool) -> None:
        self._shown = not quiet and sys.stderr is not None and sys.stderr.isatty()
        self._bar: Any = None

    def __enter__(self) -> Bar:
        if self._shown:
            print("loading the model ...", end="", file=sys.stderr, flush=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        else:
            self._clear()

    def update(self, progress: Progress) -> None:
        if not self._shown:
            return
        if self._bar is None:
            from tqdm import tqdm

            width = os.get_terminal_size(sys.stderr.fileno()).columns
            self._clear()
            self._bar = tqdm(
                total=progress.total,
                initial=progress.done,
                unit="img",
                smoothing=0.1,
                dynamic_ncols=width > 0,
                ncols=None if width else 80,  # some terminals do not know their size
                nrows=None if width else 24,
            )
        self._bar.set_postfix(failed=progress.failed, refresh=False)
        self._bar.update(progress.done - self._bar.n)

    def warn(self, message: str) -> None:
        """Print a warning on stderr above the bar."""
        text = f"extract: warning: {message}"
        if self._bar is not None:
            self._bar.write(printable(text), file=sys.stderr)
        else:
            self._clear()
            say(text)

    def _clear(self) -> None:
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


class _Handler(logging.Handler):
    def __init__(self, write: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        self._write(record.getMessage())


@contextmanager
def logging_to(write: Callable[[str], None]) -> Iterator[None]:
    """Show the package's own warnings; what other libraries log is theirs."""
    logger = logging.getLogger("extractor")
    handler = _Handler(write)
    logger.addHandler(handler)
    propagated, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated


def print_lines(lines: Sequence[str]) -> None:
    """Print a result on standard output; who no longer reads it has what he wanted."""
    try:
        for line in lines:
            print(printable(line))
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            say(f"extract: cannot print the result: {error.strerror}")


def warn(message: str) -> None:
    """Print a warning on standard error."""
    say(f"extract: warning: {message}")


def say(text: str) -> None:
    """Print a line on standard error."""
    print(printable(text), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Text that any terminal takes: names of files may hold bytes that are no characters."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
