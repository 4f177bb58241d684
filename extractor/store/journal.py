"""What a run has done of one shard, batch by batch, so that a run that was killed goes on there."""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from extractor.store.atomic import sync

__all__ = ["BatchEntry", "FailureRecord", "ImageRecord", "Journal", "read_journal"]

# What a power cut may cost; a killed process loses nothing that was handed to the kernel.
SYNC_SECONDS = 10.0


class ImageRecord(NamedTuple):
    """One row of a shard's index; ``path`` relative to the root, sizes in bytes and pixels.

    ``sha256`` is that of the bytes of the file, 32 of them; none where it was not taken.
    """

    path: bytes
    size: int
    mtime_ns: int
    width: int
    height: int
    sha256: bytes = b""


class FailureRecord(NamedTuple):
    """One image without a row: its path, a word for programs and a sentence for people.

    ``size`` and ``mtime_ns`` are those of the file when it failed, -1 where they were not to be
    had.
    """

    path: bytes
    reason: str
    message: str
    size: int = -1
    mtime_ns: int = -1

    def to_list(self) -> list[str | int]:
        """What JSON can hold."""
        return [os.fsdecode(self.path), *self[1:]]

    @classmethod
    def from_list(cls, values: Sequence[Any]) -> FailureRecord:
        """What :meth:`to_list` made."""
        return cls(os.fsencode(values[0]), *values[1:])


@dataclass(frozen=True)
class BatchEntry:
    """One batch that is done: the images that it answers for, in rows and failures."""

    records: Sequence[ImageRecord]
    failures: Sequence[FailureRecord]
    checksum: int = field(default=0)  # CRC-32 of the bytes of its rows

    @property
    def images(self) -> int:
        """Images of the batch."""
        return len(self.records) + len(self.failures)

    def to_line(self) -> bytes:
        """One line of JSON; a line without its end was torn."""
        # A text for each record: so many lists would have Python look for garbage among them.
        records = ", ".join(
            f"[{json.dumps(os.fsdecode(path))}, {size}, {mtime}, {width}, {height}, "
            f'"{digest.hex()}"]'
            for path, size, mtime, width, height, digest in self.records
        )
        failures = json.dumps([one.to_list() for one in self.failures])
        line = f'{{"records": [{records}], "failures": {failures}, "checksum": {self.checksum}}}\n'
        return line.encode()

    @classmethod
    def from_line(cls, line: bytes) -> BatchEntry:
        """What :meth:`to_line` wrote.

        Raises:
            ValueError: a torn or damaged line.
        """
        if not line.endswith(b"\n"):
            raise ValueError("a torn line")
        try:
            content = json.loads(line)
            records = [
                ImageRecord(os.fsencode(path), size, mtime, width, height, bytes.fromhex(digest))
                for path, size, mtime, width, height, digest in content["records"]
            ]
            failures = [FailureRecord.from_list(one) for one in content["failures"]]
            return cls(records, failures, int(content["checksum"]))
        except (KeyError, TypeError, IndexError, OverflowError, RecursionError) as error:
            raise ValueError(f"a damaged line: {error}") from error


def read_journal(
    path: Path, features: IO[bytes], row_bytes: int, header_bytes: int
) -> list[BatchEntry]:
    """The batches of a shard in progress whose rows are there, whole and unchanged.

    Args:
        features: the file that the rows were appended to, behind a header.
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
    """Appends batches to a shard in progress: the rows first, then the line that tells of them.

    Both are handed to the kernel at once, and to the disk every :data:`SYNC_SECONDS`.

    Args:
        path: of the journal; what it held beyond ``entries`` is cut off.
        features: open file, at the end of the rows of ``entries``.
    """

    def __init__(
        self,
        path: Path,
        features: IO[bytes],
        entries: Sequence[BatchEntry],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._features = features
        self._clock = clock
        self._synced = clock()
        self._file = path.open("ab")
        self._file.truncate(sum(len(entry.to_line()) for entry in entries))

    def append(self, rows: bytes | memoryview, entry: BatchEntry) -> None:
        """Add one batch; ``rows`` are the bytes of its embeddings."""
        self._features.write(rows)
        self._features.flush()
        line = BatchEntry(entry.records, entry.failures, zlib.crc32(rows)).to_line()
        self._file.write(line)
        self._file.flush()
        if self._clock() - self._synced >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Bring all to the disk, the rows before what tells of them."""
        sync(self._features.fileno())
        sync(self._file.fileno())
        self._synced = self._clock()

    def close(self) -> None:
        """Close the journal; the rows stay open."""
        self._file.close()
