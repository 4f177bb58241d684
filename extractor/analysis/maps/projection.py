"""Principal components of rows that may be larger than memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from extractor.reading.array import KeptRows
from extractor.search.knn import Features, prepared, row_blocks
from extractor.upkeep import pca

__all__ = ["Components", "finite_rows", "of_rows", "principal_components", "unit_blocks"]

# Values of a row up to which the whole covariance is computed: 2,048 take 32 MB a matrix, and
# seconds for the eigenvectors. Wider rows are read several times instead.
MAX_COVARIANCE = 2048
WIDTH = 10  # vectors that are iterated to find two; more of them converge in fewer passes
MAX_PASSES = 24
CONVERGED = 1e-5  # change of the variance along both axes, as a share of it

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Components:
    """Two directions of the largest variance among rows of unit length.

    Attributes:
        mean: ``(dim,)``.
        axes: ``(2, dim)``, of unit length; the largest value of each is positive. Zeros where there
            is no variance.
        explained: Share of the variance along each axis, from 0 to 1.
    """

    mean: Floats
    axes: Floats
    explained: tuple[float, float]

    def __post_init__(self) -> None:
        """Check the shapes.

        Raises:
            ValueError: They do not fit together, or a value is not finite.
        """
        if self.mean.ndim != 1 or self.axes.shape != (2, len(self.mean)):
            raise ValueError(f"mean of shape {self.mean.shape}, axes of shape {self.axes.shape}")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.axes).all()):
            raise ValueError("a component holds NaN or infinity")

    def project(self, features: Features) -> npt.NDArray[np.float32]:
        """Return the coordinates of rows, ``(n, 2)``.

        Args:
            features: ``(n, dim)``, finite, of any length.
        """
        blocks = [(block - self.mean) @ self.axes.T for block in unit_blocks(features)]
        return np.concatenate([np.empty((0, 2)), *blocks]).astype(np.float32)


def principal_components(features: Features) -> Components:
    """Return the two principal components of rows, scaled to unit length.

    Rows of up to 2,048 values are read once. Wider ones are read up to 24 times, as in subspace
    iteration (Halko, Martinsson and Tropp, 2011).

    >>> rows = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 0], [1, 0, 0]], np.float32)
    >>> principal_components(rows).explained
    (1.0, 0.0)

    Args:
        features: ``(n, dim)``, at least one row, finite.
    """
    dim = int(np.prod(features.shape[1:]))
    if dim <= MAX_COVARIANCE:
        blocks = (block.astype(np.float64) for block in unit_blocks(features))
        found = pca.principal_components(blocks, dim)
        mean, axes = found.mean, found.directions
        values, total = found.variances, float(found.variances.sum())
    else:
        mean = _mean(features, dim)
        values, axes, total = _iterated(features, mean)
    if len(axes) < 2:
        values, axes = np.append(values, 0.0), np.concatenate([axes, np.zeros((1, dim))])
    # Rounding leaves some variance along axes that have none.
    has_variance = values[:2] > 1e-7 * max(total, 1e-30)
    axes = np.where(has_variance[:, None], axes[:2], 0.0)
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1)
    shares = np.where(has_variance & (total > 1e-12), values[:2] / max(total, 1e-30), 0.0)
    first, second = np.clip(shares, 0.0, 1.0).round(6).tolist()
    return Components(mean, np.where(largest < 0, -axes, axes), (first, second))


def unit_blocks(features: Features) -> Iterator[npt.NDArray[np.float32]]:
    """Yield rows in blocks ``(n, dim)``, scaled to unit length; rows of zeros stay zeros."""
    for _, block in row_blocks(features):
        yield np.asarray(prepared(np.asarray(block, np.float32), "cosine"), np.float32)


def of_rows(features: Features, rows: Rows) -> Features:
    """Return some rows of an array without reading them; the array itself if these are all."""
    return features if len(rows) == len(features) else KeptRows(features, rows)


def finite_rows(features: Features) -> npt.NDArray[np.bool_]:
    """Return which rows hold neither NaN nor infinity, ``(n,)`` bool."""
    found = [np.isfinite(block).all(axis=1) for _, block in row_blocks(features)]
    return np.concatenate([np.empty(0, bool), *found])


def _mean(features: Features, dim: int) -> Floats:
    total = np.zeros(dim)
    for block in unit_blocks(features):
        total += block.sum(axis=0, dtype=np.float64)
    mean: Floats = total / len(features)
    return mean


def _iterated(features: Features, mean: Floats) -> tuple[Floats, Floats, float]:
    """Return the largest variances, their axes as rows, and the variance along all axes."""
    random = np.random.default_rng(0)
    basis = np.linalg.qr(random.standard_normal((len(mean), WIDTH)))[0]
    before, total = -1.0, 0.0
    for _ in range(MAX_PASSES):
        image, total = np.zeros_like(basis), 0.0
        for block in unit_blocks(features):
            centered = block - mean.astype(np.float32)
            image += centered.T @ (centered @ basis.astype(np.float32))
            total += float(np.square(centered, dtype=np.float64).sum())
        image, total = image / len(features), total / len(features)
        values, turned = np.linalg.eigh((basis.T @ image + image.T @ basis) / 2)
        axes = (basis @ turned).T[::-1]
        captured = float(values[-2:].sum())
        if captured - before <= CONVERGED * captured:
            break
        before, basis = captured, np.linalg.qr(image)[0]
    return values[::-1], axes, total
