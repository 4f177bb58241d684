"""Maps of a store: :func:`map_store`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from extractor.analysis.maps import layout
from extractor.analysis.maps.kept import (
    METHODS,
    KeptMap,
    MapEntry,
    Method,
    foreign_map,
    keep_map,
    kept_map,
)
from extractor.analysis.maps.picture import check_pictures, write_picture
from extractor.analysis.maps.projection import finite_rows, of_rows, principal_components
from extractor.analysis.maps.table import check_table, write_table
from extractor.analysis.maps.thumbnails import ImageCounts
from extractor.errors import StoreError, UsageError
from extractor.evaluation.labels import Labels, labels_of
from extractor.reading.reader import FeatureStore
from extractor.search.derived import shard_keys
from extractor.store.format import FileEntry

__all__ = ["StoreMap", "map_labels", "map_store"]


@dataclass(frozen=True)
class StoreMap:
    """Two coordinates of each row of a store.

    >>> store_map = map_store("features/resnet50")  # doctest: +SKIP
    >>> store_map.coordinates.shape, store_map.fitted  # doctest: +SKIP
    ((25, 2), 25)

    Attributes:
        store: The store.
        method: ``pca`` or ``umap``.
        coordinates: ``(N, 2)`` float32, x and y of each row. NaN for rows with NaN or infinity,
            which are not in the map.
        fitted: Number of rows that the map was made from; later ones were placed into it.
        placed: Number of rows that this call placed into a map that was there before.
        was_made: Whether this call made the map.
        explained: Share of the variance along each axis; None for a UMAP.
        path: File of the coordinates.
    """

    store: FeatureStore
    method: Method
    coordinates: npt.NDArray[np.float32] = field(repr=False, compare=False)
    fitted: int
    placed: int
    was_made: bool
    explained: tuple[float, float] | None
    path: Path

    def __post_init__(self) -> None:
        """Check the shape.

        Raises:
            ValueError: There are more or fewer points than rows.
        """
        if self.coordinates.shape != (len(self.store), 2):
            raise ValueError(f"got {self.coordinates.shape} for {len(self.store)} rows")

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """``(n,)`` int64, the rows that are in the map, ascending."""
        return np.flatnonzero(np.isfinite(self.coordinates).all(axis=1)).astype(np.int64)

    @property
    def left_out(self) -> int:
        """Number of rows that are not in the map, since they hold NaN or infinity."""
        return len(self.store) - len(self.rows)

    def draw(
        self,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        labels: Labels = None,
        *,
        thumbnails: bool = True,
        root: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
    ) -> ImageCounts:
        """Draw the map: points in the colors of their labels, and thumbnails where they fit.

        Needs matplotlib, and no display. An image that is gone or changed has no thumbnail.

        >>> counts = store_map.draw("map.svg")  # doctest: +SKIP
        >>> counts.unreadable, counts.changed  # doctest: +SKIP
        (0, 0)

        Args:
            path: File to write, which ends with ``.png`` or ``.svg``, or several.
            labels: As for :func:`find_outliers`, but None for the names of folders, if every image
                lies in one and there are several.
            thumbnails: Whether to show images.
            root: Folder that the paths of the images are relative to now; None for the one they
                were extracted from.
            overwrite: Whether to replace files that are there.

        Raises:
            UsageError: A file exists or cannot be written, or labels are missing or unknown.
            InstallationError: matplotlib is not installed.
        """
        paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
        check_pictures(paths, overwrite=overwrite)
        folder = self._root(root) if thumbnails else None
        return write_picture(self, paths, map_labels(self.store, labels), root=folder)

    def write_table(
        self,
        path: str | os.PathLike[str],
        labels: Labels = None,
        *,
        neighbors: int = 10,
        thumbnails: bool = True,
        root: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> ImageCounts:
        """Write the map as a Parquet file, which embedding-atlas opens.

        The columns are id, path, x, y, label, neighbors and image. Rows that are not in the map are
        left out. Neighbors are named by their row in the table, counted from 0. An image is a JPEG
        of at most 128 pixels, or null where it is gone or changed.

        >>> store_map.write_table("map.parquet").shown  # doctest: +SKIP
        25

        Args:
            path: File to write, which ends with ``.parquet``.
            labels: As for :meth:`draw`.
            neighbors: Number of nearest rows of each row; 0 leaves the column out.
            thumbnails: Whether to write images.
            root: As for :meth:`draw`.
            overwrite: Whether to replace a file that is there.
            progress: Called with the number of rows that are written, and of all.

        Raises:
            UsageError: The file exists or cannot be written, labels are missing or unknown, or the
                neighbors of so many rows need an index.
            StoreError: The index of the store is damaged.
        """
        check_table(path, neighbors, overwrite=overwrite)
        return write_table(
            self,
            path,
            map_labels(self.store, labels),
            neighbors=neighbors,
            root=self._root(root) if thumbnails else None,
            progress=progress,
        )

    def _root(self, root: str | os.PathLike[str] | None) -> str | os.PathLike[str]:
        """Return the folder of the images.

        Raises:
            UsageError: It was named and is none.
        """
        if root is None:
            return self.store.root
        if not os.path.isdir(root):
            raise UsageError(f"root: there is no folder {os.fspath(root)}")
        return root


def map_labels(store: FeatureStore, labels: Labels) -> list[str] | None:
    """Return the label of each row; None if none are asked for and folders tell nothing.

    Args:
        store: The store.
        labels: As for :func:`evaluate_store`; None for the names of folders, if
            every image lies in one and there are several.

    Raises:
        UsageError: Labels that are asked for are missing or unknown.
    """
    if labels is not None:
        return labels_of(store, labels)
    folders = [path.rpartition("/")[0].rpartition("/")[2] for path in store.paths]
    return folders if all(folders) and len(set(folders)) > 1 else None


def map_store(
    store: FeatureStore | str | os.PathLike[str],
    method: Method = "pca",
    *,
    refit: bool = False,
) -> StoreMap:
    """Return a map of a store, on which similar images lie near each other.

    The map is kept in the folder ``derived`` of the store, or in the user's cache if the store is
    read-only. Later calls read it: rows keep their coordinates, new rows are placed among them, and
    rows that are gone drop out. It is never made anew unless ``refit`` says so.

    >>> store_map = map_store("features/resnet50")  # doctest: +SKIP
    >>> store_map.coordinates.shape, store_map.was_made  # doctest: +SKIP
    ((25, 2), True)

    Args:
        store: The store or its folder.
        method: ``pca`` for the two principal components of rows of unit length, or ``umap``, which
            needs umap-learn.
        refit: Whether to make the map anew. All rows get other coordinates.

    Raises:
        UsageError: An unknown method, or a UMAP of too few rows, or of too many without an index.
        InstallationError: umap-learn is not installed.
        StoreError: There are no rows, the map cannot be written, or the map is damaged or belongs
            to another store; start over with ``refit``.
    """
    if method not in METHODS:
        raise UsageError(f"method: got {method!r}, expected one of {', '.join(METHODS)}")
    rows = FeatureStore.open(store) if isinstance(store, (str, os.PathLike)) else store
    if not isinstance(rows, FeatureStore):
        raise UsageError(
            f"store: got {type(rows).__name__}, expected a FeatureStore or the folder of one"
        )
    if not len(rows):
        raise StoreError(f"{rows.path} holds no rows, so there is nothing to map")
    before = None if refit else kept_map(rows, method)
    if before is None:
        kept, placed = keep_map(rows, _made(rows, method)), 0
    else:
        kept, placed = _extended(rows, before)
    entry = kept.entry
    return StoreMap(
        store=rows,
        method=method,
        coordinates=kept.coordinates_of(rows.ids)[0],
        fitted=entry.fitted,
        placed=placed,
        was_made=before is None,
        explained=entry.explained,
        path=entry.path,
    )


def _made(store: FeatureStore, method: Method) -> KeptMap:
    """Return a new map of all rows."""
    settings: dict[str, Any] = {}
    if method == "umap":
        settings = layout.umap_settings()  # first, since umap-learn may be missing
    rows = np.flatnonzero(finite_rows(store.features)).astype(np.int64)
    if not len(rows):
        raise StoreError(f"{store.path}: all rows hold NaN or infinity, so there is nothing to map")
    features = of_rows(store.features, rows)
    components = principal_components(features)
    points = components.project(features)
    if method == "umap":
        points = layout.umap_layout(store, rows, points)
    entry = MapEntry(
        method=method,
        dim=store.dim,
        token=store.token,
        shards=shard_keys(store.manifest),
        fitted=len(rows),
        explained=components.explained if method == "pca" else None,
        settings=settings,
        written_ns=0,
        file=FileEntry("", 0, ""),  # not written yet
        folder=store.path,
    )
    kept = components if method == "pca" else None
    return _by_id(store, entry, _of_all(len(store), rows, points), kept)


def _extended(store: FeatureStore, before: KeptMap) -> tuple[KeptMap, int]:
    """Return a map with the rows that a store has now, and the number of those placed into it."""
    coordinates, known = before.coordinates_of(store.ids)
    missing = np.flatnonzero(~known).astype(np.int64)
    if not len(missing):
        return _up_to_date(store, before), 0
    mapped = np.flatnonzero(np.isfinite(coordinates).all(axis=1)).astype(np.int64)
    if not len(mapped):
        raise foreign_map(before.entry, store)
    rows = missing[finite_rows(of_rows(store.features, missing))]
    new = of_rows(store.features, rows)
    if before.components is not None:
        coordinates[rows] = before.components.project(new)
    elif len(rows):
        coordinates[rows] = layout.place_beside(
            of_rows(store.features, mapped), new, coordinates[mapped]
        )
    kept = _by_id(store, before.entry, coordinates, before.components)
    return keep_map(store, kept), len(rows)


def _up_to_date(store: FeatureStore, before: KeptMap) -> KeptMap:
    """Return a map that holds all rows, written again if a store forgets its older shards."""
    if set(shard_keys(store.manifest)).issuperset(before.entry.shards):
        return before
    coordinates = before.coordinates_of(store.ids)[0]
    try:
        return keep_map(store, _by_id(store, before.entry, coordinates, before.components))
    except StoreError:  # it is right without that
        return before


def _of_all(
    total: int, rows: npt.NDArray[np.int64], points: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Return the points of all rows of a store, NaN for those without one."""
    coordinates = np.full((total, 2), np.nan, np.float32)
    coordinates[rows] = points
    return coordinates


def _by_id(
    store: FeatureStore, entry: MapEntry, coordinates: npt.NDArray[np.float32], components: Any
) -> KeptMap:
    order = np.argsort(store.ids, kind="stable")
    return KeptMap(entry, store.ids[order], coordinates[order], components)
