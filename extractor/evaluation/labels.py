"""Labels of the rows of a store: from folders, a CSV file, a function or a mapping."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from extractor.errors import UsageError
from extractor.reading.reader import FeatureStore
from extractor.reading.rows import Rows, Selection
from extractor.text import first_line, plural

__all__ = ["Labels", "labels_of", "store_of"]

FOLDERS = "folders"  # labels are the names of folders

Labels: TypeAlias = (
    "str | os.PathLike[str] | Callable[[str], Any] | Mapping[str, Any] | Sequence[Any] | None"
)
PATHS_SHOWN = 3


def store_of(rows: Rows) -> FeatureStore:
    """Return the store that rows belong to.

    Raises:
        UsageError: They belong to several stores.
    """
    while isinstance(rows, Selection):
        rows = rows.base
    if not isinstance(rows, FeatureStore):
        raise UsageError(
            f"store: got {type(rows).__name__}, expected a FeatureStore, a selection of one, or "
            "the folder of one"
        )
    return rows


def labels_of(rows: Rows, labels: Labels = None) -> list[str]:
    """Return the label of each row.

    Args:
        rows: A store or a selection of one.
        labels: None or ``folders`` for the name of the folder that holds the image; a CSV file with
            the columns ``path`` and ``label``; ``FILE.py:FUNCTION`` or a function, which gets a
            path; a mapping of paths; or one label per row.

    Raises:
        UsageError: A row has no label, or a label belongs to no row.
    """
    if labels is None or (isinstance(labels, str) and labels == FOLDERS):
        return _checked(rows.paths, [_folder(path) for path in rows.paths])
    if isinstance(labels, (str, os.PathLike)):
        name = os.fspath(labels)
        if re.fullmatch(r".*\.py:\w+", name, re.DOTALL):
            return _from_function(rows, _function(name), name)
        return _from_mapping(rows, _read_csv(Path(name)), name)
    if isinstance(labels, Mapping):
        return _from_mapping(rows, labels, "labels")
    if callable(labels):
        return _from_function(rows, labels, "labels")
    values = list(labels)
    if len(values) != len(rows):
        raise UsageError(
            f"labels: got {plural(len(values), 'label')} for {plural(len(rows), 'row')}"
        )
    return _checked(rows.paths, values)


def _folder(path: str) -> str | None:
    folder = path.rpartition("/")[0]
    return folder.rpartition("/")[2] or None


def _checked(paths: Sequence[str], values: Iterable[Any]) -> list[str]:
    """Return labels as text.

    Raises:
        UsageError: A row has none.
    """
    labels = [None if _is_missing(value) else str(value) for value in values]
    missing = [path for path, label in zip(paths, labels, strict=True) if not label]
    if missing:
        raise UsageError(
            f"labels: {plural(len(missing), 'row')} without a label: {_shown(missing)}; images lie "
            "in one folder per class, or name labels in a CSV file or a function"
        )
    return [label or "" for label in labels]


def _is_missing(value: Any) -> bool:
    """Return whether a value stands for no label: None, or NaN and NA of pandas."""
    if value is None or type(value).__name__ == "NAType":
        return True
    try:
        return bool(value != value)
    except (TypeError, ValueError):  # an array
        return False


def _shown(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - PATHS_SHOWN:,} more" if len(paths) > PATHS_SHOWN else ""
    return ", ".join(ascii(path)[1:-1] for path in paths[:PATHS_SHOWN]) + more


def _from_mapping(rows: Rows, labels: Mapping[str, Any], source: str) -> list[str]:
    store = store_of(rows)
    known = {os.path.normpath(_relative(store, path)): label for path, label in labels.items()}
    # An image that failed has a label but no row.
    failed = {str(failure.get("path")) for failure in store.failures}
    unknown = [path for path in known if path not in store and path not in failed]
    if unknown:
        raise UsageError(
            f"{source}: {plural(len(unknown), 'path')} not in {store.path}: {_shown(unknown)}; "
            f"paths are relative to {store.root}, or absolute"
        )
    return _checked(rows.paths, (known.get(path) for path in rows.paths))


def _relative(store: FeatureStore, path: str) -> str:
    root = store.root.rstrip("/") + "/"
    return os.fsdecode(path).removeprefix(root)


def _read_csv(path: Path) -> dict[str, str]:
    """Return the label of each path in a CSV file with a header.

    Raises:
        UsageError: It cannot be read, lacks a column, or gives one path two labels.
    """
    labels: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if not {"path", "label"} <= set(columns):
                raise UsageError(
                    f"{path}: got the columns {', '.join(columns) or 'none'}; expected a first "
                    "line with path and label"
                )
            for line in reader:
                image, label = line["path"] or "", line["label"] or ""
                if labels.setdefault(image, label) != label:
                    raise UsageError(
                        f"{path}, line {reader.line_num}: {image} has two labels, "
                        f"{labels[image]!r} and {label!r}"
                    )
    except (OSError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"labels: cannot read {path}: {reason}") from error
    return labels


def _from_function(rows: Rows, function: Callable[[str], Any], source: str) -> list[str]:
    labels = []
    for path in rows.paths:
        try:
            labels.append(function(path))
        except Exception as error:
            raise UsageError(
                f"{source}: {type(error).__name__} for {path!a}: {first_line(error)}"
            ) from error
    return _checked(rows.paths, labels)


def _function(name: str) -> Callable[[str], Any]:
    """Return the function that ``FILE.py:FUNCTION`` names.

    Raises:
        UsageError: The file or function is missing, or the file fails.
    """
    file, _, function_name = name.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"labels: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"extractor_labels_{path.stem}", path)
    assert spec is not None  # it ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"{path}: {type(error).__name__}: {first_line(error)}") from error
    function: Callable[[str], Any] | None = getattr(module, function_name, None)
    if not callable(function):
        raise UsageError(f"{path} has no function {function_name!r}")
    return function
