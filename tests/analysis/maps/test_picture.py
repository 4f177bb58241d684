"""Pictures of maps: what they show, and that odd labels and lost images do not matter."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from extractor import StoreMap, map_store
from extractor.analysis.maps import picture as module
from extractor.analysis.maps.picture import COLORS, GRAY, MAX_LABELS
from extractor.analysis.maps.thumbnails import ImageCounts
from extractor.errors import InstallationError, UsageError

pytest.importorskip("matplotlib")


@pytest.fixture
def store_map(pictures: Any) -> StoreMap:
    return map_store(pictures.run())


def texts_of(figure: Any) -> list[str]:
    (legend,) = figure.legends or [None]
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def figure_of(store_map: StoreMap, labels: list[str] | None) -> Any:
    return module._figure(store_map, module._points(store_map, labels), [])


def rgb(color: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(color[1:]))


def test_png_and_svg_show_labels_and_thumbnails(store_map: StoreMap, tmp_path: Path) -> None:
    files = [tmp_path / "map.png", tmp_path / "map.svg"]
    assert store_map.draw(files).shown > 2
    with Image.open(files[0]) as picture:
        assert picture.size == (1800, 1350)
        colors = {color for _, color in picture.convert("RGB").getcolors(2**24)}
    assert {rgb(COLORS[0]), rgb(COLORS[1])} <= colors  # frames and legend
    drawn = files[1].read_text()
    assert drawn.lstrip().startswith("<?xml")
    assert "store: PCA of 8 rows of" in drawn
    assert drawn.count("<image") > 2


def test_the_same_map_gives_the_same_bytes(store_map: StoreMap, tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg", "a.png", "b.png"):
        store_map.draw(tmp_path / name)
    for suffix in ("svg", "png"):
        files = [(tmp_path / f"{name}.{suffix}").read_bytes() for name in "ab"]
        assert files[0] == files[1]


def test_the_legend_names_the_most_frequent_labels(store_map: StoreMap) -> None:
    labels = ["many"] * 3 + ["_hidden"] * 2 + ["$x^2$", "a\nb", "long " * 20]
    assert texts_of(figure_of(store_map, labels)) == [
        "many (3)",
        "_hidden (2)",
        "$x^2$ (1)",
        "a\N{REPLACEMENT CHARACTER}b (1)",
        "long long long long l... (1)",
    ]
    assert texts_of(figure_of(store_map, None)) == []


def test_labels_beyond_the_limit_are_gray(
    store_map: StoreMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_LABELS", 2)
    figure = figure_of(store_map, list("aaabbccd"))
    assert texts_of(figure) == ["a (3)", "b (2)", "2 other labels"]
    grays, colored, *others = figure.axes[0].collections
    gray = tuple(value / 255 for value in rgb(GRAY))
    assert [tuple(color[:3]) for color in grays.get_facecolor()] == [gray] * 3
    assert len(colored.get_offsets()) == 5
    assert not any(len(other.get_offsets()) for other in others)


def test_labels_differ_in_color_or_mark(store_map: StoreMap) -> None:
    points = module._points(store_map, list("aaaaaaab"))
    looks = {(points.color(number), points.marker(number)) for number in range(MAX_LABELS)}
    assert len(looks) == MAX_LABELS


def test_odd_labels_are_drawn(store_map: StoreMap, tmp_path: Path) -> None:
    labels = ["$", "\\frac{", "\udcff", "\x00", "猫", "", "_", "<b>&amp;"]
    store_map.draw([tmp_path / "odd.png", tmp_path / "odd.svg"], [name or " " for name in labels])
    assert (tmp_path / "odd.svg").stat().st_size > 1000


def test_moved_and_changed_images_have_no_thumbnail(pictures: Any, tmp_path: Path) -> None:
    store_map = map_store(pictures.run())
    whole = store_map.draw(tmp_path / "a.png")
    (pictures.images / "red/0.png").unlink()
    pictures.add("red/1.png", (1, 2, 3))
    counts = store_map.draw(tmp_path / "b.png")
    assert (counts.unreadable, counts.changed, counts.shown) == (1, 1, whole.shown - 2)
    pictures.images.rename(tmp_path / "moved")
    lost = store_map.draw(tmp_path / "c.png")
    assert lost == ImageCounts(unreadable=whole.shown)
    found = store_map.draw(tmp_path / "d.png", root=tmp_path / "moved")
    assert found == counts
    assert store_map.draw(tmp_path / "e.png", thumbnails=False) == ImageCounts()


@pytest.mark.parametrize("count", [1, 2])
def test_few_rows_are_drawn(count: int, tmp_path: Path, write_store: Any) -> None:
    out = write_store(tmp_path / "out", [np.eye(3, dtype=np.float32)[:count]])
    store_map = map_store(out)
    store_map.draw(tmp_path / "map.svg")
    assert f"PCA of {count} row" in (tmp_path / "map.svg").read_text()


def test_many_points_are_a_picture_in_an_svg(
    tmp_path: Path, write_store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RASTER_POINTS", 40)
    rows = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    rows[7] = np.nan
    store_map = map_store(write_store(tmp_path / "out", [rows]))
    store_map.draw(tmp_path / "many.svg", ["a", "b"] * 25, thumbnails=False)
    drawn = (tmp_path / "many.svg").read_text()
    assert "<image" in drawn
    monkeypatch.setattr(module, "RASTER_POINTS", 49)
    store_map.draw(tmp_path / "few.svg", thumbnails=False)
    assert "<image" not in (tmp_path / "few.svg").read_text()


def test_wrong_arguments_are_named(
    store_map: StoreMap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there.png").write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"picture: got map.pdf, expected .* \.png, \.svg"):
        store_map.draw("map.pdf")
    with pytest.raises(UsageError, match=r"picture: .*there.png exists; replace it with"):
        store_map.draw(tmp_path / "there.png")
    assert (tmp_path / "there.png").read_bytes() == b"mine"
    with pytest.raises(UsageError, match="picture: there is no folder"):
        store_map.draw(tmp_path / "no" / "map.png")
    with pytest.raises(UsageError, match="root: there is no folder"):
        store_map.draw(tmp_path / "map.png", root=tmp_path / "no")
    with pytest.raises(UsageError, match="labels: got 2 labels for 8 rows"):
        store_map.draw(tmp_path / "map.png", ["a", "b"])
    with pytest.raises(UsageError, match=r"map.png is in the store .*store; name a file beside"):
        store_map.draw(store_map.store.path / "derived" / "map.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UsageError, match=r"folder.png is a folder"):
        store_map.draw(tmp_path / "folder.png", overwrite=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InstallationError, match=r"pip install 'backbone-extractor\[map\]'"):
        store_map.draw(tmp_path / "map.png")
    assert not (tmp_path / "map.png").exists()
