"""Exports as tables: Parquet, CSV, and the folders that clip-retrieval reads."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from extractor.export.arrays import open_npy
from extractor.export.blocks import Block
from extractor.export.writers import Layout, Writer

__all__ = ["ClipRetrievalWriter", "CsvWriter", "ParquetFileWriter", "ParquetWriter"]

# Rows of one file: that of a wide embedding stays far below the 16 GB that Milvus accepts.
FILE_ROWS = 65_536


def _schema(layout: Layout) -> Any:
    import pyarrow as pa

    values = pa.from_numpy_dtype(layout.dtype)
    columns = [
        ("id", pa.int64()),
        ("path", pa.string() if layout.text_paths else pa.binary()),
        (layout.column, pa.list_(values, layout.dim)),
        ("sha256", pa.binary(32)),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
    return pa.schema(columns, metadata={"extractor": json.dumps(layout.provenance)})


class ParquetFileWriter(Writer):
    """One Parquet file: id, path, embedding, sha256, width, height."""

    def __init__(self, path: Path, layout: Layout) -> None:
        super().__init__(path, layout)
        import pyarrow.parquet as pq

        self._schema = _schema(layout)
        paths = ("id", "path", "sha256", "width", "height")
        self._file = path.open("wb")  # pyarrow itself opens no name that is not UTF-8
        self._writer = pq.ParquetWriter(
            self._file,
            self._schema,
            use_dictionary=False,  # hardly a value occurs twice
            compression={
                **dict.fromkeys(paths, "ZSTD"),
                f"{layout.column}.list.element": "NONE",
            },
            write_statistics=["id", "path"],
        )

    def append(self, block: Block) -> None:
        """Write the next rows as a row group."""
        import pyarrow as pa

        values = pa.array(block.flat.reshape(-1))
        columns = {
            "id": pa.array(block.ids, pa.int64()),
            self.layout.column: pa.FixedSizeListArray.from_arrays(values, self.layout.dim),
            **{name: block.index.column(name) for name in ("path", "sha256", "width", "height")},
        }
        table = pa.table([columns[name] for name in self._schema.names], schema=self._schema)
        self._writer.write_table(table)

    def close(self) -> None:
        """Complete the file."""
        self._writer.close()
        self._file.close()


class ParquetWriter(Writer):
    """A folder of Parquet files of 65,536 rows."""

    def __init__(self, path: Path, layout: Layout) -> None:
        super().__init__(path, layout)
        self._files = 0
        self._rows = 0
        self._writer = self._next()

    def _next(self) -> ParquetFileWriter:
        name = f"part-{self._files:05}.parquet"
        self._files += 1
        self._rows = 0
        return ParquetFileWriter(self.path / name, self.layout)

    def append(self, block: Block) -> None:
        """Write the next rows."""
        while len(block):
            if self._rows == FILE_ROWS:
                self._writer.close()
                self._writer = self._next()
            part = block[: FILE_ROWS - self._rows]
            self._writer.append(part)
            self._rows += len(part)
            block = block[len(part) :]

    def close(self) -> None:
        """Complete the last file."""
        self._writer.close()


class CsvWriter(Writer):
    """One CSV file; an embedding is one field, ``[0.5,-1.25]``."""

    def __init__(self, path: Path, layout: Layout) -> None:
        super().__init__(path, layout)
        # A name that is not UTF-8 keeps its bytes.
        self._file = path.open("w", encoding="utf-8", errors="surrogateescape", newline="")
        self._csv = csv.writer(self._file, lineterminator="\n")
        self._csv.writerow(["id", "path", "sha256", "width", "height", layout.column])

    def append(self, block: Block) -> None:
        """Write the next rows, each value in the fewest digits that give it back."""
        index = block.index
        self._csv.writerows(
            zip(
                block.ids.tolist(),
                map(os.fsdecode, block.paths),
                [(digest or b"").hex() for digest in index.column("sha256").to_pylist()],
                index.column("width").to_pylist(),
                index.column("height").to_pylist(),
                _vectors_as_text(block),
                strict=True,
            )
        )

    def close(self) -> None:
        """Complete the file."""
        self._file.close()


def _vectors_as_text(block: Block) -> list[str]:
    return [f"[{','.join(map(str, row))}]" for row in block.flat.astype(np.float32, copy=False)]


class ClipRetrievalWriter(Writer):
    """``img_emb/img_emb_0.npy`` and ``metadata/metadata_0.parquet`` with ``image_path``."""

    def __init__(self, path: Path, layout: Layout) -> None:
        super().__init__(path, layout)
        (path / "img_emb").mkdir()
        (path / "metadata").mkdir()
        parts = max(-(-layout.rows // FILE_ROWS), 1)
        self._digits = len(str(parts - 1))
        self._part = 0
        self._in_part = 0
        # A byte that is not UTF-8 is a surrogate in text, which UTF-8 replaces.
        root = layout.root.encode("utf-8", "replace").decode()
        self._text_paths = layout.text_paths and root == layout.root
        self._open()

    def _open(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        layout, number = self.layout, f"{self._part:0{self._digits}}"
        rows = min(layout.rows - self._part * FILE_ROWS, FILE_ROWS)
        self._rows: BinaryIO = open_npy(
            self.path / "img_emb" / f"img_emb_{number}.npy", (rows, layout.dim), layout.dtype
        )
        self._schema = pa.schema(
            [
                ("image_path", pa.string() if self._text_paths else pa.binary()),
                ("id", pa.int64()),
                ("sha256", pa.binary(32)),
                ("width", pa.int32()),
                ("height", pa.int32()),
            ],
            metadata={"extractor": json.dumps(layout.provenance)},
        )
        self._file = (self.path / "metadata" / f"metadata_{number}.parquet").open("wb")
        self._metadata = pq.ParquetWriter(self._file, self._schema)

    def append(self, block: Block) -> None:
        """Write the next rows."""
        while len(block):
            if self._in_part == FILE_ROWS:
                self.close()
                self._part += 1
                self._in_part = 0
                self._open()
            part = block[: FILE_ROWS - self._in_part]
            self._append(part)
            self._in_part += len(part)
            block = block[len(part) :]

    def _append(self, block: Block) -> None:
        import pyarrow as pa

        root = os.fsencode(self.layout.root)
        paths: list[Any] = [os.path.join(root, path) for path in block.paths]
        if self._text_paths:
            paths = [path.decode() for path in paths]
        columns = {
            "image_path": pa.array(paths, self._schema.field("image_path").type),
            "id": pa.array(block.ids, pa.int64()),
            **{name: block.index.column(name) for name in ("sha256", "width", "height")},
        }
        self._rows.write(block.flat.data)
        self._metadata.write_table(
            pa.table([columns[name] for name in self._schema.names], schema=self._schema)
        )

    def close(self) -> None:
        """Complete the last files."""
        self._rows.close()
        self._metadata.close()
        self._file.close()
