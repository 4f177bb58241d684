"""Progress for programs: one JSON object per line on standard error (``--log-json``)."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TextIO

from extractor.terminal.console import write_line
from extractor.terminal.stderr import capture_stderr, duplicate_stderr

if TYPE_CHECKING:
    from extractor.report import Progress, Report

__all__ = ["Events"]

PROGRESS_SECONDS = 10.0
PATHS_PER_EVENT = 1000  # of files that are left out; there may be millions


class Events:
    """Writer of events.

    Each event has ``time`` (ISO 8601, UTC) and ``event``: ``skipped``, ``excluded``, ``start``,
    ``progress``, ``shard``, ``warning``, ``output``, ``interrupted``, ``error`` or ``end``. The
    last event has the ``exit_code``.

    Args:
        clock: Returns the time in seconds; tests give their own.

    Attributes:
        wanted: Whether to write events; nothing is written before this is set.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.wanted = False
        self._file: TextIO | None = None
        self._clock = clock
        self._last = -PROGRESS_SECONDS
        self._phase = ""
        self._first: tuple[float, int] | None = None
        self._left_out: dict[str, list[str]] = {}
        self._writing = threading.RLock()  # threads decode, and one reads what libraries print

    def write(self, event: str, **content: Any) -> None:
        """Write one event, after the paths that wait to be written."""
        with self._writing:
            for verb, paths in self._left_out.items():
                self._write(verb, {"paths": paths})
            self._left_out = {}
            self._write(event, content)

    def _write(self, event: str, content: Mapping[str, Any]) -> None:
        file = self._file or sys.stderr
        if not self.wanted or file is None:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "event": event, **content}, ensure_ascii=True)
        write_line(line, file)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Own standard error, if events are wanted; lines of others become ``output`` events."""
        if not self.wanted:
            yield
            return
        with contextlib.ExitStack() as stack:
            self._file = duplicate_stderr()
            if self._file is not None:
                stack.enter_context(self._file)
                stack.callback(setattr, self, "_file", None)
                stack.enter_context(capture_stderr(lambda line: self.write("output", message=line)))
            yield

    def left_out(self, path: bytes, verb: str) -> None:
        """Write the path of a file that the run leaves out, together with others.

        Args:
            path: Path relative to the root of the images.
            verb: ``skipped`` or ``excluded``.
        """
        paths = self._left_out.setdefault(verb, [])
        paths.append(os.fsdecode(path))
        if len(paths) == PATHS_PER_EVENT:
            self._write(verb, {"paths": self._left_out.pop(verb)})

    def start(self, images: int | None, models: list[str], version: str) -> None:
        """Write that the images are listed and the models are loaded next.

        Args:
            images: Number of images; None for a part of a run, which does not know it yet.
            models: Names of the models.
            version: Version of this program.
        """
        process = {"host": socket.gethostname(), "process": os.getpid()}
        self.write("start", version=version, models=models, images=images, **process)

    def progress(self, progress: Progress) -> None:
        """Write how far the run is: when a phase begins, every ten seconds, and at the end."""
        if progress.shard is not None:
            self.write("shard", shard=progress.shard, worker=progress.worker, done=progress.done)
            return
        now = self._clock()
        is_over = progress.done >= progress.total
        is_new = progress.phase != self._phase
        if not (is_new or is_over or now - self._last >= PROGRESS_SECONDS):
            return
        self._last, self._phase = now, progress.phase
        self.write(
            "progress",
            phase=progress.phase,
            done=progress.done,
            total=progress.total,
            failed=progress.failed,
            images_per_second=self._rate(now, progress),
        )

    def _rate(self, now: float, progress: Progress) -> float | None:
        """Return the images per second since the computation began; None before it is known."""
        if progress.phase != "computing":
            return None
        self._first = self._first or (now, progress.done)
        started, done_before = self._first
        return round((progress.done - done_before) / (now - started), 2) if now > started else None

    def warning(self, message: str, worker: int | None = None) -> None:
        """Write a warning, with the number of the worker process that it comes from."""
        self.write("warning", message=message, **({} if worker is None else {"worker": worker}))

    def end(self, report: Report) -> None:
        """Write the exit code and the counts of each store."""
        stores = [{"out": os.fspath(store.out), **store.counts} for store in report.stores]
        names = ("part", "shards", "missing_shards")
        part = {name: getattr(report, name) for name in names} if report.part else {}
        self.write(
            "end",
            exit_code=report.exit_code,
            images=report.images,
            resumed=report.resumed,
            skipped=dict(report.skipped),
            excluded=dict(report.excluded),
            unlisted=len(report.unlisted),
            seconds=round(report.seconds, 3),
            workers=[worker.as_dict() for worker in report.workers],
            stores=stores,
            **part,
        )
