"""Maps, duplicates and outliers of a store, computed beside the page and kept while it is shown."""

from __future__ import annotations

import json
import os
import struct
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from extractor.analysis.duplicate_groups import Duplicates
from extractor.analysis.duplicates import find_duplicates
from extractor.analysis.mapping import StoreMap, map_store
from extractor.analysis.maps.kept import kept_map
from extractor.analysis.outliers import LabelError, Outlier, Outliers, find_outliers
from extractor.reading.reader import FeatureStore
from extractor.view.collection import Collection, Numbers, image_row

__all__ = [
    "Analyses",
    "duplicates_content",
    "folder_names",
    "map_bytes",
    "map_parts",
    "outliers_content",
    "outliers_of",
]

GROUPS = 60  # of duplicates in one answer
OUTLIERS = 120
COLORS = 10  # folders with a color of their own
LEAST_COVERED = 0.25  # of the images; if fewer are in those folders, no color says anything
MAX_FOLDERS = 1000  # more of them are no classes
KEPT = 8


class Analyses:
    """What is computed once about a snapshot. Many threads may ask.

    Args:
        collection: The snapshot.
    """

    def __init__(self, collection: Collection) -> None:
        self._collection = collection
        self._results: dict[tuple[Any, ...], Any] = {}
        self._working: set[tuple[Any, ...]] = set()
        self._lock = threading.Lock()
        self._computing = threading.Lock()  # one computation at a time

    def map(self, method: str) -> bytes | None:
        """Return a map as :func:`map_bytes` packs it; None while it is computed.

        Args:
            method: ``pca`` or ``umap``; empty for a UMAP that was made before, or else PCA.
        """

        def compute() -> bytes:
            store = self._collection.store
            chosen: Any = method or ("umap" if kept_map(store, "umap") else "pca")
            return map_bytes(map_parts(self._collection, map_store(store, chosen)))

        found: bytes | None = self._get(("map", method), compute)
        return found

    def duplicates(
        self, threshold: float, start: int, other: FeatureStore | None = None
    ) -> dict[str, Any] | None:
        """Return groups of duplicates from a number on; None while they are computed.

        Args:
            threshold: Least cosine similarity.
            start: Number of the first group.
            other: The other store on the page, to find images that are also there; None for
                duplicates within the store.
        """
        store = self._collection.store
        found = self._get(
            ("duplicates", threshold, other is not None),
            lambda: find_duplicates(store, threshold=threshold, against=other),
        )
        if found is None:
            return None
        return duplicates_content(found, start, GROUPS)

    def outliers(self, start: int) -> dict[str, Any] | None:
        """Return images by their distance to the others, from a rank on; None while computed."""
        found = self._get(("outliers",), lambda: outliers_of(self._collection))
        if found is None:
            return None
        return outliers_content(self._collection, found, start, OUTLIERS)

    def _get(self, key: tuple[Any, ...], compute: Callable[[], Any]) -> Any:
        """Return a result, or None and begin to compute it.

        Raises:
            Exception: What the computation raised; the next call tries again.
        """
        with self._lock:
            if key in self._results:
                result = self._results[key]
                if isinstance(result, Exception):
                    del self._results[key]
                    raise result
                return result
            if key not in self._working:
                self._working.add(key)
                work = threading.Thread(target=self._work, args=(key, compute), daemon=True)
                work.start()
            return None

    def _work(self, key: tuple[Any, ...], compute: Callable[[], Any]) -> None:
        result: Any
        try:
            with self._computing:
                result = compute()
        except Exception as error:
            result = error
        with self._lock:
            self._results[key] = result
            self._working.discard(key)
            while len(self._results) > KEPT:
                del self._results[next(iter(self._results))]


def duplicates_content(found: Duplicates, start: int, count: int) -> dict[str, Any]:
    """Return groups of duplicates as the page takes them."""
    return {
        "total": len(found),
        "redundant": found.redundant,
        "method": found.method,
        "recall": found.recall,
        "start": start,
        "groups": [
            {
                "kind": group.kind,
                "omitted": group.omitted,
                "images": [
                    [
                        *(each.id, each.path, each.width, each.height),
                        *(each.similarity, each.in_other),
                    ]
                    for each in group.images
                ],
            }
            for group in found[start : start + count]
        ],
    }


def outliers_of(collection: Collection) -> Outliers:
    """Return the outliers of a store; with folders as labels if they are classes."""
    names = [name or "." for name in folder_names(collection)]
    has_classes = 2 <= len(set(names)) <= min(MAX_FOLDERS, len(names) // 2)
    return find_outliers(collection.store, names if has_classes else None)


def outliers_content(
    collection: Collection, found: Outliers, start: int, count: int
) -> dict[str, Any]:
    """Return outliers as the page takes them."""

    def rows(each: Sequence[Outlier | LabelError]) -> list[list[Any]]:
        return [image_row(image) for image in collection.images([item.row for item in each])]

    listed, errors = found[start : start + count], found.label_errors[:count]
    return {
        "total": len(found),
        "start": start,
        "method": found.method,
        "outliers": [[*row, each.distance] for row, each in zip(rows(listed), listed, strict=True)],
        "label_errors": [
            [*row, each.agreement, each.label, each.suggested]
            for row, each in zip(rows(errors), errors, strict=True)
        ],
        "errors_total": len(found.label_errors),
    }


def folder_names(collection: Collection) -> list[str]:
    """Return the name of the folder that holds each image."""
    paths = collection.column("path")
    return [os.fsdecode(path).rpartition("/")[0].rpartition("/")[2] for path in paths]


@dataclass(frozen=True)
class MapParts:
    """A map as the page takes it, for n points.

    Attributes:
        head: Counts, names of the colors and how the map was made.
        ids: ``(n,)`` int64.
        points: ``(n, 2)`` float64, from 0 to 1.
        colors: ``(n,)`` uint8, index of a name; the number of names for all other folders.
    """

    head: dict[str, Any]
    ids: Numbers
    points: npt.NDArray[np.float64]
    colors: npt.NDArray[np.uint8]


def map_parts(collection: Collection, found: StoreMap) -> MapParts:
    """Return a map as the page takes it."""
    rows = found.rows
    points = found.coordinates[rows].astype(np.float64)
    low = points.min(axis=0, initial=np.inf) if len(rows) else np.zeros(2)
    # One scale for both axes, so that distances mean the same.
    span = float((points - low).max(initial=0.0)) or 1.0
    center = (points.max(axis=0) - low) / span / 2 if len(rows) else np.zeros(2)
    names = folder_names(collection)
    common = Counter(names).most_common(COLORS + 1)
    covered = sum(count for _, count in common[:COLORS])
    has_colors = len(common) > 1 and covered >= LEAST_COVERED * len(names)
    shown = [name for name, _ in common[:COLORS]] if has_colors else []
    code = {name: number for number, name in enumerate(shown)}
    colors = np.array([code.get(names[row], len(shown)) for row in rows.tolist()], np.uint8)
    head = {
        "count": len(rows),
        "method": found.method,
        "explained": found.explained,
        "left_out": found.left_out,
        "names": shown,
        "others": len(common) > COLORS and bool(shown),
    }
    return MapParts(head, collection.ids[rows], (points - low) / span + (0.5 - center), colors)


def map_bytes(parts: MapParts) -> bytes:
    """Return a map in a form that a page reads without parsing numbers.

    The length of the head as uint32, the head as JSON, spaces up to a multiple of 8 bytes; then for
    all n points the ids as float64, x and y as float32 from 0 to 1, and colors as uint8. All little
    endian.
    """
    text = json.dumps(parts.head).encode()
    text += b" " * (-(4 + len(text)) % 8)
    return b"".join(
        [
            struct.pack("<I", len(text)),
            text,
            parts.ids.astype("<f8").tobytes(),
            parts.points.astype("<f4").tobytes(),
            parts.colors.tobytes(),
        ]
    )
