"""What ends a run from outside: Ctrl-C, SIGTERM, and the SIGUSR1 that schedulers send ahead."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["EndedError", "Stopping"]

# The batch that is computed may end within this time; what a scheduler grants is often 10 or 30.
GRACE_SECONDS = 4.0

NAMES = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGUSR1: "told to end"}


class EndedError(BaseException):
    """A signal that is to end the process; like KeyboardInterrupt no error of the program."""


class Stopping:
    """Turns the first signal into a wish and the second into an :class:`EndedError`.

    While nothing is computed that could be lost (:attr:`graceful` is not set), the first one ends
    the process already; and so does the batch that takes longer than :data:`GRACE_SECONDS`.

    Attributes:
        graceful: a batch may be finished first.
        number: of the first signal that came; None before.
    """

    def __init__(self) -> None:
        self.graceful = False
        self.number: int | None = None

    def __call__(self) -> bool:
        """Whether the run is to stop."""
        return self.number is not None

    @property
    def how(self) -> str:
        """The signal that came, in a word."""
        return NAMES.get(signal.Signals(self.number or signal.SIGINT), "interrupted")

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 143 for all else that tells a job to end."""
        return 128 + (signal.SIGINT if self.number == signal.SIGINT else signal.SIGTERM)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals; only the main thread can, elsewhere the caller handles them."""
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
        first = self.number is None
        if first and number != signal.SIGALRM:
            self.number = number
        if not (first and self.graceful):
            raise EndedError
        signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)
