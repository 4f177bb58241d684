"""What the parts of a job array must have in common: inputs, models and options. Needs no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from extractor.images.listing import ImageList, Input
from extractor.lease.software import software_versions
from extractor.options import Options
from extractor.store.format import listing_digest

__all__ = ["UnlistedImages", "differences", "part_request"]

# Options that each part may have for itself.
OF_ONE_PART = frozenset(
    {
        *("workers", "threads", "device", "devices", "processes", "part", "engine", "address"),
        *("lock", "profile", "max_failure_rate", "overwrite"),
    }
)


@dataclass(frozen=True)
class UnlistedImages:
    """Images that are listed only if no other part has done so.

    Attributes:
        identity: What names them, the same for all parts.
        read: Lists them.
    """

    identity: Sequence[str]
    read: Callable[[], ImageList]


def part_request(
    images: Input | Iterable[Input] | ImageList | UnlistedImages,
    models: Sequence[object],
    options: Options,
) -> dict[str, Any]:
    """Return what all parts of a run must have in common, as JSON has it."""
    chosen = {key: value for key, value in asdict(options).items() if key not in OF_ONE_PART}
    content = {
        "inputs": _identity(images),
        "models": [model if isinstance(model, str) else "an object" for model in models],
        "options": chosen,
        "software": software_versions(),
    }
    loaded: dict[str, Any] = json.loads(json.dumps(content))
    return loaded


def _identity(images: Input | Iterable[Input] | ImageList | UnlistedImages) -> list[str]:
    if isinstance(images, UnlistedImages):
        return list(images.identity)
    if isinstance(images, ImageList):
        return [os.fsdecode(images.root), listing_digest(images.paths)]
    inputs = [images] if isinstance(images, str | bytes | os.PathLike) else list(images)
    return [os.path.abspath(os.fsdecode(each)) for each in inputs]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs between two requests, as text."""
    found = []
    for group in ("inputs", "models", "options", "software"):
        old, new = before.get(group), now[group]
        if isinstance(new, dict) and isinstance(old, dict):
            keys = sorted({*old, *new})
            pairs = [(key.replace("_", " "), old.get(key), new.get(key)) for key in keys]
        else:
            pairs = [(group, old, new)]
        found += [f"{name}: {a} there, {b} here" for name, a, b in pairs if a != b]
    return found
