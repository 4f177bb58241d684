"""Rows as a table of pyarrow or pandas."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from extractor.errors import UsageError
from extractor.store.index import path_array

if TYPE_CHECKING:
    from extractor.reading.rows import Rows

__all__ = ["table_of"]

KINDS = ("arrow", "pandas")


def table_of(rows: Rows, kind: str, *, embeddings: bool) -> Any:
    """Return the table that :meth:`extractor.reading.rows.Rows.frame` describes."""
    import pyarrow as pa

    if kind not in KINDS:
        raise UsageError(f"frame: got {kind!r}, expected one of {', '.join(KINDS)}")
    if kind == "pandas" and importlib.util.find_spec("pandas") is None:
        raise UsageError("frame: pandas is not installed; pip install pandas, or use kind='arrow'")
    columns: dict[str, Any] = {
        **({"id": pa.array(rows.ids, pa.int64())} if rows.has_ids else {}),
        "path": path_array([os.fsencode(path) for path in rows.paths]),
    }
    types = {"size": pa.int64(), "mtime_ns": pa.int64(), "width": pa.int32(), "height": pa.int32()}
    for name, type_ in types.items():
        columns[name] = pa.array(rows.column(name), type_)
    columns["sha256"] = pa.array(rows.column("sha256"), pa.binary(32))
    if embeddings:
        values = np.ascontiguousarray(rows.features[:]).reshape(-1)
        columns["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(values), rows.dim)
    table = pa.table(columns)
    return table.to_pandas() if kind == "pandas" else table
