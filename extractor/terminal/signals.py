"""Signals that end a run: Ctrl-C, SIGTERM, and the SIGUSR1 that schedulers send in advance."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["EndedError", "Stopping"]

# The current batch may take this long to finish; schedulers often grant 10 or 30 seconds.
GRACE_SECONDS = 4.0

NAMES = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "terminated",
    signal.SIGUSR1: "stopped by SIGUSR1",
}


class EndedError(BaseException):
    """A signal ends the process now; like KeyboardInterrupt, this is no error of the program."""


class Stopping:
    """Signal handler that asks the run to stop on the first signal and ends it on the second.

    The first signal ends the run at once unless :attr:`graceful` is set. A batch that takes longer
    than :data:`GRACE_SECONDS` to finish is given up.

    Attributes:
        graceful: Whether a batch is being computed that is worth finishing.
        number: Number of the first signal; None before it.
    """

    def __init__(self) -> None:
        self.graceful = False
        self.number: int | None = None

    def __call__(self) -> bool:
        """Return whether the run should stop."""
        return self.number is not None

    @property
    def reason(self) -> str:
        """Name of what ended the run, for messages."""
        return NAMES.get(signal.Signals(self.number or signal.SIGINT), "interrupted")

    @property
    def exit_code(self) -> int:
        """Exit code of an interrupted run: 130 after Ctrl-C, 143 after any other signal."""
        return 128 + (signal.SIGINT if self.number == signal.SIGINT else signal.SIGTERM)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals; outside of the main thread, the caller handles them."""
        before = {}
        try:
            for number in (*NAMES, signal.SIGALRM):
                before[number] = signal.signal(number, self._handle)
        except ValueError:
            yield
            return
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        is_first = self.number is None
        if is_first and number != signal.SIGALRM:
            self.number = number
        if not (is_first and self.graceful):
            raise EndedError
        signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)
