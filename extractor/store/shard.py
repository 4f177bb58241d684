"""One shard while it is written: rows and records, saved so that a dying run loses none."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from extractor.store.atomic import store_errors, sync, write_atomically
from extractor.store.failures import FailureRecord
from extractor.store.format import (
    JOURNAL,
    Description,
    FileEntry,
    ShardEntry,
    features_name,
    images_name,
)
from extractor.store.index import ImageRecord, index_bytes
from extractor.store.journal import BatchEntry, Journal, read_journal

__all__ = ["FinishedShard", "ShardWriter", "done_name", "journal_name"]


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

    def is_complete(self, staging: Path) -> bool:
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
    batches for the next run of the same job.

    Args:
        staging: staging folder of the store.
        number: number of the shard.
        description: description of the store.
        finished: finished shards by number; :meth:`finish` adds this one.

    Attributes:
        entries: batches of the shard so far.
    """

    def __init__(
        self,
        staging: Path,
        number: int,
        description: Description,
        finished: dict[int, FinishedShard],
    ) -> None:
        self._staging = staging
        self._number = number
        self._dtype = np.dtype(description.dtype).newbyteorder("<")
        self._row_shape = description.shape
        self._finished = finished
        self._path = staging / features_name(number)
        self._partial = self._path.with_name(self._path.name + ".partial")
        header = self._header(0)
        if self._path.exists():  # a run died while it finished the shard
            os.replace(self._path, self._partial)
        self._file = self._partial.open("r+b" if self._partial.exists() else "x+b")
        row_bytes = math.prod(self._row_shape) * self._dtype.itemsize
        journal = staging / journal_name(number)
        self.entries = read_journal(journal, self._file, row_bytes, len(header))
        self._file.seek(0)
        self._file.write(header)
        rows = sum(len(entry.records) for entry in self.entries)
        self._file.seek(len(header) + rows * row_bytes)
        self._file.truncate()
        self._journal = Journal(journal, self._file, self.entries)

    @property
    def images(self) -> int:
        """Number of images of the shard so far."""
        return sum(entry.images for entry in self.entries)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._journal.sync()
        with contextlib.suppress(OSError):  # the shard is not finished anyway
            self._journal.close()
            self._file.close()

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
            ValueError: rows and records do not match.
            StoreError: the file system refuses.
        """
        if rows.shape != (len(records), *self._row_shape):
            raise ValueError(
                f"got rows of shape {rows.shape} for {len(records)} records of shape "
                f"{self._row_shape}"
            )
        entry = BatchEntry(tuple(records), tuple(failures))
        with store_errors(self._staging.parent):
            self._journal.append(np.ascontiguousarray(rows, dtype=self._dtype).tobytes(), entry)
        self.entries.append(entry)

    def finish(self, ids: npt.NDArray[np.int64] | None = None) -> ShardEntry | None:
        """Finish the shard and return its entry; None, without files, if no image has a row.

        Args:
            ids: ``(rows,)``, the id of each row, for the index; None if they count up.
        """
        records = [record for entry in self.entries for record in entry.records]
        failures = [failure for entry in self.entries for failure in entry.failures]
        entry = None
        with store_errors(self._staging.parent):
            self._journal.close()  # needs no fsync: the .done file replaces it
            if records:
                self._file.seek(0)
                self._file.write(self._header(len(records)))
                self._file.flush()
                sync(self._file.fileno())
                self._file.close()
                os.replace(self._partial, self._path)
                index = images_name(self._number)
                write_atomically(self._staging / index, index_bytes(records, ids))
                entry = ShardEntry(
                    self._number,
                    self.images,
                    len(records),
                    FileEntry.of(self._path, features_name(self._number)),
                    FileEntry.of(self._staging / index, index),
                )
            else:
                self._file.close()
                self._partial.unlink()
            done = FinishedShard(self._number, self.images, entry, failures)
            write_atomically(self._staging / done_name(self._number), done.to_json().encode())
            (self._staging / journal_name(self._number)).unlink()
        self._finished[self._number] = done
        return entry

    def discard(self) -> None:
        """Remove a shard without images."""
        self._journal.close()
        self._file.close()
        self._partial.unlink()
        (self._staging / journal_name(self._number)).unlink()

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
