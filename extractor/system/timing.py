"""Where the time of a run goes: seconds for each kind of work, and what bounds the rate."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["KINDS", "Spent", "Timer"]

# Of these, `read` and `decode` are summed over all threads that do them.
KINDS = ("read", "decode", "transfer", "model", "write", "idle")

# A trace of more would be too large for a viewer.
MAX_SPANS = 200_000

# Runs that take less tell nothing of a rate.
LEAST_SECONDS = 2.0


@dataclass(frozen=True)
class Spent:
    """What the computation of a run spent its time on.

    Attributes:
        images: that were decoded and computed.
        threads: that decoded.
        cores: that they had.
        readers: further threads that read files ahead for them.
        device: that computed: ``cpu``, ``cuda`` or ``mps``.
        decode: the option, see :class:`extractor.options.Options`.
        seconds: by kind of work (:data:`KINDS`). ``read``: until the bytes of a file were there;
            ``decode``: to decode and resize, as processor time; both over all threads.
            ``transfer``: to bring pixels to a GPU; ``model``: to embed; ``write``: to append rows;
            ``idle``: waiting for decoded images, when the model had nothing to do.
    """

    images: int
    threads: int
    cores: int
    readers: int
    device: str
    decode: str
    seconds: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """What ``run.json`` says of it."""
        seconds = {kind: round(value, 3) for kind, value in self.seconds.items()}
        return {"threads": self.threads, "readers": self.readers, **seconds}

    @property
    def bound(self) -> str:
        """What bounds the rate, in a sentence; empty where too little was done to tell."""
        seconds = self.seconds
        busy = sum(seconds[kind] for kind in ("transfer", "model", "write", "idle"))
        if not self.images or busy < LEAST_SECONDS or not seconds["model"]:
            return ""
        decode = _rate(self.images * min(self.threads, self.cores), seconds["decode"])
        read = _rate(self.images * (self.readers or self.threads), seconds["read"])
        model = _rate(self.images, seconds["model"] + seconds["transfer"])
        threads = f"{self.threads} threads" if self.threads > 1 else "1 thread"
        if seconds["write"] > busy / 2:
            rate = _told(_rate(self.images, seconds["write"]))
            return f"bound by writing: the disk takes {rate} rows/s; write to a faster one"
        if read < min(decode, model):
            return (
                f"bound by reading: {_told(read)} images/s come from the disk, the rest could do "
                f"{_told(min(decode, model))}; read from a faster disk, or with more --workers"
            )
        if decode < model:
            verb = "decode" if self.threads > 1 else "decodes"
            advice = "add cores" if self.threads >= self.cores else "use more --workers"
            if self.device == "cuda" and self.decode != "gpu":
                advice += " or --decode gpu"
            return (
                f"bound by decoding: {threads} {verb} {_told(decode)} images/s, the model could do "
                f"{_told(model)}; {advice}"
            )
        gpu = "a GPU" if self.device == "cpu" else "a faster GPU"
        return (
            f"bound by the model: it embeds {_told(model)} images/s, {threads} could decode "
            f"{_told(decode)}; a smaller one or {gpu} would be faster"
        )


def _rate(images: int, seconds: float) -> float:
    return images / max(seconds, 1e-9)


def _told(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"


class Timer:
    """Sums the time of all threads by kind of work.

    Args:
        trace: keep the first spans, too.
    """

    def __init__(self, *, trace: bool = False) -> None:
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self._lock = threading.Lock()
        self._spans: list[tuple[str, int, float, float]] | None = [] if trace else None
        self._names: dict[int, str] = {}
        self._begun = time.perf_counter()

    @contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """Count the time of a block."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.add(kind, begun, time.perf_counter() - begun)

    def add(self, kind: str, begun: float, lasted: float, *, counted: float | None = None) -> None:
        """Count some work of this thread.

        Args:
            begun: by ``time.perf_counter()``.
            lasted: seconds.
            counted: the seconds that count, where that is not all of them.
        """
        with self._lock:
            self.seconds[kind] += lasted if counted is None else counted
            if self._spans is not None and len(self._spans) < MAX_SPANS:
                thread = threading.get_ident()
                self._names.setdefault(thread, threading.current_thread().name)
                self._spans.append((kind, thread, begun - self._begun, lasted))

    def chrome_trace(self) -> str:
        """The spans as JSON for chrome://tracing or Perfetto; times in microseconds."""
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
