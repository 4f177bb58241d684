"""Rows of a store with their ids and their index, in blocks that fit into memory."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from extractor.errors import UsageError
from extractor.reading.reader import FeatureStore, shard_table

__all__ = ["Block", "RowForm", "blocks_of", "has_text_paths"]

BLOCK_BYTES = 32 * 2**20
BLOCK_ROWS = 16_384
TINY = 1e-12  # a row of zeros stays one, as in torch.nn.functional.normalize
INDEX = ["path", "width", "height", "sha256"]


@dataclass(frozen=True)
class RowForm:
    """What becomes of a row before it is written.

    Attributes:
        dtype: Type of the written values.
        unit_length: Whether rows are scaled to unit length.
    """

    dtype: np.dtype[Any]
    unit_length: bool = False

    def apply(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return rows ``(n, *shape)`` in this form.

        Raises:
            UsageError: A value is too large for the type.
        """
        changed = rows
        if self.unit_length:
            wide = rows.astype(np.float64)
            lengths = np.sqrt((wide.reshape(len(rows), -1) ** 2).sum(1)).clip(TINY)
            changed = wide / lengths.reshape(-1, *[1] * (rows.ndim - 1))
        with np.errstate(over="ignore"):
            written: npt.NDArray[Any] = np.ascontiguousarray(changed, self.dtype)
        if not np.array_equal(np.isfinite(written), np.isfinite(rows)):
            raise UsageError(
                f"dtype: got {self.dtype}, but a value is too large for it; use float32, or unit "
                "length"
            )
        return written


@dataclass(frozen=True)
class Block:
    """Some rows, one after the other.

    Attributes:
        ids: ``(n,)`` int64, the id of each row.
        rows: ``(n, *shape)``, the embeddings.
        index: :class:`pyarrow.Table` with path, width, height and sha256.
    """

    ids: npt.NDArray[np.int64]
    rows: npt.NDArray[Any]
    index: Any

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.rows) == len(self.index):
            raise ValueError(
                f"got {len(self.ids)} ids, {len(self.rows)} rows and {len(self.index)} of the index"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> Block:
        start, stop, _ = rows.indices(len(self))
        return Block(self.ids[rows], self.rows[rows], self.index.slice(start, stop - start))

    @property
    def flat(self) -> npt.NDArray[Any]:
        """``(n, dim)``, the embeddings as vectors."""
        return self.rows.reshape(len(self), math.prod(self.rows.shape[1:]))

    @property
    def paths(self) -> list[bytes]:
        """Path of each row's image."""
        return [os.fsencode(path) for path in self.index.column("path").to_pylist()]


def has_text_paths(store: FeatureStore) -> bool:
    """Return whether all paths are UTF-8, so that a table can hold them as strings."""
    import pyarrow as pa

    return all(
        pa.types.is_string(shard_table(store, shard, ["path"]).schema.field("path").type)
        for shard in store.manifest.shards
    )


def blocks_of(
    store: FeatureStore, ids: npt.NDArray[np.int64] | None, form: RowForm, *, text_paths: bool
) -> Iterator[Block]:
    """Yield the rows of a store, in their order.

    Args:
        store: The store. Its rows are read as they are needed.
        ids: Ids of the rows that are wanted, ascending; None for all.
        form: What becomes of the rows.
        text_paths: Whether the column of the paths holds strings; else it holds bytes.
    """
    import pyarrow as pa

    size = max(min(BLOCK_BYTES // max(store.dim * 4, 1), BLOCK_ROWS), 1)
    start = 0
    for shard in store.manifest.shards:
        shard_ids = store.ids[start : start + shard.live_rows]
        table = None
        for first in range(0, len(shard_ids), size):
            block_ids = shard_ids[first : first + size]
            wanted = np.isin(block_ids, ids) if ids is not None else np.ones(len(block_ids), bool)
            if not wanted.any():
                continue
            if table is None:
                table = shard_table(store, shard, INDEX)
                at = table.schema.get_field_index("path")
                paths = table.column("path").cast(pa.string() if text_paths else pa.binary())
                table = table.set_column(at, "path", paths)
            rows = store.features[start + first : start + first + len(block_ids)]
            index = table.slice(first, len(block_ids))
            if not wanted.all():
                rows, block_ids, index = rows[wanted], block_ids[wanted], index.filter(wanted)
            yield Block(block_ids, form.apply(np.asarray(rows)), index)
        start += len(shard_ids)
