"""What a person sees of the command: progress bar, warnings and printable text."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from extractor.errors import ExtractorError
from extractor.terminal.stderr import capture_stderr, duplicate_stderr
from extractor.text import plural

if TYPE_CHECKING:
    from extractor.report import Progress

__all__ = [
    "Bar",
    "OutputError",
    "logging_to",
    "one_line",
    "print_lines",
    "print_table",
    "printable",
    "say",
    "warn",
    "write_line",
]

LOADING = "loading the model ..."
CLEAR_LINE = "\r\033[K"
NAME_COLUMNS = 14  # width of the left column of a summary
MIN_COLUMNS = 40

# Damaged files can make a library print one line per strip or tag.
MAX_OUTPUT_LINES = 20


class OutputError(ExtractorError):
    """A result cannot be written to standard output."""


class Bar:
    """Progress bar on a terminal: images, images/s, time left and failures.

    Use it as a context manager. Nothing is shown if standard error is no terminal. While the bar
    is shown, what anything else prints on standard error appears above it.

    Args:
        quiet: Show nothing.
        status: Line that is shown before the bar.
        unit: What is counted: ``img``, with the failures, or another word.
    """

    def __init__(self, *, quiet: bool, status: str = LOADING, unit: str = "img") -> None:
        self._shown = not quiet and sys.stderr is not None and sys.stderr.isatty()
        self._first_status = status
        self._unit = unit
        self._lock = threading.RLock()
        self._stack = contextlib.ExitStack()
        self._terminal: TextIO | None = None
        self._bar: Any = None
        self._status = ""  # the line that stands where the bar will be
        self._output_lines = 0

    def __enter__(self) -> Bar:
        """Show the first status."""
        if self._shown:
            self._terminal = duplicate_stderr()
        if self._terminal is not None:
            self.show(self._first_status)
            self._stack.enter_context(capture_stderr(self._output))
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the bar and give standard error back."""
        self._stack.close()  # the last lines of libraries arrive here
        with self._lock:
            self._end_status()
            self._close_bar()
            if self._terminal is not None:
                self._terminal.close()
            self._terminal = None
        hidden = self._output_lines - MAX_OUTPUT_LINES
        if hidden > 0:
            say(f"extract: {plural(hidden, 'more message')} of libraries not shown")

    def update(self, progress: Progress) -> None:
        """Show how far the run is."""
        if self._terminal is None:
            return
        with self._lock:
            if self._bar is None:
                self._end_status()
                self._bar = _new_bar(self._terminal, progress, self._unit)
            if self._unit == "img":
                self._bar.set_postfix(failed=progress.failed, refresh=False)
            self._bar.update(progress.done - self._bar.n)

    def show(self, status: str) -> None:
        """Show a line in place of the bar, until the next update."""
        with self._lock:
            self._close_bar()
            self._end_status()
            self._status = status
            self._write(status)

    def follow(self, statuses: Mapping[str, str]) -> Callable[[str, int, int], None]:
        """Return a callback that takes a phase, what is done of it, and its total.

        Args:
            statuses: Lines for phases that are shown as such; any other phase moves the bar.
        """
        from extractor.report import Progress

        def show(phase: str, done: int, total: int) -> None:
            if phase in statuses:
                self.show(statuses[phase])
            else:
                self.update(Progress(done, total, 0))

        return show

    def warn(self, message: str) -> None:
        """Print a warning on standard error, above the bar."""
        self._print(f"extract: warning: {message}")

    def _output(self, line: str) -> None:
        """Print what a library printed, unless it prints too much."""
        self._output_lines += 1
        if self._output_lines <= MAX_OUTPUT_LINES:
            self._print(line)

    def _print(self, text: str) -> None:
        with self._lock:
            if self._terminal is None:
                say(text)
            elif self._bar is not None:
                self._bar.write(printable(text), file=self._terminal)
            else:
                self._write(f"{CLEAR_LINE}{printable(text)}\n{self._status}")

    def _end_status(self) -> None:
        if self._status:
            self._status = ""
            self._write(CLEAR_LINE)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _write(self, text: str) -> None:
        if self._terminal is not None:
            print(text, end="", file=self._terminal, flush=True)


def _new_bar(terminal: TextIO, progress: Progress, unit: str) -> Any:
    from tqdm import tqdm

    width = os.get_terminal_size(terminal.fileno()).columns
    return tqdm(
        total=progress.total,
        initial=progress.done,
        unit=unit,
        smoothing=0.1,
        dynamic_ncols=width > 0,
        ncols=None if width else 80,  # some terminals do not know their size
        nrows=None if width else 24,
        file=terminal,
    )


class _Handler(logging.Handler):
    def __init__(self, write: Callable[..., None], *, names_worker: bool) -> None:
        super().__init__(logging.WARNING)
        self._write = write
        self._names_worker = names_worker

    def emit(self, record: logging.LogRecord) -> None:
        if self._names_worker:
            self._write(record.getMessage(), worker=getattr(record, "worker", None))
        else:
            self._write(record.getMessage())


@contextmanager
def logging_to(write: Callable[..., None], *, names_worker: bool = False) -> Iterator[None]:
    """Pass the package's own warnings to a function; other libraries keep their logging.

    Args:
        write: Called with each warning.
        names_worker: Whether it is also called with the number of the ``worker`` that warns; None
            for the process itself.
    """
    logger = logging.getLogger("extractor")
    handler = _Handler(write, names_worker=names_worker)
    logger.addHandler(handler)
    propagated, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated


def print_table(rows: Sequence[tuple[str, str]]) -> None:
    """Print names and texts in two columns; on a terminal, wrap the texts to its width."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if is_terminal else None
    print_lines([line for name, text in rows for line in table_lines(name, text, width)])


def table_lines(name: str, text: str, width: int | None) -> list[str]:
    """Return one row of a table as lines of at most ``width`` characters; None does not wrap."""
    head = f"{name:{NAME_COLUMNS - 1}} "
    if width is None or len(head) + len(text) <= width:
        return [head + text]
    return textwrap.wrap(
        text,
        max(width, MIN_COLUMNS),
        initial_indent=head,
        subsequent_indent=" " * NAME_COLUMNS,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )


def print_lines(lines: Sequence[str]) -> None:
    """Print a result on standard output; a reader that has gone away is no error.

    Raises:
        OutputError: The result cannot be written, as on a full disk. What follows goes nowhere.
    """
    try:
        for line in lines:
            print(printable(line))
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise OutputError(f"cannot print the result: {error.strerror}") from error


def warn(message: str) -> None:
    """Print a warning on standard error."""
    say(f"extract: warning: {message}")


def say(text: str) -> None:
    """Print a line on standard error."""
    write_line(printable(text), sys.stderr)


def write_line(text: str, file: TextIO | None) -> None:
    """Write a line to a stream, if there is one; the rows are worth more than the line."""
    if file is None:
        return
    try:
        file.write(f"{text}\n")  # one call, so that lines of two threads do not mix
        file.flush()
    except OSError:  # closed pipe or full disk: later lines, and the last flush, go nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def one_line(text: str) -> str:
    """Return text that any terminal can show in one line, such as a file name with line breaks."""
    return printable(text).replace("\n", "\\n")


def printable(text: str) -> str:
    """Return text that any terminal can show; file names may hold control or invalid bytes."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
