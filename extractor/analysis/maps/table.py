"""Table of a map as one Parquet file, as embedding-atlas reads it."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from extractor.analysis.maps.neighbors import CHUNK, RowNeighbors
from extractor.analysis.maps.thumbnails import ImageCounts, Pixels, Thumbnails
from extractor.errors import UsageError
from extractor.reading.reader import shard_table
from extractor.search.sheet import check_new_file
from extractor.store.atomic import sync

if TYPE_CHECKING:
    from extractor.analysis.mapping import StoreMap

__all__ = ["check_table", "write_table"]

GROUP_ROWS = 1024  # of a row group, which is in memory with its thumbnails
THUMBNAIL = 128  # pixels of the longer edge; about 5 KB as a JPEG
QUALITY = 85

Rows = npt.NDArray[np.int64]


def check_table(path: str | os.PathLike[str], neighbors: object, *, overwrite: bool) -> None:
    """Check that a table may be written to a file.

    Raises:
        UsageError: The suffix is not that of Parquet, the file exists, or the number of neighbors
            is no integer of at least 0.
    """
    if isinstance(neighbors, bool) or not isinstance(neighbors, int) or neighbors < 0:
        raise UsageError(f"neighbors: got {neighbors!r}, expected an integer of at least 0")
    check_new_file(path, "parquet", (".parquet",), overwrite=overwrite)


def write_table(
    store_map: StoreMap,
    path: str | os.PathLike[str],
    labels: Sequence[str] | None,
    *,
    neighbors: int,
    root: str | os.PathLike[str] | None,
    progress: Callable[[int, int], None] | None,
) -> ImageCounts:
    """Write the rows that are in a map to a Parquet file, which appears whole or not at all.

    Args:
        store_map: The map.
        path: The file.
        labels: Label of each row of the store; None for no column of labels.
        neighbors: Number of neighbors of each row; 0 for no column of neighbors.
        root: Folder of the images; None for no column of thumbnails.
        progress: Called with the number of rows that are written, and of all.

    Returns:
        What became of the images that were to be in the table.

    Raises:
        UsageError: The file cannot be written, or the neighbors would take too long.
        StoreError: The index of the store is damaged.
    """
    import pyarrow.parquet as pq

    table = _Table(store_map, labels, neighbors, root)
    partial = Path(path).with_name(f"{Path(path).name}.partial")
    try:
        try:
            with (
                partial.open("wb") as written,  # pyarrow itself opens no name that is not UTF-8
                pq.ParquetWriter(written, table.schema, compression="zstd") as writer,
            ):
                done = 0
                for group in table.groups():
                    writer.write_table(group)
                    done += len(group)
                    if progress is not None:
                        progress(done, len(table.rows))
            with partial.open("rb") as file:
                sync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"parquet: cannot write {path}: {reason}") from error
    return table.thumbnails.counts if table.thumbnails is not None else ImageCounts()


class _Table:
    """Columns of the table: id, path, x, y, label, neighbors, image.

    Args:
        store_map: The map.
        labels: As for :func:`write_table`.
        neighbors: As for :func:`write_table`.
        root: As for :func:`write_table`.

    Attributes:
        rows: ``(n,)``, rows of the store in the order of the table.
        schema: Schema of the table.
        thumbnails: What reads the images; None for no images.
    """

    def __init__(
        self,
        store_map: StoreMap,
        labels: Sequence[str] | None,
        neighbors: int,
        root: str | os.PathLike[str] | None,
    ) -> None:
        self._map = store_map
        self._labels = labels
        self.rows = store_map.rows
        self._neighbors: RowNeighbors | None = None
        if neighbors:
            self._neighbors = RowNeighbors(
                store_map.store, len(self.rows), neighbors, "--neighbors 0"
            )
        self.thumbnails = None if root is None else Thumbnails(root, THUMBNAIL)
        self.schema = self._schema()
        # Neighbors are named by their row in the table.
        self._number = np.full(len(store_map.store), -1, np.int64)
        self._number[self.rows] = np.arange(len(self.rows))

    def _schema(self) -> Any:
        import pyarrow as pa

        columns = [("id", pa.int64()), ("path", pa.string()), ("x", pa.float32())]
        columns.append(("y", pa.float32()))
        if self._labels is not None:
            columns.append(("label", pa.string()))
        if self._neighbors is not None:
            ids = [("ids", pa.list_(pa.int64())), ("distances", pa.list_(pa.float32()))]
            columns.append(("neighbors", pa.struct(ids)))
        if self.thumbnails is not None:
            columns.append(("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
        store = self._map.store
        about = {"store": str(store.path), "token": store.token, "model": store.info.model}
        about = {**about, "method": self._map.method}
        return pa.schema(columns, metadata={"extractor": json.dumps(about)})

    def groups(self) -> Iterator[Any]:
        """Yield the table in parts of at most 1,024 rows."""
        import pyarrow as pa

        for rows, index in self._of_shards():
            found, distances = self._near(rows)
            for start in range(0, len(rows), GROUP_ROWS):
                part = slice(start, start + GROUP_ROWS)
                names = index.column("path").slice(start, GROUP_ROWS).to_pylist()
                paths = [os.fsdecode(name) for name in names]
                points = self._map.coordinates[rows[part]]
                columns: dict[str, Any] = {
                    "id": self._map.store.ids[rows[part]],
                    "path": [_text(path) for path in paths],
                    "x": points[:, 0],
                    "y": points[:, 1],
                }
                if self._labels is not None:
                    columns["label"] = [_text(self._labels[row]) for row in rows[part].tolist()]
                if self._neighbors is not None:
                    columns["neighbors"] = _neighbor_structs(found[part], distances[part])
                if self.thumbnails is not None:
                    digests = index.column("sha256").slice(start, GROUP_ROWS).to_pylist()
                    images = map(_encoded, self.thumbnails.read(paths, digests))
                    columns["image"] = [
                        None if image is None else {"bytes": image, "path": path}
                        for image, path in zip(images, columns["path"], strict=True)
                    ]
                yield pa.table(columns, schema=self.schema)

    def _of_shards(self) -> Iterator[tuple[Rows, Any]]:
        """Yield rows that are in the map, at most 4,096, and their part of the index."""
        store, first = self._map.store, 0
        is_mapped = self._number >= 0
        for shard in store.manifest.shards:
            rows = np.arange(first, first + shard.live_rows)
            first += shard.live_rows
            mapped = is_mapped[rows]
            if not mapped.any():
                continue
            table = shard_table(store, shard, ["path", "sha256"]).filter(mapped)
            rows = rows[mapped]
            for start in range(0, len(rows), CHUNK):
                yield rows[start : start + CHUNK], table.slice(start, CHUNK)

    def _near(self, rows: Rows) -> tuple[Rows, npt.NDArray[np.float32]]:
        """Return the neighbors of rows as numbers in the table, -1 for none, and distances."""
        if self._neighbors is None:
            return np.empty((len(rows), 0), np.int64), np.empty((len(rows), 0), np.float32)
        found, distances = self._neighbors.of(rows)
        return np.where(found < 0, -1, self._number[found]), distances


def _neighbor_structs(found: Rows, distances: npt.NDArray[np.float32]) -> list[dict[str, Any]]:
    structs = []
    for numbers, far in zip(found, distances, strict=True):
        known = numbers >= 0
        structs.append({"ids": numbers[known].tolist(), "distances": far[known].tolist()})
    return structs


def _encoded(pixels: Pixels | None) -> bytes | None:
    """Return a thumbnail as a JPEG."""
    from PIL import Image

    if pixels is None:
        return None
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=QUALITY)
    return content.getvalue()


def _text(text: str) -> str:
    """Return text in UTF-8, with escapes for the bytes of a name that is not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()
