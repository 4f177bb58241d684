"""Linear centered kernel alignment: how alike two embeddings of the same images are.

Kornblith et al., "Similarity of Neural Network Representations Revisited", 2019, section 3: 1 for
embeddings that differ by a rotation and a scale, 0 for unrelated ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from extractor.search.knn import Features

__all__ = ["linear_cka"]

BLOCK_ROWS = 4096

Floats = npt.NDArray[np.float64]


def linear_cka(first: Features, second: Features) -> float:
    """Return the linear CKA of two embeddings; NaN if all rows of one are equal.

    >>> rows = np.random.default_rng(0).standard_normal((50, 4))
    >>> round(linear_cka(rows, 3 * rows[:, ::-1] + 1), 6)
    1.0

    Args:
        first: ``(N, p)``, an array or the features of a store.
        second: ``(N, q)``, embeddings of the same images in the same order.
    """
    means = [_mean(each) for each in (first, second)]
    if len(first) < max(first.shape[1], second.shape[1]):
        # Fewer images than values: products of rows are the smaller matrices.
        grams = []
        for each, mean in zip((first, second), means, strict=True):
            rows = np.asarray(each[:], np.float64) - mean
            grams.append(rows @ rows.T)
        shared, own = np.vdot(*grams), [np.linalg.norm(gram) for gram in grams]
    else:
        shared = float(np.sum(_product(first, means[0], second, means[1]) ** 2))
        own = [
            np.linalg.norm(_product(each, mean, each, mean))
            for each, mean in zip((first, second), means, strict=True)
        ]
    scale = float(own[0] * own[1])
    return float(shared) / scale if scale > 0 else float("nan")


def _mean(features: Features) -> Floats:
    total = np.zeros(features.shape[1])
    for rows in _blocks(features):
        total += np.asarray(features[rows], np.float64).sum(axis=0)
    return total / max(len(features), 1)


def _product(first: Features, mean: Floats, second: Features, other_mean: Floats) -> Floats:
    """Return the products of the centered columns, ``(p, q)``."""
    product = np.zeros((first.shape[1], second.shape[1]))
    for rows in _blocks(first):
        block = np.asarray(first[rows], np.float64) - mean
        product += block.T @ (np.asarray(second[rows], np.float64) - other_mean)
    return product


def _blocks(features: Features) -> Iterator[slice]:
    return (slice(start, start + BLOCK_ROWS) for start in range(0, len(features), BLOCK_ROWS))
