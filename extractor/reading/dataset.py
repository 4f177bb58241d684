"""Rows for ``torch.utils.data.DataLoader``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from extractor.errors import UsageError

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from extractor.reading.rows import Rows

    _Base = Dataset[Any]
else:
    _Base = object  # reading a store needs no torch

__all__ = ["FeatureDataset"]


class FeatureDataset(_Base):
    """Map-style dataset of embeddings, with labels if there are any.

    It has what :class:`torch.utils.data.DataLoader` asks of a dataset, and reads a whole batch at
    once.

    Args:
        rows: Rows of a store.
        labels: One value per row, or None.

    Raises:
        UsageError: Another number of labels than of rows, or no sequence.
    """

    def __init__(self, rows: Rows, labels: Sequence[Any] | npt.ArrayLike | None = None) -> None:
        self.rows = rows
        self.labels = None if labels is None else np.asarray(labels)
        if self.labels is not None and not self.labels.ndim:
            got = type(labels).__name__
            raise UsageError(f"labels: got {got}, expected a list or an array, one value per row")
        if self.labels is not None and len(self.labels) != len(rows):
            raise UsageError(f"labels: got {len(self.labels)} for {len(rows)} rows")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        """Return a tensor ``(dim,)``, or a pair of it and its label."""
        row = self.rows.torch(index)
        return row if self.labels is None else (row, self.labels[index])

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """Return the items of a batch, read at once."""
        batch = self.rows.torch(indices)
        if self.labels is None:
            return list(batch)
        return list(zip(batch, self.labels[indices], strict=True))
