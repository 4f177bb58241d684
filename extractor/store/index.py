"""The index of a shard: a Parquet file, row-aligned with its features."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from extractor.store.journal import ImageRecord

__all__ = ["index_bytes", "read_index"]


def index_bytes(records: Sequence[ImageRecord]) -> bytes:
    """The Parquet file of a shard's index."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths: list[str] | list[bytes] = [record.path for record in records]
    kind = pa.binary()
    with contextlib.suppress(UnicodeDecodeError):
        paths = [record.path.decode() for record in records]
        kind = pa.string()
    table = pa.table(
        {
            "path": pa.array(paths, kind),
            "size": pa.array([record.size for record in records], pa.int64()),
            "mtime_ns": pa.array([record.mtime_ns for record in records], pa.int64()),
            "width": pa.array([record.width for record in records], pa.int32()),
            "height": pa.array([record.height for record in records], pa.int32()),
        }
    )
    content = io.BytesIO()
    pq.write_table(table, content)
    return content.getvalue()


def read_index(path: Path) -> Iterator[ImageRecord]:
    """The rows of a shard's index."""
    import pyarrow.parquet as pq

    with path.open("rb") as file:
        columns = pq.read_table(file).to_pydict()
    for name, *rest in zip(*columns.values(), strict=True):
        yield ImageRecord(os.fsencode(name), *rest)
