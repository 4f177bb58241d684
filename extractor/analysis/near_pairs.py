"""Pairs of rows that may be nearly equal: exactly all, or most of them by clusters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from extractor.analysis.components import Components
from extractor.analysis.unit_rows import Floats32, Numbers, UnitRows

__all__ = [
    "EXACT_COMPARISONS",
    "MAX_PAIRS",
    "Clusters",
    "NearPairs",
    "Pairs",
    "Progress",
    "clustered_pairs",
    "exact_pairs",
    "measured_recall",
    "no_progress",
]

Pairs: TypeAlias = tuple[Numbers, Numbers]
Floats: TypeAlias = npt.NDArray[np.float64]
Progress: TypeAlias = Callable[[str, int, int], None]

# Comparisons up to which all rows are compared with each other: those of 200,000 rows.
EXACT_COMPARISONS = 200_000**2 // 2
# Pairs that are remembered. Beyond it, only pairs count that join two groups.
MAX_PAIRS = 2**22

LEFT_ROWS = 1024
RIGHT_ROWS = 4096
SKETCH_DIM = 64
SKETCH_SAMPLE = 1024  # rows that choose the directions of a sketch
MIN_SKETCHED = 10_000_000  # comparisons; fewer are done before the directions are found
SKETCH_ERROR = 1e-5  # of a product of two sketches, in float32
# Share of pairs that a sketch cannot tell apart from near ones; beyond it, whole rows are compared.
DENSE = 1 / 64
ROUNDING = 2.0**-24  # of float32

PROBES = 4  # clusters that each row is compared with
TRAIN_ROWS = 48  # per cluster
TRAIN_BYTES = 256 * 2**20
ROUNDS = 8
BLOCK_PRODUCTS = 4 * 2**20  # of rows and centers at a time
# Rows whose pairs are found exactly, to measure the recall. Few rows have a near one.
RECALL_ROWS = 10_000


def _slack(dim: int) -> float:
    """Return how far a product of unit rows in float32 may lie from the true one."""
    return 2 * (dim + 8) * ROUNDING


def no_progress(phase: str, done: int, total: int) -> None:
    """Show nothing."""


def exact_pairs(
    rows: UnitRows,
    left: Numbers,
    right: Numbers | None,
    threshold: float,
    progress: Progress,
    phase: str = "comparing",
) -> Iterator[Pairs]:
    """Yield all pairs whose similarity reaches a threshold, among others slightly below.

    Args:
        rows: The rows.
        left: ``(n,)``, numbers of rows in ascending order.
        right: ``(m,)``, numbers of other rows; None for the pairs within ``left``.
        threshold: Cosine similarity, above 0.
        progress: Called with the phase, the rows of ``left`` that are done, and their number.
        phase: Name of the phase.

    Yields:
        Numbers of rows ``(p,)`` and ``(p,)``; each pair once.
    """
    others = left if right is None else right
    sketch = None
    if len(left) * len(others) > MIN_SKETCHED and rows.dim > SKETCH_DIM:
        sketch = _Sketch.of(rows, left, others)
    for start in range(0, len(left), LEFT_ROWS):
        progress(phase, start, len(left))
        ours = slice(start, start + LEFT_ROWS)
        unit: Floats32 | None = None  # read only if the sketch does not decide
        first = start if right is None else 0
        for begin in range(first, len(others), RIGHT_ROWS):
            theirs = slice(begin, begin + RIGHT_ROWS)
            hits = sketch.hits(ours, theirs, threshold) if sketch is not None else None
            if hits is not None and not len(hits[0]):
                continue
            unit = rows.take(left[ours]) if unit is None else unit
            if hits is None:
                hits = _hits(unit, rows, others[theirs], threshold)
            else:
                hits = _sieved(unit, rows, others[theirs], hits, threshold)
            a, b = hits
            if right is None:
                kept = start + a < begin + b
                a, b = a[kept], b[kept]
            if len(a):
                yield left[ours][a], others[theirs][b]
    progress(phase, len(left), len(left))


def _hits(unit: Floats32, rows: UnitRows, others: Numbers, threshold: float) -> Pairs:
    """Return the pairs of rows and others that reach a threshold, by their positions."""
    limit = np.float32(threshold - _slack(rows.dim))
    parts = []
    for start in range(0, len(others), rows.block_rows):
        block = rows.take(others[start : start + rows.block_rows])
        a, b = _above(unit @ block.T, limit)
        parts.append((a, b + start))
    return np.concatenate([a for a, _ in parts]), np.concatenate([b for _, b in parts])


def _sieved(
    unit: Floats32, rows: UnitRows, others: Numbers, hits: Pairs, threshold: float
) -> Pairs:
    """Return those pairs of rows and others that reach a threshold, by their positions."""
    limit = np.float32(threshold - _slack(rows.dim))
    near = np.empty(len(hits[0]), bool)
    for start in range(0, len(near), rows.block_rows):
        chunk = slice(start, start + rows.block_rows)
        a, b = hits[0][chunk], hits[1][chunk]
        near[chunk] = np.einsum("ij,ij->i", unit[a], rows.take(others[b])) >= limit
    return hits[0][near], hits[1][near]


def _above(products: Floats32, limit: np.float32) -> Pairs:
    """Return the positions of products that reach a limit."""
    found = np.flatnonzero(products >= limit)
    if not len(found):
        return found, found
    a, b = np.divmod(found, products.shape[1])
    return a, b


@dataclass(frozen=True)
class _Sketch:
    """Rows in few directions. There, no two rows are further apart than they are.

    A sketch of a row p is ``(p, -|p|²/2, 1)``, and one of another row q ``(q, 1, -|q|²/2)``. Their
    product is ``-|p - q|²/2``.

    Attributes:
        left: ``(n, d + 2)``.
        right: ``(m, d + 2)``.
    """

    left: Floats32
    right: Floats32

    @classmethod
    def of(cls, rows: UnitRows, left: Numbers, right: Numbers) -> _Sketch:
        numbers = np.linspace(0, len(right) - 1, min(SKETCH_SAMPLE, len(right))).astype(np.int64)
        sample = rows.take(right[numbers])
        mean = sample.mean(axis=0)
        # The directions in which the rows differ most tell most pairs apart.
        axes = np.linalg.svd(sample - mean, full_matrices=False)[2][:SKETCH_DIM].T
        table = _sketched(rows, right, mean, axes)
        ours = table if left is right else _sketched(rows, left, mean, axes)
        swapped = ours.copy()
        swapped[:, [-2, -1]] = ours[:, [-1, -2]]
        return cls(swapped, table)

    def hits(self, ours: slice, theirs: slice, threshold: float) -> Pairs | None:
        """Return the pairs that may reach a threshold; None if they are too many."""
        products = self.left[ours] @ self.right[theirs].T
        found = _above(products, np.float32(threshold - 1 - SKETCH_ERROR))
        return None if len(found[0]) > DENSE * products.size else found


def _sketched(rows: UnitRows, numbers: Numbers, mean: Floats32, axes: npt.NDArray[Any]) -> Floats32:
    table = np.ones((len(numbers), axes.shape[1] + 2), np.float32)
    for start in range(0, len(numbers), rows.block_rows):
        chunk = slice(start, start + rows.block_rows)
        points = (rows.take(numbers[chunk]) - mean) @ axes
        table[chunk, :-2] = points
        table[chunk, -1] = -np.einsum("ij,ij->i", points, points) / 2
    return table


class Clusters:
    """Rows in clusters; each row is compared with the rows of the clusters nearest to it.

    Args:
        rows: The rows.
        probes: ``(n, PROBES)``, clusters near each row; the first one is its own.
        count: Number of clusters.
    """

    def __init__(self, rows: UnitRows, probes: npt.NDArray[np.int32], count: int) -> None:
        self._rows = rows
        self._probes = probes
        self._count = count

    @classmethod
    def of(cls, rows: UnitRows) -> Clusters:
        """Return the clusters of rows by k-means, the same for the same rows."""
        count = min(int(2 * np.sqrt(len(rows))), len(rows))
        centers = _centers(rows, count)
        probes = np.empty((len(rows), min(PROBES, count)), np.int32)
        step = max(BLOCK_PRODUCTS // count, 1)
        for start, block in rows.blocks():
            for begin in range(0, len(block), step):
                products = block[begin : begin + step] @ centers.T
                chunk = slice(start + begin, start + begin + len(products))
                probes[chunk] = _largest(products, probes.shape[1])
        return cls(rows, probes, count)

    def pairs(self, threshold: float, progress: Progress) -> Iterator[Pairs]:
        """Yield pairs that may reach a threshold; each pair once.

        Args:
            threshold: Cosine similarity, above 0.
            progress: Called as for :func:`exact_pairs`.
        """
        home = self._probes[:, 0]
        visits = np.argsort(self._probes.ravel(), kind="stable")
        ends = np.cumsum(np.bincount(self._probes.ravel(), minlength=self._count))
        members = np.argsort(home, kind="stable")
        member_ends = np.cumsum(np.bincount(home, minlength=self._count))
        for cluster in range(self._count):
            progress("comparing", int(member_ends[cluster - 1]) if cluster else 0, len(home))
            own = members[member_ends[cluster - 1] if cluster else 0 : member_ends[cluster]]
            near = visits[ends[cluster - 1] if cluster else 0 : ends[cluster]]
            for pair in self._between(near // self._probes.shape[1], own, threshold):
                yield self._kept(*pair, cluster)
        progress("comparing", len(home), len(home))

    def _between(self, near: Numbers, own: Numbers, threshold: float) -> Iterator[Pairs]:
        """Yield the pairs of rows near a cluster and rows in it."""
        for start in range(0, len(near), LEFT_ROWS):
            ours = near[start : start + LEFT_ROWS]
            unit = self._rows.take(ours)
            for begin in range(0, len(own), RIGHT_ROWS):
                theirs = own[begin : begin + RIGHT_ROWS]
                a, b = _hits(unit, self._rows, theirs, threshold)
                if len(a):
                    yield ours[a], theirs[b]

    def _kept(self, near: Numbers, own: Numbers, cluster: int) -> Pairs:
        """Return pairs without those that another cluster, or the other order, yields."""
        home = self._probes[near, 0]
        is_mutual = (self._probes[own] == home[:, None]).any(axis=1)
        kept = np.where(home == cluster, near < own, ~is_mutual | (home > cluster))
        return near[kept], own[kept]

    def cover(self, left: Numbers, right: Numbers) -> npt.NDArray[np.bool_]:
        """Return whether each pair is compared, ``(n,)``."""
        probes = self._probes
        forth = (probes[left] == probes[right, :1]).any(axis=1)
        back = (probes[right] == probes[left, :1]).any(axis=1)
        covered: npt.NDArray[np.bool_] = forth | back
        return covered


def _largest(products: Floats32, count: int) -> npt.NDArray[np.int32]:
    """Return the columns of the largest values of each line, ``(n, count)``, largest first."""
    found = np.empty((len(products), count), np.int32)
    lines = np.arange(len(products))
    for at in range(count):  # argmax is faster than a partition for so few
        found[:, at] = products.argmax(axis=1)
        products[lines, found[:, at]] = -np.inf
    return found


def _centers(rows: UnitRows, count: int) -> Floats32:
    """Return the centers of spherical k-means on a sample, ``(count, dim)`` of unit length."""
    random = np.random.default_rng(0)
    most = max(TRAIN_BYTES // (4 * rows.dim), count)
    size = min(TRAIN_ROWS * count, most, len(rows))
    sample = rows.take(np.sort(random.choice(len(rows), size, replace=False)))
    centers = sample[random.choice(size, count, replace=False)]
    for _ in range(ROUNDS):
        nearest = np.empty(size, np.int64)
        step = max(BLOCK_PRODUCTS // count, 1)
        for start in range(0, size, step):
            chunk = slice(start, start + step)
            nearest[chunk] = (sample[chunk] @ centers.T).argmax(axis=1)
        order = np.argsort(nearest, kind="stable")
        present, starts = np.unique(nearest[order], return_index=True)
        ends = np.append(starts[1:], size)
        # An empty cluster begins again at a row.
        centers = sample[random.choice(size, count, replace=False)]
        for cluster, begin, end in zip(present, starts, ends, strict=True):
            total = sample[order[begin:end]].sum(axis=0)
            length = np.linalg.norm(total)
            centers[cluster] = total / length if length > 0 else total
    return centers


def measured_recall(
    rows: UnitRows, clusters: Clusters, threshold: float, progress: Progress
) -> tuple[int, int]:
    """Return how many pairs of sampled rows are compared by clusters, and how many there are."""
    random = np.random.default_rng(1)
    size = min(RECALL_ROWS, len(rows))
    sample = np.sort(random.choice(len(rows), size, replace=False))
    compared = total = 0
    everyone = np.arange(len(rows))
    for left, right in exact_pairs(rows, sample, everyone, threshold, progress, "measuring"):
        near = rows.similarities(left, right) >= threshold
        near &= left != right
        compared += int(clusters.cover(left[near], right[near]).sum())
        total += int(near.sum())
    return compared, total


def clustered_pairs(
    rows: UnitRows, threshold: float, progress: Progress
) -> tuple[Iterator[Pairs], tuple[int, int]]:
    """Return the pairs that clusters find, and :func:`measured_recall`."""
    progress("clustering", 0, len(rows))
    clusters = Clusters.of(rows)
    recalled = measured_recall(rows, clusters, threshold, progress)
    return clusters.pairs(threshold, progress), recalled


class NearPairs:
    """Near pairs as they are found, and the groups that they join.

    Args:
        rows: The rows.
        threshold: Least similarity.
    """

    def __init__(self, rows: UnitRows, threshold: float) -> None:
        self.components = Components(len(rows))
        self.is_complete = True
        self._rows = rows
        self.threshold = threshold
        self._parts: list[tuple[Numbers, Numbers, Floats]] = []
        self._count = 0

    def add(self, candidates: Iterable[Pairs]) -> None:
        """Add those pairs that reach the threshold."""
        for left, right in candidates:
            if not self.is_complete:  # pairs within a group say nothing new
                apart = self.components.find(left) != self.components.find(right)
                left, right = left[apart], right[apart]
            similarities = self._rows.similarities(left, right)
            near = similarities >= self.threshold
            left, right, similarities = left[near], right[near], similarities[near]
            self.components.join(left, right)
            self._count += len(left)
            if self._count > MAX_PAIRS:
                self.is_complete = False
                self._parts.clear()
            elif self.is_complete:
                self._parts.append((left, right, similarities))

    def found(self) -> tuple[Numbers, Numbers, Floats]:
        """Return all pairs; or if they are too many, pairs that join the same groups."""
        if not self.is_complete:
            labels = self.components.labels()
            joined = np.flatnonzero(labels != np.arange(len(labels)))
            return labels[joined], joined, np.full(len(joined), self.threshold)
        parts = list(zip(*self._parts, strict=True))
        if not parts:
            return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)
        left, right, similarities = (np.concatenate(part) for part in parts)
        return left, right, similarities
