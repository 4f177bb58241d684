"""Finished batches of one shard, so that a killed run resumes there."""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from extractor.store.atomic import sync
from extractor.store.failures import FailureRecord
from extractor.store.index import ImageRecord

__all__ = ["BatchEntry", "Journal", "read_journal"]

# Work that a power cut may cost. A killed process loses nothing that the kernel has received.
SYNC_SECONDS = 10.0


@dataclass(frozen=True)
class BatchEntry:
    """One finished batch.

    Attributes:
        records: images with a row, in the order of the rows.
        failures: images without a row.
        checksum: CRC-32 of the bytes of the rows.
    """

    records: Sequence[ImageRecord]
    failures: Sequence[FailureRecord]
    checksum: int = field(default=0)

    @property
    def images(self) -> int:
        """Number of images in the batch."""
        return len(self.records) + len(self.failures)

    def to_line(self) -> bytes:
        """Return one line of JSON; its line feed marks it as complete."""
        # One string per record: so many lists would start Python's garbage collection.
        records = ", ".join(
            f"[{json.dumps(os.fsdecode(path))}, {size}, {mtime}, {width}, {height}, "
            f'"{digest.hex()}"]'
            for path, size, mtime, width, height, digest in self.records
        )
        failures = json.dumps([failure.to_list() for failure in self.failures])
        line = f'{{"records": [{records}], "failures": {failures}, "checksum": {self.checksum}}}\n'
        return line.encode()

    @classmethod
    def from_line(cls, line: bytes) -> BatchEntry:
        """Parse what :meth:`to_line` wrote.

        Raises:
            ValueError: an incomplete or damaged line.
        """
        if not line.endswith(b"\n"):
            raise ValueError("an incomplete line")
        try:
            content = json.loads(line)
            records = [
                ImageRecord(os.fsencode(path), size, mtime, width, height, bytes.fromhex(digest))
                for path, size, mtime, width, height, digest in content["records"]
            ]
            if not all(-(2**63) <= record.mtime_ns < 2**63 for record in records):
                raise ValueError("a time that the index cannot hold")
            failures = [FailureRecord.from_list(values) for values in content["failures"]]
            return cls(records, failures, int(content["checksum"]))
        except (KeyError, TypeError, IndexError, OverflowError, RecursionError) as error:
            raise ValueError(f"a damaged line: {error}") from error


def read_journal(
    path: Path, features: IO[bytes], row_bytes: int, header_bytes: int
) -> list[BatchEntry]:
    """Return the batches of an unfinished shard whose rows are complete and unchanged.

    Args:
        path: file of the journal; it may be missing.
        features: file of the rows, which follow a header.
        row_bytes: bytes of one row.
        header_bytes: bytes of the header.
    """
    entries: list[BatchEntry] = []
    features.seek(header_bytes)
    try:
        lines = path.open("rb")
    except FileNotFoundError:
        return entries
    with lines:
        for line in lines:
            try:
                entry = BatchEntry.from_line(line)
            except ValueError:
                break
            rows = features.read(len(entry.records) * row_bytes)
            if len(rows) < len(entry.records) * row_bytes or zlib.crc32(rows) != entry.checksum:
                break
            entries.append(entry)
    return entries


class Journal:
    """Appends batches to an unfinished shard: the rows first, then the line that lists them.

    The kernel receives both at once; they reach the disk every :data:`SYNC_SECONDS`.

    Args:
        path: file of the journal; everything after ``entries`` is cut off.
        features: open file, positioned after the rows of ``entries``.
        entries: batches to keep.
    """

    def __init__(self, path: Path, features: IO[bytes], entries: Sequence[BatchEntry]) -> None:
        self._features = features
        self._synced = time.monotonic()
        self._file = path.open("ab")
        self._file.truncate(sum(len(entry.to_line()) for entry in entries))

    def append(self, rows: bytes | memoryview, entry: BatchEntry) -> None:
        """Append one batch; ``rows`` are the bytes of its embeddings."""
        self._features.write(rows)
        self._features.flush()
        line = BatchEntry(entry.records, entry.failures, zlib.crc32(rows)).to_line()
        self._file.write(line)
        self._file.flush()
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Bring both files to the disk, the rows before the lines that list them."""
        sync(self._features.fileno())
        sync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Close the journal; the file of the rows stays open."""
        self._file.close()
