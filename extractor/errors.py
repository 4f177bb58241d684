"""Errors that a caller can cause; all are subclasses of :class:`ExtractorError`."""

from __future__ import annotations

import functools
from typing import Any

from extractor.text import plural

__all__ = [
    "DecodeError",
    "DeviceError",
    "ExtractorError",
    "InstallationError",
    "InterruptedRunError",
    "ModelError",
    "ShardBusyError",
    "SourceError",
    "StoreBusyError",
    "StoreDamagedError",
    "StoreError",
    "StoreNotFoundError",
    "StoreReplacedError",
    "UnknownTokenError",
    "UsageError",
    "WeightsError",
]


class ExtractorError(Exception):
    """Base class of all errors; the message says what went wrong and what to try."""


class UsageError(ExtractorError):
    """An option or an argument has a value that makes no sense."""


class SourceError(ExtractorError):
    """The images cannot be listed, or none of them can be embedded."""


class DecodeError(ExtractorError):
    """An image cannot be decoded.

    Args:
        reason: Short word for programs, such as ``not-an-image`` or ``truncated``.
        message: Sentence for people.

    Attributes:
        reason: See above.
        size: Size of the file in bytes; -1 if there is no file.
        mtime_ns: Modification time of the file in nanoseconds; -1 if there is no file.
        index: Index of the image among those of a call; None outside of a call.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.size = -1
        self.mtime_ns = -1
        self.index: int | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, str(self)), self.__dict__


class ModelError(ExtractorError):
    """A model is unknown, or its classifier cannot be removed."""


class WeightsError(ExtractorError):
    """Weights cannot be found or read, or they do not fit the model."""


class DeviceError(ExtractorError):
    """This machine lacks a device or a precision, or the device is out of memory."""


class InstallationError(ExtractorError):
    """A package that the program needs is missing, damaged, or does not fit another one."""


class StoreError(ExtractorError):
    """A store cannot be read or written as requested."""


class StoreNotFoundError(StoreError):
    """There is no store in this folder, or none that was ever finished."""


class StoreDamagedError(StoreError):
    """A file of a store is missing or has other content than the store recorded."""


class StoreBusyError(StoreError):
    """Another run is writing to the store."""


class ShardBusyError(StoreBusyError):
    """Another process computes the shard."""


class StoreReplacedError(StoreError):
    """A store was replaced or removed after it was opened, so some of it can no longer be read."""


class UnknownTokenError(StoreError):
    """A store does not know a state that it is asked to compare with; do a full sync."""


class ShardsFailedError(ExtractorError):
    """Some shards of a run failed several times; all others are kept for the next run."""


class InterruptedRunError(ExtractorError):
    """A run was asked to stop; its finished batches are saved, and the same call resumes.

    Args:
        done: Number of images that are done; 0 if the run had not looked yet.
        total: Number of images of the run; 0 if it had not listed them yet.
        is_computing: Whether the run had begun to compute.
    """

    def __init__(self, done: int, total: int, *, is_computing: bool = True) -> None:
        when = f"after {done:,} of {plural(total, 'image')}"
        super().__init__(
            f"stopped {when if is_computing else 'before the first image'}; repeat the same call "
            "to resume"
        )
        self.done = done
        self.total = total
        self.is_computing = is_computing

    def __reduce__(self) -> tuple[Any, ...]:
        make = functools.partial(type(self), is_computing=self.is_computing)
        return make, (self.done, self.total), self.__dict__
