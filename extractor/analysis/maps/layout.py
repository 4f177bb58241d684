"""UMAP of a store from its own nearest rows, and new rows placed beside their neighbors."""

from __future__ import annotations

import importlib.metadata
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from extractor.analysis.maps.neighbors import RowNeighbors, chunk_rows
from extractor.errors import InstallationError, UsageError
from extractor.reading.reader import FeatureStore
from extractor.search.knn import Features, nearest
from extractor.system.installation import installation_errors
from extractor.text import plural

__all__ = ["place_beside", "umap_layout", "umap_settings"]

NEIGHBORS = 15  # the default of umap-learn
MIN_DIST = 0.1  # so is this
SEED = 0
MIN_ROWS = 10  # below, neighborhoods are the whole store
PLACED_BY = 5  # neighbors that a new row is placed by; more of them pull it between clusters
SAME = 1e-6  # cosine distance of rows that are copies but for rounding

Rows = npt.NDArray[np.int64]
Points = npt.NDArray[np.float32]


def umap_settings() -> dict[str, Any]:
    """Return what a UMAP is made with.

    Raises:
        InstallationError: umap-learn is not installed.
    """
    try:
        version = importlib.metadata.version("umap-learn")
    except importlib.metadata.PackageNotFoundError as error:
        raise InstallationError(
            "a UMAP needs umap-learn; try pip install 'backbone-extractor[map]', or the method pca"
        ) from error
    settings = {"metric": "cosine", "neighbors": NEIGHBORS, "min_dist": MIN_DIST, "seed": SEED}
    return {**settings, "umap-learn": version}


def umap_layout(store: FeatureStore, rows: Rows, start: Points) -> Points:
    """Return the UMAP of some rows, ``(n, 2)``; the same rows give the same one on one machine.

    Args:
        store: The store.
        rows: ``(n,)``, all finite rows, ascending.
        start: ``(n, 2)``, where the layout starts from, such as principal components.

    Raises:
        UsageError: There are too few rows, or too many without an index.
        InstallationError: umap-learn is not installed.
    """
    umap_settings()
    if len(rows) < MIN_ROWS:
        raise UsageError(
            f"{store.path}: got {plural(len(rows), 'row')}, a UMAP needs {MIN_ROWS}; try the "
            "method pca"
        )
    k = min(NEIGHBORS, len(rows)) - 1
    found, distances = RowNeighbors(store, len(rows), k, "the method pca").of(rows)
    number = np.full(len(store), -1, np.int64)
    number[rows] = np.arange(len(rows))
    # umap-learn counts a row as its own first neighbor.
    own = np.arange(len(rows))[:, None]
    indices = np.concatenate([own, np.where(found < 0, -1, number[found])], axis=1)
    distances = np.concatenate([np.zeros((len(rows), 1), np.float32), distances], axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about seeds, threads and new data, all chosen here
        with installation_errors():
            import umap

        model: Any = umap.UMAP(
            n_neighbors=k + 1,
            min_dist=MIN_DIST,
            metric="cosine",
            init=_spread(start),
            precomputed_knn=(indices.astype(np.int32), distances, None),
            random_state=SEED,
            n_jobs=1,  # a seed works with one thread only
            force_approximation_algorithm=True,  # it ignores the neighbors of few rows otherwise
        )
        # With neighbors and a start, umap-learn takes from the rows themselves only their number.
        return np.asarray(model.fit_transform(start), np.float32)


def _spread(start: Points) -> Points:
    """Return points scaled to the range that UMAP starts from, no two of them alike."""
    centered = start.astype(np.float64) - start.mean(axis=0)
    scale = float(np.abs(centered).max(initial=0.0))
    scaled = centered * (10 / scale) if scale > 0 else centered
    noise = np.random.default_rng(SEED).normal(scale=1e-3, size=start.shape)
    return np.asarray(scaled + noise, np.float32)


def place_beside(features: Features, new: Features, known: Points) -> Points:
    """Return where new rows go in a map, ``(n, 2)``: the weighted mean of their neighbors there.

    A neighbor's weight falls with its distance beyond that of the nearest one, as in UMAP. A copy
    of a row goes to the same point.

    Args:
        features: ``(m, dim)``, the rows in the map, at least one.
        new: ``(n, dim)``, finite.
        known: ``(m, 2)``, their points.
    """
    placed = np.empty((len(new), 2), np.float32)
    size = chunk_rows(features)
    for start in range(0, len(new), size):
        chunk = slice(start, start + size)
        vectors = np.asarray(new[chunk])
        found = nearest(features, vectors.reshape(len(vectors), -1), PLACED_BY)
        far = np.where(found.rows < 0, np.inf, 1 - found.scores)
        beyond = np.maximum(far - far[:, :1], 0)
        is_row = found.rows >= 0
        scale = np.where(is_row, beyond, 0).sum(axis=1) / np.maximum(is_row.sum(axis=1) - 1, 1)
        weights = np.exp(-beyond / np.maximum(scale, 1e-12)[:, None])
        is_copy = far <= SAME
        weights = np.where(is_copy.any(axis=1, keepdims=True), is_copy, weights)
        weights /= weights.sum(axis=1, keepdims=True)
        placed[chunk] = (weights[:, :, None] * known[found.rows]).sum(axis=1)
    return placed
