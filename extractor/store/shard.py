"""One shard while it is filled: rows and their records, kept so that a run that dies loses none."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from extractor.store.atomic import describe, sync, write_whole
from extractor.store.format import JOURNAL, Description, ShardEntry, features_name, images_name
from extractor.store.index import index_bytes
from extractor.store.journal import (
    BatchEntry,
    FailureRecord,
    ImageRecord,
    Journal,
    read_journal,
)
from extractor.store.publish import explained

__all__ = ["FinishedShard", "ShardWriter", "done_name", "journal_name"]


@dataclass(frozen=True)
class FinishedShard:
    """A shard that is done; ``entry`` is None where none of its images has a row."""

    shard: int
    images: int
    entry: ShardEntry | None
    failures: Sequence[FailureRecord]

    def to_json(self) -> str:
        entry = None if self.entry is None else asdict(self.entry)
        content = {
            "shard": self.shard,
            "images": self.images,
            "entry": entry,
            "failures": [one.to_list() for one in self.failures],
        }
        return json.dumps(content, ensure_ascii=True) + "\n"

    @classmethod
    def from_json(cls, text: bytes) -> FinishedShard:
        content = json.loads(text)
        failures = [FailureRecord.from_list(one) for one in content["failures"]]
        entry = None if content["entry"] is None else ShardEntry.from_mapping(content["entry"])
        return cls(content["shard"], content["images"], entry, failures)

    def is_whole(self, staging: Path) -> bool:
        """Whether its files are there in their full size."""
        files = () if self.entry is None else (self.entry.features, self.entry.index)
        return all(_size(staging / file.name) == file.bytes for file in files)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


class ShardWriter:
    """Appends rows to one shard; memory does not grow with them, but for the index.

    A context manager; leaving it without :meth:`finish` leaves no shard, but what the next run of
    the same job goes on with.
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
        self._beside = self._path.with_name(self._path.name + ".partial")
        header = self._header(0)
        if self._path.exists():  # a run died between its last rows and the end of the shard
            os.replace(self._path, self._beside)
        self._file = self._beside.open("r+b" if self._beside.exists() else "x+b")
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
        """Images that the shard answers for so far."""
        return sum(entry.images for entry in self.entries)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._journal.sync()
        with contextlib.suppress(OSError):  # of a shard that is given up anyway
            self._journal.close()
            self._file.close()

    def append(
        self,
        rows: npt.NDArray[np.floating],
        records: Sequence[ImageRecord],
        failures: Sequence[FailureRecord] = (),
    ) -> None:
        """Add one batch: embeddings ``(n, *shape)``, cast to the stored type, with a record each.

        Args:
            failures: the images of the batch that have no row.
        """
        if rows.shape != (len(records), *self._row_shape):
            raise ValueError(
                f"{rows.shape} rows for {len(records)} records of shape {self._row_shape}"
            )
        entry = BatchEntry(tuple(records), tuple(failures))
        with explained(self._staging.parent):
            self._journal.append(np.ascontiguousarray(rows, dtype=self._dtype).tobytes(), entry)
        self.entries.append(entry)

    def finish(self) -> ShardEntry | None:
        """Close the shard; None and no file where none of its images has a row."""
        records = [record for entry in self.entries for record in entry.records]
        failures = [failure for entry in self.entries for failure in entry.failures]
        entry = None
        with explained(self._staging.parent):
            self._journal.close()  # whose lines tell nothing more, once the end is on the disk
            if records:
                self._file.seek(0)
                self._file.write(self._header(len(records)))
                self._file.flush()
                sync(self._file.fileno())
                self._file.close()
                os.replace(self._beside, self._path)
                index = images_name(self._number)
                write_whole(self._staging / index, index_bytes(records))
                entry = ShardEntry(
                    self._number,
                    self.images,
                    len(records),
                    describe(self._path, features_name(self._number)),
                    describe(self._staging / index, index),
                )
            else:
                self._file.close()
                self._beside.unlink()
            done = FinishedShard(self._number, self.images, entry, failures)
            write_whole(self._staging / done_name(self._number), done.to_json().encode())
            (self._staging / journal_name(self._number)).unlink()
        self._finished[self._number] = done
        return entry

    def discard(self) -> None:
        """Remove a shard that answers for no image."""
        self._journal.close()
        self._file.close()
        self._beside.unlink()
        (self._staging / journal_name(self._number)).unlink()

    def _header(self, rows: int) -> bytes:
        # numpy pads the header so that its length does not change with the number of rows.
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header,
            {"descr": self._dtype.str, "fortran_order": False, "shape": (rows, *self._row_shape)},
        )
        return header.getvalue()


def journal_name(shard: int) -> str:
    return f"{JOURNAL}/{shard:05d}.jsonl"


def done_name(shard: int) -> str:
    return f"{JOURNAL}/{shard:05d}.done"
