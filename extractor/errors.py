"""The errors that a caller can cause, all of them children of one."""

from __future__ import annotations

__all__ = [
    "DecodeError",
    "DeviceError",
    "ExtractorError",
    "ModelError",
    "SourceError",
    "StoreError",
    "UsageError",
    "WeightsError",
]


class ExtractorError(Exception):
    """What went wrong, what was expected, and what to try."""


class UsageError(ExtractorError):
    """An option or an argument that cannot be meant."""


class SourceError(ExtractorError):
    """The images that were asked for cannot be listed."""


class DecodeError(ExtractorError):
    """One image cannot be turned into pixels.

    ``reason`` is a short machine-readable word (``not-an-image``, ``truncated``, ...), the
    message is for people. ``size`` and ``mtime_ns`` are those of the file, -1 where there is none.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.size = -1
        self.mtime_ns = -1


class ModelError(ExtractorError):
    """A model that is unknown, or whose head cannot be removed."""


class WeightsError(ExtractorError):
    """Weights that cannot be found, read or fitted to the model."""


class DeviceError(ExtractorError):
    """A device or a precision that this machine does not have, or that is out of memory."""


class StoreError(ExtractorError):
    """A store that cannot be read or written as asked."""


class InterruptedRunError(ExtractorError):
    """A run that was asked to stop; what it did is kept, and the same call goes on there."""

    def __init__(self, done: int, total: int) -> None:
        super().__init__(f"stopped after {done} of {total} images; the same command goes on there")
        self.done = done
        self.total = total
