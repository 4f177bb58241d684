"""Picture of a map: points in the colors of their labels, and thumbnails where they fit."""

from __future__ import annotations

import importlib.util
import io
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from extractor.analysis.maps.spreading import Spot, spread
from extractor.analysis.maps.thumbnails import ImageCounts, Pixels, Thumbnails
from extractor.errors import InstallationError
from extractor.search.sheet import check_new_file, write_new_file
from extractor.text import plural

if TYPE_CHECKING:
    from extractor.analysis.mapping import StoreMap

__all__ = ["check_pictures", "write_picture"]

SUFFIXES = (".png", ".svg")

# Okabe and Ito (2008): told apart with any color vision. Yellow is left out, being pale on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^")  # of labels 1 to 7, 8 to 14 and 15 to 21
MAX_LABELS = 20  # in the legend; more of them cannot be told apart
GRAY = "#B8B8B8"
LABEL_CHARACTERS = 24

DPI = 150
WIDTH, HEIGHT = 1800, 1350  # pixels
AREA = (60, 60, 1690, 1220)  # of the points: left, bottom, width, height
LEGEND = 330  # pixels, taken from the width
THUMBNAIL = 84  # pixels of the longer edge, frame included
FRAME = 3
GAP = 4
RASTER_POINTS = 2000  # more points make an SVG that few programs open, so they become a picture
FALLBACK_FONTS = ("Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "Hiragino Sans")

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Points:
    """Rows in the picture.

    Attributes:
        rows: ``(n,)``, rows of the store.
        at: ``(n, 2)``, pixels from the left and from the bottom of the area.
        labels: ``(n,)``, number in the legend; -1 for the gray ones.
        names: Label of each number, the most frequent first.
        others: Number of labels that are gray.
        area: Width and height in pixels.
    """

    rows: Rows
    at: Floats
    labels: Rows
    names: tuple[str, ...]
    others: int
    area: tuple[int, int]

    def color(self, number: int) -> str:
        if not self.names:
            return COLORS[0]
        return GRAY if number < 0 else COLORS[number % len(COLORS)]

    def marker(self, number: int) -> str:
        return MARKERS[max(number, 0) // len(COLORS)]


def check_pictures(paths: Sequence[str | os.PathLike[str]], *, overwrite: bool) -> None:
    """Check that pictures can be drawn and written to files.

    Raises:
        InstallationError: matplotlib is not installed.
        UsageError: A suffix is neither of PNG nor of SVG, or a file exists.
    """
    for path in paths:
        check_new_file(path, "picture", SUFFIXES, overwrite=overwrite)
    if importlib.util.find_spec("matplotlib") is None:
        raise InstallationError(
            "a picture of a map needs matplotlib; try pip install 'backbone-extractor[map]'"
        )


def write_picture(
    store_map: StoreMap,
    paths: Sequence[str | os.PathLike[str]],
    labels: Sequence[str] | None,
    *,
    root: str | os.PathLike[str] | None,
) -> ImageCounts:
    """Draw a map and write it to files, each of which appears whole or not at all.

    Args:
        store_map: The map.
        paths: Files that end with ``.png`` or ``.svg``.
        labels: Label of each row of the store; None for none.
        root: Folder of the images; None for a picture without thumbnails.

    Returns:
        What became of the images that were to be shown.

    Raises:
        UsageError: A file cannot be written.
    """
    import matplotlib
    from matplotlib import font_manager

    points = _points(store_map, labels)
    images, counts = _thumbnails(store_map, points, root)
    installed = {font.name for font in font_manager.fontManager.ttflist}
    style = {
        "font.family": ["DejaVu Sans", *[name for name in FALLBACK_FONTS if name in installed]],
        "font.size": 9,
        "text.parse_math": False,  # a label may hold dollar signs
        "image.composite_image": False,  # one thumbnail, one image
        "svg.hashsalt": "extractor",  # the same map gives the same bytes
    }
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about characters that the fonts lack
        figure = _figure(store_map, points, images)
        for path in paths:
            kind = Path(path).suffix.lower().removeprefix(".")
            about = {"Title": _title(store_map)} | ({"Date": None} if kind == "svg" else {})
            for image in figure.axes[0].images:  # an SVG keeps all pixels of a thumbnail
                image.set_interpolation("none" if kind == "svg" else "antialiased")
            content = io.BytesIO()
            figure.savefig(content, format=kind, dpi=DPI, metadata=about)
            write_new_file(path, "picture", content.getvalue())
    return counts


def _points(store_map: StoreMap, labels: Sequence[str] | None) -> _Points:
    rows = store_map.rows
    coordinates = store_map.coordinates[rows]
    if labels is None:
        at, none = _scaled(coordinates, AREA[2:]), np.full(len(rows), -1)
        return _Points(rows, at, none, (), 0, AREA[2:])
    mapped = [labels[row] for row in rows.tolist()]
    counts = sorted(Counter(mapped).items(), key=lambda item: (-item[1], item[0]))
    names = tuple(name for name, _ in counts[:MAX_LABELS])
    number = {name: at for at, name in enumerate(names)}
    numbers = np.array([number.get(name, -1) for name in mapped], np.int64)
    area = AREA[2] - LEGEND, AREA[3]
    others = len(counts) - len(names)
    return _Points(rows, _scaled(coordinates, area), numbers, names, others, area)


def _scaled(coordinates: npt.NDArray[np.float32], area: tuple[int, int]) -> Floats:
    """Return pixels in an area; one unit is as long along x as along y."""
    size = np.array(area, np.float64)
    margin = THUMBNAIL / 2 + 2 * GAP
    low = coordinates.min(axis=0).astype(np.float64)
    high = coordinates.max(axis=0).astype(np.float64)
    scale = ((size - 2 * margin) / np.maximum(high - low, 1e-12)).min()
    scale = scale if (high > low).any() else 1.0
    pixels: Floats = (coordinates - (low + high) / 2) * scale + size / 2
    return pixels


def _thumbnails(
    store_map: StoreMap, points: _Points, root: str | os.PathLike[str] | None
) -> tuple[list[tuple[Spot, Pixels]], ImageCounts]:
    """Return the thumbnails of some points, none of which covers another."""
    if root is None:
        return [], ImageCounts()
    reader = Thumbnails(root, 2 * (THUMBNAIL - 2 * FRAME))  # sharp in an SVG, too
    spots = spread(points.at, points.area, THUMBNAIL + GAP)
    rows = points.rows[[spot.point for spot in spots]]
    digests = store_map.store._values("sha256", rows)
    found = reader.read(store_map.store._paths_of(rows), digests)
    pairs = zip(spots, found, strict=True)
    return [(spot, pixels) for spot, pixels in pairs if pixels is not None], reader.counts


def _title(store_map: StoreMap) -> str:
    store, method = store_map.store, store_map.method.upper()
    rows = plural(len(store_map.rows), "row")
    return f"{_shown(store.path.name, 50)}: {method} of {rows} of {_shown(store.info.model, 50)}"


def _figure(store_map: StoreMap, points: _Points, images: Sequence[tuple[Spot, Pixels]]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    width, height = points.area
    area = (AREA[0] / WIDTH, AREA[1] / HEIGHT, width / WIDTH, height / HEIGHT)
    axes = figure.add_axes(area, xlim=(0, width), ylim=(0, height), xticks=[], yticks=[])
    axes.spines[:].set_color("#CCCCCC")
    axes.set_title(_title(store_map), fontsize=13, loc="left", pad=10)
    if store_map.explained is not None:
        first, second = (f"{100 * share:.1f} % of the variance" for share in store_map.explained)
        axes.set_xlabel(f"first component, {first}", color="#444444")
        axes.set_ylabel(f"second component, {second}", color="#444444")
    on_point = [
        spot.point for spot, _ in images if (spot.x, spot.y) == tuple(points.at[spot.point])
    ]
    _add_points(axes, points, on_point)
    for spot, pixels in images:
        _add_thumbnail(axes, points, spot, pixels)
    axes.set(xlim=(0, width), ylim=(0, height))
    if points.names:
        _add_legend(figure, points)
    return figure


def _add_points(axes: Any, points: _Points, hidden: list[int]) -> None:
    count = len(points.rows)
    size = float(np.clip(30 * (1000 / max(count, 1)) ** 0.5, 1, 40))
    shown = np.ones(count, bool)
    shown[hidden] = False
    colors = np.array([points.color(number) for number in range(len(points.names))] + [GRAY])
    if not points.names:
        colors[-1] = points.color(-1)
    group = np.where(points.labels < 0, -1, points.labels // len(COLORS))
    for number in range(-1, len(MARKERS)):
        mine = np.flatnonzero(shown & (group == number))
        mine = np.random.default_rng(0).permutation(mine)  # so that no label covers all others
        axes.scatter(
            *points.at[mine].T,
            s=size,
            c=colors[points.labels[mine]],
            marker=MARKERS[max(number, 0)],
            linewidths=0.4 if count <= RASTER_POINTS else 0,
            edgecolors="white",
            alpha=0.9 if count <= RASTER_POINTS else 0.6,
            rasterized=count > RASTER_POINTS,
            zorder=2 if number >= 0 else 1,
        )


def _add_thumbnail(axes: Any, points: _Points, spot: Spot, pixels: Pixels) -> None:
    """Add a thumbnail in a frame, with a line to its point and a mark of its label."""
    from matplotlib.patches import Rectangle

    number = int(points.labels[spot.point])
    color = points.color(number)
    x, y = points.at[spot.point]
    axes.plot([x, spot.x], [y, spot.y], color=color, linewidth=0.9, zorder=2.5)
    height, width = (edge / 2 for edge in pixels.shape[:2])  # they have twice the pixels
    left, bottom = spot.x - width / 2, spot.y - height / 2
    size = width + 2 * FRAME, height + 2 * FRAME
    frame = Rectangle((left - FRAME, bottom - FRAME), *size, facecolor=color, zorder=3)
    axes.add_patch(frame)
    extent = (left, left + width, bottom, bottom + height)
    axes.imshow(pixels, extent=extent, aspect="auto", zorder=4)
    if number >= len(COLORS):  # the color alone stands for an earlier label
        mark = {"c": color, "marker": points.marker(number), "s": 30, "edgecolors": "white"}
        axes.scatter([left], [bottom + height], linewidths=0.8, zorder=5, **mark)


def _add_legend(figure: Any, points: _Points) -> None:
    from matplotlib.lines import Line2D

    counts = np.bincount(points.labels[points.labels >= 0], minlength=len(points.names))
    texts = [
        f"{_shown(name, LABEL_CHARACTERS)} ({rows:,})"
        for name, rows in zip(points.names, counts.tolist(), strict=True)
    ]
    numbers = list(range(len(points.names)))
    if points.others:
        texts.append(plural(points.others, "other label"))
        numbers.append(-1)
    handles = [
        Line2D([], [], linestyle="", marker=points.marker(n), color=points.color(n), markersize=6)
        for n in numbers
    ]
    corner = ((AREA[0] + points.area[0] + 20) / WIDTH, (AREA[1] + AREA[3]) / HEIGHT)
    # matplotlib would leave out texts that begin with an underscore.
    legend = figure.legend(
        handles,
        ["label"] * len(handles),
        loc="upper left",
        bbox_to_anchor=corner,
        frameon=False,
        borderaxespad=0,
        handletextpad=0.3,
        labelspacing=0.7,
    )
    for text, shown in zip(legend.get_texts(), texts, strict=True):
        text.set_text(shown)


def _shown(text: str, characters: int) -> str:
    """Return text in one line that can be drawn, shortened at its end."""
    plain = text.encode("utf-8", "backslashreplace").decode()
    plain = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in plain)
    return plain if len(plain) <= characters else f"{plain[: characters - 3]}..."
