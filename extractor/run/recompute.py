"""Compute rows of a store again and compare, to verify that its manifest describes them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import numpy.typing as npt

from extractor.compute.embed import embed
from extractor.compute.inputs import pictures_of
from extractor.images.types import Failure
from extractor.loading.loader import BatchLoader
from extractor.loading.options import LoaderOptions
from extractor.options import MAX_PIXELS
from extractor.reading.reader import FeatureStore
from extractor.reading.transform import read_transform
from extractor.run.encoder import spec_of
from extractor.system.cpu import compute_threads

__all__ = ["recompute"]

# Allowed difference, relative to the length of a row. Other hardware sums in another order, and
# float16 keeps 11 bits.
TOLERANCE = {"float32": 1e-3, "float16": 5e-3}
# In half precision, another order of sums or a compiled network rounds differently at every step.
# A GPU that decodes changes the pixels.
HALF_TOLERANCE = 0.05


def recompute(
    store: FeatureStore, count: int, *, weights: str | None = None, device: str
) -> Iterator[str]:
    """Compute rows of a store again and yield a sentence for each one that differs.

    Args:
        store: Store to verify.
        count: Number of rows to compute, spread evenly over the store.
        weights: File that the store was made with, if it is no longer where it was.
        device: Device to compute on.

    Raises:
        WeightsError: The weights are missing, or others than those of the store.
        StoreDamagedError: A file of its transform is missing or changed.
        StoreError: The model is a different one now.
        ExtractorError: The model cannot be loaded.
    """
    spec = spec_of(store, weights, device)
    transform = read_transform(store.path, store.manifest.description)
    description, dtype = (
        store.manifest.description.before_transform,
        store.manifest.description.dtype,
    )
    decode = str(description.computation["decode"])
    is_exact = description.computation["precision"] == "float32" and decode != "gpu"
    least = max(TOLERANCE[description.dtype], TOLERANCE[dtype])
    tolerance = least if is_exact else HALF_TOLERANCE
    rows = np.unique(np.linspace(0, len(store) - 1, min(count, len(store))).astype(int))
    paths = [os.path.join(store.root, store.paths[row]) for row in rows]
    with (
        compute_threads(),
        BatchLoader(
            iter([[path] for path in paths]),
            pictures_of([spec]),
            LoaderOptions(
                batch_size=1,
                workers=1,
                max_pixels=_max_pixels(store, rows),
                decode_mode="exact" if decode == "gpu" else decode,
            ),
        ) as loader,
        closing(
            embed([spec], loader, normalize=bool(description.embedding["normalized"]))
        ) as computed,
    ):
        for row, path, embedded in zip(rows, paths, computed, strict=True):
            (outcome,) = embedded.outcomes
            if isinstance(outcome, Failure):
                yield f"row {row}: {path!a} cannot be decoded any more: {outcome.message}"
                continue
            now = embedded.rows[0][0].astype(description.dtype).astype(np.float64)
            gain = 1.0
            if transform is not None:
                gain = transform.gain(now)
                now = transform.apply(now[None])[0].astype(dtype).astype(np.float64)
            stored = np.asarray(store[int(row)], np.float64)
            difference = np.linalg.norm(now - stored) / max(float(np.linalg.norm(stored)), 1e-12)
            if not difference <= tolerance * gain:
                yield f"row {row}: {path!a} gives another row now, off by {difference:.2g}"


def _max_pixels(store: FeatureStore, rows: npt.NDArray[np.int64]) -> int:
    """Return a limit that the images of some rows do not exceed, whatever limit they had then."""
    widths, heights = (np.array(store.column(name), np.int64)[rows] for name in ("width", "height"))
    return max(MAX_PIXELS, int((widths * heights).max(initial=0)))
