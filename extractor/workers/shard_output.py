"""One shard of one store while it is computed: rows and outcomes to the store's writer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from extractor.images.types import Failure, ImageInfo
from extractor.lease.plan import StoreTarget
from extractor.store.failures import FailureRecord
from extractor.store.index import ImageRecord
from extractor.store.shard import ShardWriter

__all__ = ["ShardOutput"]


class ShardOutput:
    """One shard of one store while it is computed.

    Args:
        target: The store.
        writer: Writer of the shard; rows of an earlier attempt are in it.

    Attributes:
        spec: Index of the store's embedding among those of the run.
        done: Number of images of the shard that are done; they are its first ones.
    """

    def __init__(self, target: StoreTarget, writer: ShardWriter) -> None:
        self.spec = target.spec
        self.done = writer.images
        self._target = target
        self._writer = writer

    def append(
        self,
        start: int,
        paths: Sequence[bytes],
        rows: npt.NDArray[np.float32],
        outcomes: Sequence[ImageInfo | Failure],
    ) -> int:
        """Write the rows of a batch and its failures; return the number of failures.

        Args:
            start: Index in the shard of the first image.
            paths: Absolute path of each image.
            rows: ``(N, *shape)`` float32; rows of failed images are ignored.
            outcomes: For each image its file and size, or why it has no row.

        Raises:
            StoreError: The file system refuses.
        """
        if start < self.done:
            return 0
        kept, records, failures = [], [], []
        with np.errstate(over="ignore"):  # what exceeds float16 becomes infinite, and a failure
            stored = rows.astype(self._target.description.dtype, copy=False)
        finite = np.asarray(np.isfinite(stored).reshape(len(rows), -1).all(axis=1))
        for i, (path, outcome) in enumerate(zip(paths, outcomes, strict=True)):
            name = self._target.path_in_store(path)
            if isinstance(outcome, ImageInfo) and not finite[i]:
                message = _describe_overflow(rows[i])
                outcome = Failure("not-finite", message, outcome.size, outcome.mtime_ns)
            if isinstance(outcome, Failure):
                failures.append(_failure_record(name, outcome))
            else:
                kept.append(i)
                records.append(_image_record(name, outcome))
        self._writer.append(stored[kept], records, failures)
        self.done = start + len(outcomes)
        return len(failures)

    def finish(self) -> None:
        """Finish the shard; other processes see it from now on.

        Raises:
            StoreError: The file system refuses.
        """
        with self._writer:
            self._writer.finish()

    def close(self) -> None:
        """Leave the shard unfinished; its rows are kept for the next attempt."""
        self._writer.__exit__(None, None, None)


def _image_record(path: bytes, info: ImageInfo) -> ImageRecord:
    return ImageRecord(path, info.size, info.mtime_ns, info.width, info.height, info.sha256)


def _failure_record(path: bytes, failure: Failure) -> FailureRecord:
    return FailureRecord(path, failure.reason, failure.message, failure.size, failure.mtime_ns)


def _describe_overflow(row: npt.NDArray[np.float32]) -> str:
    if np.isfinite(row).all():
        return f"the embedding holds {abs(row).max():.3g}, more than float16 can hold"
    return "the embedding holds NaN or infinity"
