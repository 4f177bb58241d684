"""What a program reads of a run: one JSON object a line on standard error (``--log-json``)."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from extractor.report import Progress, Report

__all__ = ["Events"]

PROGRESS_SECONDS = 10.0


class Events:
    """Writes events, once it is told to; before that, and without, it keeps silent.

    Each has ``time`` (ISO 8601, UTC) and ``event``: ``start``, ``progress``, ``warning``,
    ``output``, ``interrupted``, ``error`` or ``end``; the last of a run tells its ``exit_code``.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.wanted = False
        self._file: TextIO | None = None
        self._clock = clock
        self._told = -PROGRESS_SECONDS
        self._first: tuple[float, int] | None = None

    def write(self, event: str, **content: Any) -> None:
        """Write one event."""
        file = self._file or sys.stderr
        if not self.wanted or file is None:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "event": event, **content}, ensure_ascii=True)
        print(line, file=file, flush=True)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Have standard error to themselves: what libraries print there comes as an event, too.

        Some do so from C, such as libtiff of damaged files.
        """
        try:
            descriptor = sys.stderr.fileno() if self.wanted else -1
        except (AttributeError, OSError, ValueError):  # closed, or not a file
            descriptor = -1
        if descriptor < 0:
            yield
            return
        read, write = os.pipe()
        with os.fdopen(os.dup(descriptor), "w", encoding="ascii") as self._file:
            os.dup2(write, descriptor)
            os.close(write)
            reader = threading.Thread(target=self._tell, args=(read,), daemon=True)
            reader.start()
            try:
                yield
            finally:
                sys.stderr.flush()
                os.dup2(self._file.fileno(), descriptor)  # the last writer: the reader ends
                reader.join(1.0)
                self._file = None

    def _tell(self, descriptor: int) -> None:
        with os.fdopen(descriptor, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.strip():
                    self.write("output", message=line.rstrip("\n"))

    def start(self, images: int, models: list[str], version: str) -> None:
        """The images are listed, the models are loaded next."""
        where = {"host": socket.gethostname(), "process": os.getpid()}
        self.write("start", version=version, models=models, images=images, **where)

    def progress(self, progress: Progress) -> None:
        """How far the run is; at most every ten seconds, and at its end."""
        now = self._clock()
        self._first = self._first or (now, progress.done)
        if now - self._told < PROGRESS_SECONDS and progress.done < progress.total:
            return
        self._told = now
        begun, before = self._first
        rate = (progress.done - before) / max(now - begun, 1e-9)
        self.write(
            "progress",
            done=progress.done,
            total=progress.total,
            failed=progress.failed,
            images_per_second=round(rate, 2) if now > begun else None,
        )

    def warning(self, message: str) -> None:
        """Something that a person should know."""
        self.write("warning", message=message)

    def end(self, report: Report) -> None:
        """The run is done, and what is in the stores."""
        stores = [
            {
                "out": os.fspath(store.out),
                "rows": store.rows,
                "failures": store.failed,
                "added": store.added,
                "changed": store.changed,
                "gone": store.gone,
            }
            for store in report.stores
        ]
        self.write(
            "end",
            exit_code=report.exit_code,
            images=report.images,
            resumed=report.resumed,
            seconds=round(report.seconds, 3),
            stores=stores,
        )
