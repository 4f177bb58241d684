"""Which weights the stores of a run were made with, read before any model is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from extractor.models.embedding import Model
from extractor.models.naming import planned_stores, store_folders
from extractor.options import Options
from extractor.store.format import JOB, MANIFEST, STAGING

__all__ = ["recorded_weights"]


def recorded_weights(models: Sequence[Model], out: str | None, options: Options) -> dict[str, str]:
    """Return the SHA-256 of the weights in existing stores, by full name of the model.

    A store that is replaced does not count, nor one whose name only the loaded model tells.
    Damaged files are skipped here; opening the store reports them.
    """
    typed = [model for model in models if isinstance(model, str)]
    names = planned_stores(typed, options)
    if options.overwrite or names is None or len(typed) < len(models):
        return {}
    recorded: dict[str, str] = {}
    for folder in map(Path, store_folders(out, names)):
        for path in (folder / MANIFEST, folder / STAGING / JOB):
            recorded.update(_recorded_in(path))
    return recorded


def _recorded_in(path: Path) -> Iterator[tuple[str, str]]:
    try:
        content: Any = json.loads(path.read_bytes())
        described = content["backbone"]
        for part in described.get("parts", [described]):
            if isinstance(part, Mapping):
                yield str(part["model"]), str(part["sha256"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
