"""One thread that computes for all callers, and may gather their images into one batch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from extractor.errors import UsageError
from extractor.system.cpu import set_threads_of_this_thread

__all__ = ["Calls", "GatherOptions", "ModelThread", "Request"]

# Time that a thread gets to finish what it has when it is closed.
PATIENCE_SECONDS = 2.0

Pictures: TypeAlias = tuple[npt.NDArray[np.uint8], ...]
Rows: TypeAlias = npt.NDArray[np.float32]


class Calls:
    """Counts the calls that will still hand pictures to the model."""

    def __init__(self) -> None:
        self._count = 0
        self._lock = threading.Lock()

    @property
    def in_progress(self) -> int:
        """Number of calls that have not handed over all their pictures."""
        return self._count

    def enter(self) -> None:
        """Count a call that began."""
        with self._lock:
            self._count += 1

    def leave(self) -> None:
        """Count a call that will hand over no more pictures."""
        with self._lock:
            self._count -= 1


@dataclass(frozen=True)
class GatherOptions:
    """How the thread gathers requests.

    Attributes:
        max_images: Number of images in one forward pass; a larger request is computed alone.
        window_seconds: Time to wait for requests of other calls; None computes each request alone.
    """

    max_images: int
    window_seconds: float | None = None


@dataclass(frozen=True)
class Request:
    """Pictures to embed, and the rows that will come of them.

    Attributes:
        pictures: For each transform ``(N, H, W, 3)`` uint8.
        rows: Future of ``(N, *shape)`` float32.
    """

    pictures: Pictures
    rows: Future[Rows] = field(default_factory=Future)

    def __len__(self) -> int:
        return len(self.pictures[0])


class ModelThread:
    """Computes requests in the order of their arrival, in a thread of its own.

    torch keeps one team of threads for each thread that computes. A single computing thread
    therefore uses the cores once, however many callers there are.

    Args:
        compute: Returns the rows of pictures.
        threads: Number of torch's threads; None for torch's own number.
        options: How requests are gathered.
        calls: Calls in progress: without any, no request is waited for.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[npt.NDArray[np.uint8]]], Rows],
        threads: int | None,
        options: GatherOptions,
        calls: Calls,
    ) -> None:
        self._requests: SimpleQueue[Request | None] = SimpleQueue()
        self._lock = threading.RLock()  # the garbage collector may close the thread anywhere
        self._is_closed = False
        loop = _Loop(self._requests, compute, options, calls)
        ready = threading.Event()
        self._thread = threading.Thread(
            target=loop.run, args=(threads, ready), name="extractor-model", daemon=True
        )
        self._thread.start()
        ready.wait()

    def submit(self, pictures: Pictures) -> Future[Rows]:
        """Hand over pictures, and return the future of their rows.

        Raises:
            UsageError: The thread was closed.
        """
        request = Request(pictures)
        with self._lock:  # nothing may follow the end mark
            if self._is_closed:
                raise UsageError("this Extractor is closed; make a new one")
            self._requests.put(request)
        return request.rows

    def close(self) -> None:
        """End the thread after the requests that it has, and wait for it for a while.

        A thread that still runs when the interpreter ends may take the process down with it.
        """
        with self._lock:
            self._is_closed = True
            self._requests.put(None)
        if self._thread is not threading.current_thread():  # the garbage collector runs anywhere
            self._thread.join(PATIENCE_SECONDS)


class _Loop:
    """The work of the thread. It holds no reference to the Extractor, which may be collected."""

    def __init__(
        self,
        requests: SimpleQueue[Request | None],
        compute: Callable[[Sequence[npt.NDArray[np.uint8]]], Rows],
        options: GatherOptions,
        calls: Calls,
    ) -> None:
        self._requests = requests
        self._compute = compute
        self._options = options
        self._calls = calls

    def run(self, threads: int | None, ready: threading.Event) -> None:
        """Compute requests until None arrives."""
        set_threads_of_this_thread(threads)
        ready.set()
        request = self._requests.get()
        while request is not None:
            group, request = self._gather(request)
            self._answer(group)
            del group  # its arrays; the next request may be long in coming
            if request is None:
                request = self._requests.get()

    def _gather(self, first: Request) -> tuple[list[Request], Request | None]:
        """Return requests for one pass, and the one after them if it is known."""
        group, images = [first], len(first)
        window = self._options.window_seconds
        if window is None:
            return group, None
        deadline = time.monotonic() + window
        while images < self._options.max_images:
            # Without another call in progress, there is nobody to wait for.
            seconds = max(deadline - time.monotonic(), 0.0) if self._calls.in_progress else 0.0
            try:
                request = self._requests.get(timeout=seconds)
            except Empty:
                break
            if request is None:
                self._requests.put(None)  # after this group
                break
            if images + len(request) > self._options.max_images:
                return group, request
            group.append(request)
            images += len(request)
        return group, None

    def _answer(self, group: Sequence[Request]) -> None:
        wanted = [request for request in group if request.rows.set_running_or_notify_cancel()]
        if not wanted:
            return
        try:
            pictures = [
                arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
                for arrays in zip(*(request.pictures for request in wanted), strict=True)
            ]
            rows = self._compute(pictures)
        except BaseException as error:
            for request in wanted:
                request.rows.set_exception(error)
            return
        start = 0
        for request in wanted:
            own = rows[start : start + len(request)]
            # A view would keep the rows of all callers in memory.
            request.rows.set_result(own if len(wanted) == 1 else own.copy())
            start += len(request)
