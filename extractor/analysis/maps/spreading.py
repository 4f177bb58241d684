"""Where thumbnails go on a map: near their points, apart from each other, over few points."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Spot", "spread"]

CELL = 4  # pixels that points are counted in
ROUNDS = 5  # points of each thumbnail-sized cell that are tried
MAX_SPOTS = 90  # more of them crowd the picture
# Distances from the point that are tried, in lengths of a thumbnail.
DISTANCES = (0.7, 1.0, 1.4, 1.9, 2.5)
DIRECTIONS = 12
# Other points that a thumbnail on its point may cover. A loose map loses a few. Clusters stay
# visible, since their thumbnails lie beside them.
MAX_COVERED = 4

Floats = npt.NDArray[np.float64]


class Spot(NamedTuple):
    """One thumbnail.

    Attributes:
        point: Number of its point.
        x: Middle of the thumbnail, in pixels from the left.
        y: Middle of the thumbnail, in pixels from the bottom.
    """

    point: int
    x: float
    y: float


def spread(at: Floats, area: tuple[int, int], edge: int) -> list[Spot]:
    """Return thumbnails for some points, spread over the whole area.

    A thumbnail lies on its point, or beside it if it would cover others there.

    >>> spread(np.array([[50.0, 50.0]]), (100, 100), 20)
    [Spot(point=0, x=50.0, y=50.0)]

    Args:
        at: ``(n, 2)``, points in pixels from the left and the bottom.
        area: Width and height in pixels.
        edge: Edge of a thumbnail in pixels, the gap around it included.
    """
    covered = _Covered(at, area, edge)
    taken = np.empty((0, 2))
    spots: list[Spot] = []
    for point in _in_turn(at, edge):
        x, y = at[point].tolist()
        is_loose = covered.at(x, y) - 1 <= MAX_COVERED
        for to_x, to_y in [(x, y)] if is_loose else _beside(x, y, edge):
            is_inside = min(to_x, to_y) >= edge / 2
            is_inside &= to_x <= area[0] - edge / 2 and to_y <= area[1] - edge / 2
            is_free = not (np.abs(taken - (to_x, to_y)).max(axis=1) < edge).any()
            if is_inside and is_free and (is_loose or not covered.at(to_x, to_y)):
                spots.append(Spot(point, to_x, to_y))
                taken = np.append(taken, [(to_x, to_y)], axis=0)
                break
        if len(spots) == MAX_SPOTS:
            break
    return spots


def _beside(x: float, y: float, edge: int) -> list[tuple[float, float]]:
    """Return positions around a point, the nearest first."""
    angles = [2 * math.pi * turn / DIRECTIONS for turn in range(DIRECTIONS)]
    return [
        (x + distance * edge * math.cos(angle), y + distance * edge * math.sin(angle))
        for distance in DISTANCES
        for angle in angles
    ]


def _in_turn(at: Floats, edge: int) -> list[int]:
    """Return points in the order they are tried: one of each cell, then another of each."""
    cells = np.floor(at / edge).astype(np.int64)
    far = np.abs(at / edge - cells - 0.5).max(axis=1)  # from the middle of the cell
    order = np.lexsort((far, cells[:, 1], cells[:, 0]))
    is_first = np.append(True, (np.diff(cells[order], axis=0) != 0).any(axis=1))
    starts = np.flatnonzero(is_first)
    rank = np.arange(len(at)) - np.repeat(starts, np.diff(np.append(starts, len(at))))
    return [point for turn in range(ROUNDS) for point in order[rank == turn].tolist()]


class _Covered:
    """Counts the points that a thumbnail covers, from sums over a grid.

    Args:
        at: ``(n, 2)``, points in pixels.
        area: Width and height in pixels.
        edge: Edge of a thumbnail in pixels.
    """

    def __init__(self, at: Floats, area: tuple[int, int], edge: int) -> None:
        bins = [np.arange(0, length + 2 * CELL, CELL) for length in area]
        counts = np.histogram2d(at[:, 0], at[:, 1], bins=bins)[0].astype(np.int64)
        self._sums = np.pad(counts.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
        self._half = edge / 2

    def at(self, x: float, y: float) -> int:
        """Return the number of points that a thumbnail covers."""
        left, right = (self._cell(x + side * self._half, 0) for side in (-1, 1))
        low, high = (self._cell(y + side * self._half, 1) for side in (-1, 1))
        sums = self._sums
        return int(sums[right, high] - sums[left, high] - sums[right, low] + sums[left, low])

    def _cell(self, pixel: float, axis: int) -> int:
        return min(max(round(pixel / CELL), 0), int(self._sums.shape[axis]) - 1)
