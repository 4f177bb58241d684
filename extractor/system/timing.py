"""Where the time of a run goes: seconds per kind of work, and the bottleneck."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from extractor.text import plural

__all__ = ["KINDS", "Spent", "Timer"]

# `read` and `decode` are sums over all threads.
KINDS = ("read", "decode", "transfer", "model", "write", "idle")

# A larger trace would be too much for a viewer.
MAX_SPANS = 200_000

# Shorter runs say nothing about a rate.
MIN_SECONDS = 2.0

# Python's lock lets one thread at a time handle what surrounds decoding and forward passes, about
# 0.25 ms for an image: 4,000 images/s at most (estimated for 16 cores; 2,100 measured on two). So
# it is the bottleneck if a process comes near that, and neither the decoding threads nor the model
# are busy for more than this share of the time.
LOCK_RATE = 1500.0
BUSY_SHARE = 0.7


@dataclass(frozen=True)
class Spent:
    """Time that the computation of a run took, by kind of work.

    Attributes:
        images: Number of images that were decoded and embedded.
        threads: Number of decoding threads.
        cores: Number of cores that these threads could use.
        readers: Number of further threads that read files ahead.
        device: Type of the device that embedded: ``cpu``, ``cuda`` or ``mps``.
        decode: Value of the option, see :class:`extractor.options.Options`.
        seconds: Seconds per kind of work, see :data:`KINDS`. ``read`` is the time until the bytes
            of a file had arrived. ``decode`` is the processor time to decode and resize. Both are
            sums over all threads. ``transfer`` is the time to copy pixels to a GPU, ``model`` to
            embed, ``write`` to append rows, and ``idle`` to wait for decoded images.
        wall_seconds: Seconds that the computation took; 0 if that is not known. Where several
            processes computed, their sum, as all other seconds and the images.
        processes: Number of processes. ``threads``, ``cores`` and ``readers`` are those of one.
    """

    images: int
    threads: int
    cores: int
    readers: int
    device: str
    decode: str
    seconds: dict[str, float]
    wall_seconds: float = 0.0
    processes: int = 1

    def as_dict(self) -> dict[str, Any]:
        """Return the entry of ``run.json``."""
        seconds = {kind: round(value, 3) for kind, value in self.seconds.items()}
        return {"threads": self.threads, "readers": self.readers, **seconds}

    @property
    def bound(self) -> str:
        """Bottleneck of the run with advice, in one sentence; empty after too little work."""
        seconds = self.seconds
        busy = sum(seconds[kind] for kind in ("transfer", "model", "write", "idle"))
        if not self.images or busy < MIN_SECONDS or not seconds["model"]:
            return ""
        images = self.images * self.processes  # rates are those of all processes
        decode = _rate(images * min(self.threads, self.cores), seconds["decode"])
        read = _rate(images * (self.readers or self.threads), seconds["read"])
        model = _rate(images, seconds["model"] + seconds["transfer"])
        count = self.threads * self.processes
        threads = plural(count, "thread")
        if seconds["write"] > busy / 2:
            rate = _format_rate(_rate(images, seconds["write"]))
            return f"bound by writing: the disk takes {rate} rows/s; write to a faster disk"
        # Without readers the disk is quick, and the lock makes reading look slow: a thread that has
        # its bytes still has to wait for it.
        if self._waits_for_lock(self._without_waiting(decode, model, read)):
            handle = "one process handles" if self.processes == 1 else "the processes handle"
            done = _format_rate(_rate(images, self.wall_seconds))
            return (
                f"bound by Python's lock: {handle} {done} images/s, {threads} could decode "
                f"{_format_rate(decode)} and the model embed {_format_rate(model)}; use more "
                "--processes"
            )
        if read < min(decode, model):
            return (
                f"bound by reading: {_format_rate(read)} images/s come from the disk, the rest "
                f"could do {_format_rate(min(decode, model))}; read from a faster disk, or use "
                "more --workers"
            )
        if decode < model:
            verb = "decode" if count > 1 else "decodes"
            advice = "add cores" if self.threads >= self.cores else "use more --workers"
            if self.device == "cuda" and self.decode != "gpu":
                advice += " or the experimental --decode gpu"
            return (
                f"bound by decoding: {threads} {verb} {_format_rate(decode)} images/s, the model "
                f"could do {_format_rate(model)}; {advice}"
            )
        gpu = "a GPU" if self.device == "cpu" else "a faster GPU"
        return (
            f"bound by the model: it embeds {_format_rate(model)} images/s, {threads} could decode "
            f"{_format_rate(decode)}; try a smaller model or {gpu}"
        )

    def _without_waiting(self, decode: float, model: float, read: float) -> float:
        """Return the images/s if decoding threads, model and a slow disk wait for nothing else."""
        computed = 1 / (1 / decode + 1 / model) if self.device == "cpu" else min(decode, model)
        return min(computed, read) if self.readers else computed

    def _waits_for_lock(self, possible: float) -> bool:
        """Return whether the run is much slower than all its parts, and handles many images.

        Args:
            possible: Images/s of the slowest part.
        """
        if not self.wall_seconds:
            return False
        of_one = self.images / self.wall_seconds
        return of_one > LOCK_RATE and of_one * self.processes < BUSY_SHARE * possible


def _rate(images: int, seconds: float) -> float:
    return images / max(seconds, 1e-9)


def _format_rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"


class Timer:
    """Sum of the time of all threads by kind of work.

    Args:
        trace: Keep the first 200,000 spans for :meth:`chrome_trace`.
    """

    def __init__(self, *, trace: bool = False) -> None:
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self._lock = threading.Lock()
        self._spans: list[tuple[str, int, float, float]] | None = [] if trace else None
        self._names: dict[int, str] = {}
        self._begun = time.perf_counter()

    @contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """Add the time that the block takes."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.add(kind, begun, time.perf_counter() - begun)

    def add(self, kind: str, begun: float, lasted: float, *, counted: float | None = None) -> None:
        """Add a span of work of the current thread.

        Args:
            kind: Kind of work, one of :data:`KINDS`.
            begun: Value of ``time.perf_counter()`` at its start.
            lasted: Length of the span in seconds.
            counted: Seconds to add to the sum; None adds all of ``lasted``.
        """
        with self._lock:
            self.seconds[kind] += lasted if counted is None else counted
            if self._spans is not None and len(self._spans) < MAX_SPANS:
                thread = threading.get_ident()
                self._names.setdefault(thread, threading.current_thread().name)
                self._spans.append((kind, thread, begun - self._begun, lasted))

    def chrome_trace(self) -> str:
        """Return the spans as JSON for chrome://tracing or Perfetto, in microseconds."""
        with self._lock:
            spans, names = list(self._spans or ()), dict(self._names)
        numbers = {thread: number for number, thread in enumerate(names, 1)}
        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": number, "args": {"name": name}}
            for name, number in ((names[thread], numbers[thread]) for thread in names)
        ]
        events += [
            {
                "ph": "X",
                "name": kind,
                "pid": 1,
                "tid": numbers[thread],
                "ts": round(begun * 1e6, 1),
                "dur": round(lasted * 1e6, 1),
            }
            for kind, thread, begun, lasted in spans
        ]
        return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
