"""Clock that stops while the process is stopped: by Ctrl-Z, a batch scheduler or a laptop's lid.

No clock of the operating system does that on every system. This one adds up the time between two
looks at it, and takes a long gap for a stop. Whoever waits for a time limit looks at it often.
"""

from __future__ import annotations

import threading
import time

__all__ = ["LOOK_SECONDS", "running_seconds"]

LOOK_SECONDS = 0.25  # longest time that a waiting thread lets pass between two looks
MAX_GAP_SECONDS = 1.0  # counts of a longer gap; a busy machine delays a look by less


class _RunningClock:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = self._seconds = time.monotonic()

    def seconds(self) -> float:
        with self._lock:
            now = time.monotonic()
            self._seconds += min(max(now - self._last, 0.0), MAX_GAP_SECONDS)
            self._last = now
            return self._seconds


_clock = _RunningClock()


def running_seconds() -> float:
    """Return the seconds during which this process could run, from an arbitrary start.

    Of each time in which no thread looked at the clock, at most :data:`MAX_GAP_SECONDS` count.
    """
    return _clock.seconds()
