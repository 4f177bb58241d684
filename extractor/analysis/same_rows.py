"""Which rows and which files are equal to the last bit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from extractor.analysis.unit_rows import Numbers
from extractor.reading.reader import FeatureStore, shard_table
from extractor.search.knn import Features, row_blocks
from extractor.store.index import DIGEST_BYTES

__all__ = ["Files", "SameRows", "first_of_equal"]

BLOCK_BYTES = 8 * 2**20
COLUMNS = ("width", "height", "size", "mtime_ns")


@dataclass(frozen=True)
class SameRows:
    """Rows that have the same bytes.

    Attributes:
        first: ``(N,)`` int64, the first row with the same bytes. A row without a direction, which
            is zero or holds NaN or infinity, is like no other.
        usable: ``(N,)`` bool, whether each row has a direction.
    """

    first: Numbers
    usable: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, features: Features) -> SameRows:
        """Read all rows once, in blocks."""
        row_bytes = int(np.prod(features.shape[1:])) * features.dtype.itemsize
        hashes = np.empty(len(features), np.uint64)
        usable = np.empty(len(features), bool)
        factors = np.random.default_rng(0).integers(2**63, size=max(row_bytes, 1), dtype=np.uint64)
        for start, block in row_blocks(features, max(BLOCK_BYTES // max(row_bytes, 1), 1)):
            chunk = slice(start, start + len(block))
            usable[chunk] = np.logical_and(np.isfinite(block).all(axis=1), block.any(axis=1))
            words = np.ascontiguousarray(block).view(f"u{block.dtype.itemsize}")
            odd = factors[: words.shape[1]] * np.uint64(2) + np.uint64(1)
            hashes[chunk] = (words.astype(np.uint64) * odd).sum(axis=1)
        first = first_of_equal(hashes)
        first[~usable] = np.flatnonzero(~usable)
        later = np.flatnonzero(first != np.arange(len(first)))
        for row in later.tolist():  # another row may have the same hash
            if not np.array_equal(features[row], features[first[row]]):
                first[row] = row
        return cls(first, usable)


def first_of_equal(values: npt.NDArray[np.uint64]) -> Numbers:
    """Return for each value the first position of an equal one, ``(n,)``.

    >>> first_of_equal(np.array([7, 5, 7], np.uint64)).tolist()
    [0, 1, 0]

    Args:
        values: ``(n,)``, or ``(n, m)`` for values of several words.
    """
    columns = values if values.ndim == 2 else values[:, None]
    order = np.lexsort(columns.T[::-1])  # stable: equal values stay in their order
    ordered = columns[order]
    is_new = np.ones(len(order), bool)
    is_new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.empty(len(order), np.int64)
    first[order] = order[np.flatnonzero(is_new)[np.cumsum(is_new) - 1]] if len(order) else order
    return first


@dataclass(frozen=True)
class Files:
    """What the index says about the image files of a store.

    Attributes:
        digests: ``(N, 4)`` uint64, SHA-256; zeros where it was not computed.
        width: ``(N,)`` pixels.
        height: ``(N,)`` pixels.
        size: ``(N,)`` bytes.
        mtime_ns: ``(N,)`` modification times.
    """

    digests: npt.NDArray[np.uint64]
    width: Numbers
    height: Numbers
    size: Numbers
    mtime_ns: Numbers

    @classmethod
    def of(cls, store: FeatureStore) -> Files:
        """Read the index of a store.

        Raises:
            StoreDamagedError: A file is damaged.
            StoreReplacedError: The store was replaced since it was opened.
        """
        tables = [
            shard_table(store, shard, [*COLUMNS, "sha256"]) for shard in store.manifest.shards
        ]
        columns = (
            [np.asarray(table.column(name), np.int64) for table in tables] for name in COLUMNS
        )
        nothing = bytes(DIGEST_BYTES)
        digests = b"".join(
            digest or nothing for table in tables for digest in table.column("sha256").to_pylist()
        )
        return cls(
            np.frombuffer(digests, np.uint64).reshape(-1, DIGEST_BYTES // 8),
            *(np.concatenate(parts) if parts else np.empty(0, np.int64) for parts in columns),
        )

    @property
    def hashed(self) -> npt.NDArray[np.bool_]:
        """``(N,)``, whether the SHA-256 of each file is known."""
        return np.asarray(self.digests.any(axis=1), bool)
