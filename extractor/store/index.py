"""The index of a shard: a Parquet file, row-aligned with its features."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from extractor.errors import StoreError
from extractor.store.journal import ImageRecord

__all__ = ["Images", "index_bytes", "read_column", "read_images"]

DIGEST_BYTES = 32  # of a SHA-256


@dataclass(frozen=True)
class Images:
    """The images of a shard's rows, column by column: what tells whether they are still the same.

    Attributes:
        paths: relative to the root.
        sizes: ``(rows,)`` int64, bytes of the files.
        mtimes: ``(rows,)`` int64, nanoseconds.
        digests: SHA-256 of the files; empty where it was not taken.
    """

    paths: Sequence[bytes]
    sizes: npt.NDArray[np.int64]
    mtimes: npt.NDArray[np.int64]
    digests: Sequence[bytes]

    @classmethod
    def of(cls, records: Sequence[ImageRecord]) -> Images:
        """The columns of records."""
        return cls(
            [record.path for record in records],
            np.array([record.size for record in records], np.int64),
            np.array([record.mtime_ns for record in records], np.int64),
            [record.sha256 for record in records],
        )

    def __len__(self) -> int:
        return len(self.paths)


def index_bytes(records: Sequence[ImageRecord]) -> bytes:
    """The Parquet file of a shard's index."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths: list[str] | list[bytes] = [record.path for record in records]
    kind = pa.binary()
    with contextlib.suppress(UnicodeDecodeError):
        paths = [record.path.decode() for record in records]
        kind = pa.string()
    digests = [record.sha256 or None for record in records]
    table = pa.table(
        {
            "path": pa.array(paths, kind),
            "size": pa.array([record.size for record in records], pa.int64()),
            "mtime_ns": pa.array([record.mtime_ns for record in records], pa.int64()),
            "width": pa.array([record.width for record in records], pa.int32()),
            "height": pa.array([record.height for record in records], pa.int32()),
            "sha256": pa.array(digests, pa.binary(DIGEST_BYTES)),
        }
    )
    # No file of Python's: each of many small writes would wait until a decoding thread lets it.
    content = pa.BufferOutputStream()
    pq.write_table(table, content)
    return bytes(content.getvalue().to_pybytes())


def read_column(path: Path, name: str) -> list[Any]:
    """One column of a shard's index.

    Raises:
        StoreError: the file or the column is not there, or damaged.
    """
    return list(_read(path, [name]).column(name).to_pylist())


def read_images(path: Path, *, digests: bool = True) -> Images:
    """What a shard's index says of its images; raises as :func:`read_column`.

    Args:
        digests: read them, too; else they are empty.
    """
    table = _read(path, ["path", "size", "mtime_ns", *(["sha256"] if digests else [])])
    return Images(
        [os.fsencode(name) for name in table.column("path").to_pylist()],
        table.column("size").to_numpy(),
        table.column("mtime_ns").to_numpy(),
        [one or b"" for one in table.column("sha256").to_pylist()] if digests else [],
    )


def _read(path: Path, names: list[str]) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as file:
            # read_table starts threads, which abort some processes that end soon after (2 of 100).
            parquet = pq.ParquetFile(file, pre_buffer=False)
            table = parquet.read(columns=names, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
    missing = set(names) - set(table.column_names)
    if missing:
        raise StoreError(f"{path} has no column {', '.join(sorted(missing))}")
    return table
