"""Image index of a shard: a Parquet file whose rows match those of the features."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from extractor.errors import StoreDamagedError
from extractor.paths import PackedPaths

__all__ = [
    "DIGEST_BYTES",
    "ImageRecord",
    "Images",
    "index_bytes",
    "path_array",
    "read_column",
    "read_ids",
    "read_images",
    "read_path_range",
    "read_records",
    "read_table",
]

DIGEST_BYTES = 32  # SHA-256
ROWS_AT_ONCE = 4096  # rows of a column that are Python objects at a time


class ImageRecord(NamedTuple):
    """One row of a shard's index.

    Attributes:
        path: path relative to the root.
        size: bytes of the file.
        mtime_ns: modification time of the file.
        width: width of the image in pixels.
        height: height of the image in pixels.
        sha256: digest of the file, 32 bytes; empty if it was not computed.
    """

    path: bytes
    size: int
    mtime_ns: int
    width: int
    height: int
    sha256: bytes = b""


@dataclass(frozen=True)
class Images:
    """Columns of a shard's index that show whether the images are still the same.

    Attributes:
        paths: paths relative to the root.
        sizes: ``(rows,)`` int64, bytes of the files.
        mtimes: ``(rows,)`` int64, nanoseconds.
        digests: SHA-256 of the files; empty if it was not computed.
    """

    paths: Sequence[bytes]
    sizes: npt.NDArray[np.int64]
    mtimes: npt.NDArray[np.int64]
    digests: Sequence[bytes]

    @classmethod
    def of(cls, records: Sequence[ImageRecord]) -> Images:
        """Return the columns of records."""
        return cls(
            [record.path for record in records],
            np.array([record.size for record in records], np.int64),
            np.array([record.mtime_ns for record in records], np.int64),
            [record.sha256 for record in records],
        )

    def __len__(self) -> int:
        return len(self.paths)


def index_bytes(records: Sequence[ImageRecord], ids: npt.NDArray[np.int64] | None = None) -> bytes:
    """Return the Parquet file of a shard's index.

    Args:
        records: the rows.
        ids: ``(rows,)``, the id of each row, if they do not count up from a first one.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    digests = [record.sha256 or None for record in records]
    table = pa.table(
        {
            "path": path_array([record.path for record in records]),
            "size": pa.array([record.size for record in records], pa.int64()),
            "mtime_ns": pa.array([record.mtime_ns for record in records], pa.int64()),
            "width": pa.array([record.width for record in records], pa.int32()),
            "height": pa.array([record.height for record in records], pa.int32()),
            "sha256": pa.array(digests, pa.binary(DIGEST_BYTES)),
            **({} if ids is None else {"id": pa.array(ids, pa.int64())}),
        }
    )
    # Written to memory: with a Python file, each small write would wait for the interpreter lock.
    content = pa.BufferOutputStream()
    pq.write_table(table, content)
    return bytes(content.getvalue().to_pybytes())


def path_array(paths: Sequence[bytes]) -> Any:
    """Return paths as a pyarrow array of strings; of bytes if one of them is not UTF-8."""
    import pyarrow as pa

    with contextlib.suppress(UnicodeDecodeError):
        return pa.array([path.decode() for path in paths], pa.string())
    return pa.array(paths, pa.binary())


def rows_of_paths(
    shards: Iterable[tuple[Sequence[bytes], npt.NDArray[np.bool_]]], paths: Iterable[bytes]
) -> npt.NDArray[np.int64]:
    """Return the row of each path in a store, ``(paths,)``; -1 for a path without one.

    Args:
        shards: for each shard the paths of its rows, and which of these count.
        paths: paths relative to the root, in any order, with duplicates.
    """
    row = itertools.count()
    rows = {
        path: next(row) for indexed, live in shards for path in itertools.compress(indexed, live)
    }
    return np.fromiter((rows.get(path, -1) for path in paths), np.int64)


def read_column(path: Path, name: str) -> list[Any]:
    """Read one column of a shard's index.

    Raises:
        StoreDamagedError: the file or the column is missing or damaged.
    """
    return list(read_table(path, [name]).column(name).to_pylist())


def read_path_range(path: Path) -> tuple[bytes, bytes] | None:
    """Return the first and the last path of a shard by their bytes, without reading the others.

    None if the file does not tell.

    Raises:
        StoreDamagedError: the file is missing or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as file:
            metadata = pq.ParquetFile(file, pre_buffer=False).metadata
            column = metadata.schema.names.index("path")
            groups = [metadata.row_group(i).column(column) for i in range(metadata.num_row_groups)]
            known = [group.statistics for group in groups]
    except (OSError, ValueError, pa.ArrowException) as error:
        raise StoreDamagedError(f"{path} cannot be read: {error}") from error
    if not known or not all(each is not None and each.has_min_max for each in known):
        return None
    ends = [(os.fsencode(each.min), os.fsencode(each.max)) for each in known]
    return min(first for first, _ in ends), max(last for _, last in ends)


def read_ids(path: Path) -> npt.NDArray[np.int64]:
    """Read the ids that a shard's index holds, ``(rows,)``.

    Raises:
        StoreDamagedError: the file or the column is missing or damaged.
    """
    column = read_table(path, ["id"]).column("id")
    if column.null_count or str(column.type) != "int64":
        raise StoreDamagedError(f"{path}: column id holds {column.type}, expected int64")
    ids: npt.NDArray[np.int64] = column.to_numpy()
    return ids


def read_images(path: Path, *, digests: bool = True) -> Images:
    """Read the columns of a shard's index that identify its images.

    Args:
        path: file of the index.
        digests: read the SHA-256 of the files now, not once one is asked for.

    Raises:
        StoreDamagedError: the file or a column is missing or damaged.
    """
    table = read_table(path, ["path", "size", "mtime_ns", *(["sha256"] if digests else [])])
    return Images(
        PackedPaths(_paths_of(table.column("path"))),
        table.column("size").to_numpy(),
        table.column("mtime_ns").to_numpy(),
        _LazyDigests(path, table.column("sha256").to_pylist() if digests else None),
    )


def _paths_of(column: Any) -> Iterator[bytes]:
    """Yield the paths of a column, which are text or bytes."""
    for part in column.chunks:
        for start in range(0, len(part), ROWS_AT_ONCE):
            yield from map(os.fsencode, part.slice(start, ROWS_AT_ONCE).to_pylist())


class _LazyDigests(Sequence[bytes]):
    """SHA-256 of the files of an index, read when one is asked for."""

    def __init__(self, path: Path, digests: list[bytes | None] | None) -> None:
        self._path = path
        self._digests = digests

    def _values(self) -> list[bytes | None]:
        if self._digests is None:
            self._digests = read_column(self._path, "sha256")
        return self._digests

    def __getitem__(self, row: Any) -> Any:
        return self._values()[row] or b""

    def __len__(self) -> int:
        return len(self._values())


def read_records(path: Path) -> list[ImageRecord]:
    """Read all columns of a shard's index.

    Raises:
        StoreDamagedError: the file or a column is missing or damaged.
    """
    table = read_table(path, list(ImageRecord._fields))
    columns = [table.column(name).to_pylist() for name in ImageRecord._fields]
    return [
        ImageRecord(os.fsencode(name), size, mtime, width, height, digest or b"")
        for name, size, mtime, width, height, digest in zip(*columns, strict=True)
    ]


def read_table(path: Path, names: list[str]) -> Any:
    """Read columns of a shard's index as a :class:`pyarrow.Table`.

    Raises:
        StoreDamagedError: the file or a column is missing or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as file:
            # read_table starts threads, and 2 of 100 processes that ended soon after aborted.
            parquet = pq.ParquetFile(file, pre_buffer=False)
            table = parquet.read(columns=names, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise StoreDamagedError(f"{path} cannot be read: {error}") from error
    missing = set(names) - set(table.column_names)
    if missing:
        raise StoreDamagedError(f"{path} has no column {', '.join(sorted(missing))}")
    return table
