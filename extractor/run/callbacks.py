"""What a run calls while it works: progress, and the question whether to stop. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from extractor.errors import InterruptedRunError
from extractor.report import Progress

__all__ = ["Callbacks"]


class Callbacks:
    """What a run calls when a phase begins and after every batch, in the thread that started it.

    Args:
        progress: Called with the progress.
        stop: Asked whether to stop; the run then ends and keeps its work. Not asked once all rows
            are computed.
    """

    def __init__(
        self,
        progress: Callable[[Progress], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> None:
        self._progress = progress
        self._stop = stop
        self._raised: BaseException | None = None
        self._last = Progress(0, 0, 0)

    def publishing(self) -> None:
        """Report that all rows are computed and are published next."""
        self.report(replace(self._last, phase="publishing"))

    def report(self, progress: Progress) -> None:
        """Report the progress, and end the run if it should stop.

        Raises:
            InterruptedRunError: ``stop`` returned true.
        """
        is_computing = progress.phase == "computing"
        self._last = progress
        try:
            if self._progress is not None:
                self._progress(progress)
            if progress.phase == "publishing" or (is_computing and progress.done >= progress.total):
                return
            stops = self._stop is not None and self._stop()
        except BaseException as error:
            self._raised = error
            raise
        if stops:
            raise InterruptedRunError(progress.done, progress.total, is_computing=is_computing)

    def has_raised(self, error: BaseException) -> bool:
        """Return whether an error comes from a callback."""
        return error is self._raised
