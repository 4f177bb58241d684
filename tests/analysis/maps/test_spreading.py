"""Thumbnails lie apart, inside the area, on or beside their points."""

from __future__ import annotations

import numpy as np
import pytest

from extractor.analysis.maps.spreading import MAX_COVERED, MAX_SPOTS, Spot, spread

AREA = (600, 400)
EDGE = 40


def points(kind: str) -> np.ndarray:
    random = np.random.default_rng(0)
    if kind == "loose":
        return random.uniform((30, 30), (570, 370), (60, 2))
    if kind == "dense":
        return random.uniform((30, 30), (570, 370), (20_000, 2))
    centers = np.array([[150, 150], [450, 250]])
    return centers[np.arange(200) % 2] + random.normal(size=(200, 2)) * 5


def covered(at: np.ndarray, spot: Spot, edge: float) -> int:
    return int((np.abs(at - (spot.x, spot.y)).max(axis=1) < edge / 2).sum())


@pytest.mark.parametrize("kind", ["loose", "clusters", "dense"])
def test_thumbnails_lie_apart_and_inside_and_cover_few_points(kind: str) -> None:
    at = points(kind)
    spots = spread(at, AREA, EDGE)
    assert len(spots) <= MAX_SPOTS
    assert (len(spots) > 0) == (kind != "dense")
    assert len({spot.point for spot in spots}) == len(spots)
    middles = np.array([(spot.x, spot.y) for spot in spots]).reshape(-1, 2)
    assert (middles >= EDGE / 2).all()
    assert (middles <= np.array(AREA) - EDGE / 2).all()
    for number, middle in enumerate(middles):
        others = np.delete(middles, number, axis=0)
        assert not (np.abs(others - middle).max(axis=1, initial=0) < EDGE).any() or not len(others)
    for spot in spots:
        is_on_point = (spot.x, spot.y) == tuple(at[spot.point])
        # Points are counted in cells of four pixels, so the edge of a thumbnail is that unsure.
        assert covered(at, spot, EDGE - 8) <= (MAX_COVERED + 1 if is_on_point else 0)
        assert is_on_point == (kind == "loose")


def test_a_single_point_has_its_thumbnail_and_a_border_has_none() -> None:
    assert spread(np.array([[300.0, 200.0]]), AREA, EDGE) == [Spot(0, 300.0, 200.0)]
    assert spread(np.array([[10.0, 200.0]]), AREA, EDGE) == []
    assert spread(np.empty((0, 2)), AREA, EDGE) == []
