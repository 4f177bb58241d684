"""Principal components of rows that are larger than memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Components", "principal_components"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Components:
    """Mean and principal components of rows.

    Attributes:
        rows: Number of rows.
        mean: ``(dim,)``.
        variances: ``(dim,)``, variance in each direction, the largest first; divided by
            ``rows - 1``, as scikit-learn does.
        directions: ``(dim, dim)``, one direction of unit length per row. Its value of largest
            magnitude is positive, which makes it unique.
        rank: Number of directions in which the rows vary at all, but for rounding.
    """

    rows: int
    mean: Floats
    variances: Floats
    directions: Floats
    rank: int


def principal_components(blocks: Iterable[Floats], dim: int) -> Components:
    """Return the principal components of rows.

    The covariance is summed in float64, block by block, each around its own mean, so that a mean
    far from zero costs no precision. Memory holds a few matrices ``(dim, dim)``.

    Chan, Golub, LeVeque: Updating Formulae and a Pairwise Algorithm for Computing Sample Variances,
    1979.

    Args:
        blocks: Rows ``(n, dim)``, finite, in float64.
        dim: Number of values in one row.
    """
    rows, mean, scatter = 0, np.zeros(dim), np.zeros((dim, dim))
    for block in blocks:
        own = block.mean(axis=0)
        centered = block - own
        total = rows + len(block)
        shift = own - mean
        scatter += centered.T @ centered
        scatter += np.outer(shift, shift * (rows * len(block) / total))
        mean = mean + shift * (len(block) / total)
        rows = total
    scatter /= max(rows - 1, 1)
    values, vectors = np.linalg.eigh(scatter)
    variances = values[::-1].clip(0)
    directions = np.ascontiguousarray(vectors.T[::-1])
    largest = np.abs(directions).argmax(axis=1)
    directions *= np.sign(directions[np.arange(dim), largest])[:, None]
    rank = int(np.count_nonzero(variances > variances[0] * dim * np.finfo(np.float64).eps))
    return Components(rows, mean, variances, directions, rank)
