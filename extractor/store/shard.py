"""One shard while it is written: rows and records, saved so that a dying run loses none."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from extractor.errors import StoreError
from extractor.store.atomic import store_errors, sync, write_atomically
from extractor.store.failures import FailureRecord
from extractor.store.format import (
    FEATURES,
    JOURNAL,
    Description,
    FileEntry,
    ShardEntry,
    features_name,
    images_name,
)
from extractor.store.index import ImageRecord, index_bytes
from extractor.store.journal import BatchEntry, Journal, read_journal
from extractor.store.lock import FinishingLock, ShardLock, is_same_file

__all__ = [
    "FinishedShard",
    "ShardWriter",
    "clear_attempts",
    "done_name",
    "finished_shards",
    "journal_name",
]

# Ends the name of the rows of a copy.
COPY = ".copy"


@dataclass(frozen=True)
class FinishedShard:
    """A finished shard of a run.

    Attributes:
        shard: number of the shard.
        images: number of its images.
        entry: entry for the manifest; None if no image has a row.
        failures: images without a row.
    """

    shard: int
    images: int
    entry: ShardEntry | None
    failures: Sequence[FailureRecord]

    def to_json(self) -> str:
        """Return the text of the ``.done`` file."""
        entry = None if self.entry is None else self.entry.to_mapping()
        content = {
            "shard": self.shard,
            "images": self.images,
            "entry": entry,
            "failures": [failure.to_list() for failure in self.failures],
        }
        return json.dumps(content, ensure_ascii=True) + "\n"

    @classmethod
    def from_json(cls, text: bytes) -> FinishedShard:
        """Parse what :meth:`to_json` wrote."""
        content = json.loads(text)
        failures = [FailureRecord.from_list(values) for values in content["failures"]]
        entry = None if content["entry"] is None else ShardEntry.from_mapping(content["entry"])
        return cls(content["shard"], content["images"], entry, failures)

    @classmethod
    def read(cls, staging: Path, number: int) -> FinishedShard | None:
        """Return a finished shard whose files are complete; None if there is none."""
        try:
            shard = cls.from_json((staging / done_name(number)).read_bytes())
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):  # damaged by a power cut
            return None
        return shard if shard.shard == number and shard._is_complete(staging) else None

    def _is_complete(self, staging: Path) -> bool:
        """Return whether all its files exist in their full size."""
        files = () if self.entry is None else (self.entry.features, self.entry.index)
        return all(_size(staging / file.name) == file.bytes for file in files)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


class ShardWriter:
    """Context manager that appends rows to one shard, new or unfinished.

    Only the index grows in memory. Leaving without :meth:`finish` makes no shard, but keeps the
    batches for the next run of the same job. The shard is locked until then, and the kernel
    releases the lock of a process that dies.

    A copy is a second attempt at a shard that another process may be computing. It starts from the
    first image, under names of its own, takes no lock, and leaves nothing unless it finishes first.

    Args:
        staging: staging folder of the store.
        number: number of the shard.
        description: description of the store.
        is_copy: another process may be computing the shard.
        lock: fail if the file system does not support locks.

    Attributes:
        entries: batches of the shard so far.
        finished: the shard if it is finished, be it by another process; else None.

    Raises:
        ShardBusyError: another process computes the shard.
        OSError: the file system refuses.
    """

    def __init__(
        self,
        staging: Path,
        number: int,
        description: Description,
        *,
        is_copy: bool = False,
        lock: bool = True,
    ) -> None:
        self._staging = staging
        self._number = number
        self._dtype = np.dtype(description.dtype).newbyteorder("<")
        self._row_shape = description.shape
        self._is_copy = is_copy
        self._lock = lock
        self._path = staging / features_name(number)
        suffix = f".{uuid.uuid4().hex}{COPY}" if is_copy else ".partial"
        self._partial = self._path.with_name(self._path.name + suffix)
        self._journal: Journal | None = None
        self.entries: list[BatchEntry] = []
        self.finished: FinishedShard | None = None
        with contextlib.ExitStack() as stack:
            if not is_copy:
                stack.enter_context(ShardLock(staging, number, required=lock))
            if self._path.exists() or (staging / done_name(number)).exists():
                self._look_for_finished()
            if self.finished is None:
                self._open(stack)
            self._held = stack.pop_all()

    def _look_for_finished(self) -> None:
        """Take over a finished shard, or go on with one that another attempt was finishing."""
        with self._finishing():
            self.finished = FinishedShard.read(self._staging, self._number)
            if self.finished is None and not self._is_copy:
                (self._staging / done_name(self._number)).unlink(missing_ok=True)
                with contextlib.suppress(FileNotFoundError):
                    os.replace(self._path, self._partial)

    def _open(self, stack: contextlib.ExitStack) -> None:
        header = self._header(0)
        mode = "r+b" if self._partial.exists() else "x+b"
        self._file = stack.enter_context(self._partial.open(mode))
        if self._is_copy:
            self._file.write(header)
            return
        row_bytes = math.prod(self._row_shape) * self._dtype.itemsize
        journal = self._staging / journal_name(self._number)
        self.entries = read_journal(journal, self._file, row_bytes, len(header))
        self._file.seek(0)
        self._file.write(header)
        rows = sum(len(entry.records) for entry in self.entries)
        self._file.seek(len(header) + rows * row_bytes)
        self._file.truncate()
        self._journal = Journal(journal, self._file, self.entries)

    def _finishing(self) -> FinishingLock:
        return FinishingLock(self._staging, self._number, required=self._lock)

    @property
    def images(self) -> int:
        """Number of images of the shard so far."""
        if self.finished is not None:
            return self.finished.images
        return sum(entry.images for entry in self.entries)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._journal is not None:
            with contextlib.suppress(OSError, ValueError):
                self._journal.sync()
            with contextlib.suppress(OSError):  # the shard is not finished anyway
                self._journal.close()
        with contextlib.suppress(OSError):
            if self._is_copy:
                self._partial.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._held.close()

    def append(
        self,
        rows: npt.NDArray[np.floating],
        records: Sequence[ImageRecord],
        failures: Sequence[FailureRecord] = (),
    ) -> None:
        """Append one batch.

        Args:
            rows: embeddings ``(n, *shape)``; cast to the stored type.
            records: one record per row.
            failures: images of the batch without a row.

        Raises:
            ValueError: rows and records do not match, or the shard is finished.
            StoreError: the file system refuses.
        """
        if rows.shape != (len(records), *self._row_shape):
            raise ValueError(
                f"got rows of shape {rows.shape} for {len(records)} records of shape "
                f"{self._row_shape}"
            )
        if self.finished is not None:
            raise ValueError(f"shard {self._number} is finished")
        entry = BatchEntry(tuple(records), tuple(failures))
        stored = np.ascontiguousarray(rows, dtype=self._dtype).tobytes()
        with store_errors(self._staging.parent):
            if self._journal is not None:
                self._journal.append(stored, entry)
            else:
                self._file.write(stored)
        self.entries.append(entry)

    def finish(self, ids: npt.NDArray[np.int64] | None = None) -> FinishedShard:
        """Finish the shard and return it; it has no files if no image has a row.

        If another attempt at the shard was first, this one is discarded: the rows of two attempts
        are equal, but an image may have failed in one of them only.

        Args:
            ids: ``(rows,)``, the id of each row, for the index; None if they count up.

        Raises:
            StoreError: the file system refuses, or the shard is no longer that of this process.
        """
        if self.finished is not None:
            return self.finished
        with store_errors(self._staging.parent):
            if self._journal is not None:
                self._journal.close()  # needs no fsync: the .done file replaces it
            features = self._complete_features()
            with self._finishing():
                done = FinishedShard.read(self._staging, self._number)
                if done is None:
                    done = self._publish(features, ids)
                else:
                    self._partial.unlink(missing_ok=True)
                if not self._is_copy:
                    (self._staging / journal_name(self._number)).unlink(missing_ok=True)
        self.finished = done
        return done

    def _complete_features(self) -> FileEntry | None:
        """Complete the file of the rows, and close it; return None if there are none."""
        rows = sum(len(entry.records) for entry in self.entries)
        if rows:
            self._file.seek(0)
            self._file.write(self._header(rows))
            self._file.flush()
            sync(self._file.fileno())
        if not is_same_file(self._file.fileno(), self._partial):
            raise StoreError(
                f"{self._partial} was removed or replaced while this process wrote it; the run "
                "that it belongs to has ended"
            )
        self._file.close()
        return FileEntry.of(self._partial, features_name(self._number)) if rows else None

    def _publish(
        self, features: FileEntry | None, ids: npt.NDArray[np.int64] | None
    ) -> FinishedShard:
        """Give the files their names, the ``.done`` file last."""
        records = [record for entry in self.entries for record in entry.records]
        failures = [failure for entry in self.entries for failure in entry.failures]
        entry = None
        if features is None:
            self._partial.unlink()
        else:
            os.replace(self._partial, self._path)
            name = images_name(self._number)
            write_atomically(self._staging / name, index_bytes(records, ids))
            index = FileEntry.of(self._staging / name, name)
            entry = ShardEntry(self._number, self.images, len(records), features, index)
        done = FinishedShard(self._number, self.images, entry, failures)
        write_atomically(self._staging / done_name(self._number), done.to_json().encode())
        return done

    def discard(self) -> None:
        """Remove a shard without images."""
        if self._journal is not None:
            self._journal.close()
        self._file.close()
        self._partial.unlink()
        (self._staging / journal_name(self._number)).unlink(missing_ok=True)

    def _header(self, rows: int) -> bytes:
        # numpy pads the header, so its length does not depend on the number of rows.
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header,
            {"descr": self._dtype.str, "fortran_order": False, "shape": (rows, *self._row_shape)},
        )
        return header.getvalue()


def journal_name(shard: int) -> str:
    """Return the name of a shard's journal in the staging folder."""
    return f"{JOURNAL}/{shard:05d}.jsonl"


def done_name(shard: int) -> str:
    """Return the name of the file that marks a shard as finished."""
    return f"{JOURNAL}/{shard:05d}.done"


def finished_shards(staging: Path) -> dict[int, FinishedShard]:
    """Return the finished shards whose files are complete, by number."""
    names = sorted((staging / JOURNAL).glob("*.done"))
    shards = [FinishedShard.read(staging, int(path.stem)) for path in names]
    return {shard.shard: shard for shard in shards if shard is not None}


def clear_attempts(staging: Path) -> tuple[dict[int, FinishedShard], list[int]]:
    """Remove what dead attempts left in a staging folder and no run can use.

    Returns:
        The finished shards whose files are complete, and the numbers of the unfinished ones.
    """
    finished = finished_shards(staging)
    unfinished = []
    for path in (staging / JOURNAL).glob("*.done"):
        if int(path.stem) not in finished:  # a power cut destroyed it: it is computed again
            path.unlink(missing_ok=True)
    for path in sorted((staging / JOURNAL).glob("*.jsonl")):
        if int(path.stem) in finished:
            path.unlink(missing_ok=True)
        else:
            unfinished.append(int(path.stem))
    for path in (staging / FEATURES).glob(f"*{COPY}"):
        path.unlink(missing_ok=True)
    for number in finished:
        rows = staging / features_name(number)
        rows.with_name(f"{rows.name}.partial").unlink(missing_ok=True)
    return finished, unfinished
