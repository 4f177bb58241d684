"""Exports as a flat index of faiss, written row by row; faiss itself would hold all rows in memory.

The layout is that of ``faiss/impl/index_write.cpp``: an ``IndexIDMap`` around an ``IndexFlat``.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from extractor.export.blocks import Block
from extractor.export.writers import Layout, Writer

__all__ = ["FaissWriter"]

# faiss.METRIC_INNER_PRODUCT and faiss.METRIC_L2
INNER_PRODUCT, L2 = 0, 1


class FaissWriter(Writer):
    """A file for ``faiss.read_index``, which answers with the ids of the store.

    It compares by inner product if the rows have unit length, which is the cosine, and by squared
    Euclidean distance if not.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        super().__init__(path, layout)
        self._file = path.open("wb")
        self._ids: list[np.ndarray] = []
        self._metric = INNER_PRODUCT if layout.has_unit_length else L2
        values = layout.rows * layout.dim
        self._file.write(
            b"IxMp"
            + self._header()
            + (b"IxFI" if self._metric == INNER_PRODUCT else b"IxF2")
            + self._header()
            + struct.pack("<Q", values)
        )

    def _header(self) -> bytes:
        dim, rows = self.layout.dim, self.layout.rows
        unused = 1 << 20
        is_trained = 1
        return struct.pack("<iqqqBi", dim, rows, unused, unused, is_trained, self._metric)

    def append(self, block: Block) -> None:
        """Write the next rows as float32."""
        self._file.write(np.ascontiguousarray(block.flat, "<f4").data)
        self._ids.append(block.ids)

    def close(self) -> None:
        """Write the ids, which follow all rows."""
        ids = np.concatenate([np.empty(0, "<i8"), *self._ids]).astype("<i8")
        self._file.write(struct.pack("<Q", len(ids)) + ids.tobytes())
        self._file.close()
