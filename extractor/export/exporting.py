"""``export_store()``: a finished store in the format of another tool."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from extractor.errors import UsageError
from extractor.export.blocks import RowForm, blocks_of, has_text_paths
from extractor.export.formats import format_for
from extractor.export.target import Target
from extractor.export.writers import Layout
from extractor.reading.reader import FeatureStore
from extractor.store.history import Changes
from extractor.version import __version__

__all__ = ["ExportReport", "export_store"]

COLUMNS = ("id", "path", "sha256", "width", "height")
DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    >>> report = export_store("features/resnet50", "vectors.csv")  # doctest: +SKIP
    >>> report.format, report.rows, report.token == store.token  # doctest: +SKIP
    ('csv', 25, True)

    Attributes:
        path: File or folder that was written.
        format: Name of the format.
        rows: Number of rows in it.
        removed: Number of ids that are gone since the earlier state; 0 without one.
        token: Token of the state that was exported, for the next ``since``.
    """

    path: Path
    format: str
    rows: int
    removed: int
    token: str


def export_store(
    store: FeatureStore | str | os.PathLike[str],
    to: str | os.PathLike[str],
    format: str | None = None,
    *,
    column: str = "embedding",
    dtype: str | None = None,
    normalize: bool = False,
    since: str | None = None,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> ExportReport:
    """Write the rows of a store in the format of another tool.

    The target appears complete or not at all. ``_export.json`` in a folder, or a file's name with
    ``.json`` added, says how the rows were made.

    >>> export_store("features/resnet50", "table").rows  # doctest: +SKIP
    25
    >>> import pyarrow.parquet as pq  # doctest: +SKIP
    >>> pq.read_table("table").column_names  # doctest: +SKIP
    ['id', 'path', 'embedding', 'sha256', 'width', 'height']

    Args:
        store: The store, or its folder.
        to: File or folder to write.
        format: ``npy``, ``parquet``, ``clip-retrieval``, ``faiss``, ``hdf5`` or ``csv``; None for
            that of the ending of ``to``, or ``parquet``.
        column: Name of the column of the embeddings, such as ``vector``.
        dtype: ``float32`` or ``float16``; None for that of the store.
        normalize: Scale rows to unit length.
        since: Token of an earlier state. Only rows that are new, changed or moved since then are
            written. ``_export.json`` lists the ids to remove.
        overwrite: Replace an export that is there.
        progress: Called with the phase (``writing``), the number of rows that are done, and how
            many there are.

    Raises:
        UsageError: The target exists, or an argument makes no sense.
        UnknownTokenError: The store does not remember the state of ``since``.
        InstallationError: The format needs a package that is missing.
        StoreError: The store is damaged, or the target cannot be written.
    """
    if not isinstance(store, FeatureStore):
        store = FeatureStore.open(store)
    path = Path(to)
    chosen = format_for(path, format)
    if column in COLUMNS or not column or "." in column or "/" in column:
        raise UsageError(
            f"column: got {column!r}, expected a name other than {', '.join(COLUMNS)}, without "
            "periods and slashes"
        )
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype: got {dtype!r}, expected one of {', '.join(DTYPES)}")
    if chosen.only_float32 and dtype == "float16":
        raise UsageError(f"dtype: {chosen.name} holds float32; leave the option out")
    written_dtype = "float32" if chosen.only_float32 else dtype or store.info.dtype
    target = Target(path, is_folder=chosen.is_folder, overwrite=overwrite)
    changes = None if since is None else store.changes_since(since)
    ids = None if changes is None else np.union1d(changes.added, changes.moved)
    form = RowForm(np.dtype(written_dtype), unit_length=normalize and not store.info.normalized)
    provenance = {
        "format": chosen.name,
        "rows": len(store) if ids is None else len(ids),
        "column": column,
        "dtype": written_dtype,
        **_provenance(store, normalized=normalize or store.info.normalized),
    }
    layout = Layout(
        rows=provenance["rows"],
        shape=store.info.shape,
        form=form,
        column=column,
        text_paths=has_text_paths(store),
        root=store.root,
        has_unit_length=provenance["normalized"],
        provenance=provenance,
    )
    show = progress or (lambda *_: None)
    with target.writing() as partial:
        writer, done = chosen.writer(partial, layout), 0
        try:
            for block in blocks_of(store, ids, form, text_paths=layout.text_paths):
                writer.append(block)
                done += len(block)
                show("writing", done, layout.rows)
        finally:
            writer.close()
        target.publish({**provenance, **_changes(since, changes)})
    removed = 0 if changes is None else len(changes.removed)
    return ExportReport(target.path, chosen.name, layout.rows, removed, store.token)


def _provenance(store: FeatureStore, *, normalized: bool) -> dict[str, Any]:
    """Return how the rows were made; the same store gives the same bytes."""
    description = asdict(store.manifest.description)
    return {
        "shape": list(store.info.shape),
        "normalized": normalized,
        "store": str(store.path.absolute()),
        "token": store.token,
        "created": store.info.created,
        "exporter": f"extractor {__version__}",
        "root": store.root,
        "model": store.info.model,
        "weights_sha256": store.info.weights_sha256,
        **{
            name: description[name]
            for name in ("backbone", "embedding", "preprocess", "computation", "software")
        },
    }


def _changes(since: str | None, changes: Changes | None) -> dict[str, Any]:
    """Return what a database that follows the store has to do besides writing the rows."""
    if changes is None:
        return {}
    return {
        "since": since,
        "added": _listed(changes.added),
        "removed": _listed(changes.removed),
        "moved": _listed(changes.moved),
        "changed": _listed(changes.changed),
    }


def _listed(ids: npt.NDArray[np.int64]) -> list[Any]:
    values: list[Any] = ids.tolist()
    return values
