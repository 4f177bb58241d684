"""What every format has in common: it takes block after block, and is then complete."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from extractor.export.blocks import Block, RowForm

__all__ = ["Layout", "Writer"]


@dataclass(frozen=True)
class Layout:
    """What a writer knows before the first row.

    Attributes:
        rows: Number of rows.
        shape: Shape of one embedding.
        form: Type and length of the rows.
        column: Name of the column of the embeddings, where a format has columns.
        text_paths: Whether all paths are UTF-8.
        root: Folder that paths are relative to.
        has_unit_length: Whether the rows have unit length.
        provenance: How the rows were made, for JSON.
    """

    rows: int
    shape: tuple[int, ...]
    form: RowForm
    column: str
    text_paths: bool
    root: str
    has_unit_length: bool
    provenance: Mapping[str, Any] = field(repr=False)

    @property
    def dim(self) -> int:
        """Number of values in one embedding."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the written values."""
        return self.form.dtype


class Writer(ABC):
    """Writes one format.

    Args:
        path: File or empty folder to write to.
        layout: What is to be written.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path = path
        self.layout = layout

    @abstractmethod
    def append(self, block: Block) -> None:
        """Write the next rows."""

    @abstractmethod
    def close(self) -> None:
        """Complete the files."""
