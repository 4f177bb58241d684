"""The README's chart: bars in proportion, and words for readers who cannot see them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import draw_chart
import pytest

IMAGES = Path(__file__).parents[2] / "docs" / "img"
SVG = "{http://www.w3.org/2000/svg}"


def results(**rates: float) -> dict[str, Any]:
    return {
        "model": "tiny<net>",
        "images": 2004,
        "machine": {"cpu": "A processor", "cores": 2, "device": "cpu", "gpu": ""},
        "versions": {"torch": "2.9.1+cpu"},
        "rates": {
            side.replace("_", "-"): {"median": rate, "min": rate / 2, "max": rate * 2}
            for side, rate in rates.items()
        },
    }


def drawn(**rates: float) -> ElementTree.Element:
    return ElementTree.fromstring(draw_chart.draw(results(**rates)))


def test_bars_are_proportional_to_median_rates() -> None:
    chart = drawn(extract=100.0, timm_tuned=50.0, common_recipe=25.0)
    widths = [float(bar.attrib["width"]) for bar in chart.iter(f"{SVG}rect")]
    assert widths == pytest.approx([draw_chart.FULL_BAR * share for share in (1, 0.5, 0.25)])
    assert [bar.attrib["class"] for bar in chart.iter(f"{SVG}rect")] == ["ours", "other", "other"]


def test_chart_names_model_machine_and_rates() -> None:
    chart = drawn(extract=90.04, common_recipe=14.9)
    text = " ".join("".join(element.itertext()) for element in chart.iter(f"{SVG}text"))
    for fact in ("tiny<net>", "2,004 photos", "A processor", "2 cores", "torch 2.9.1", "90.0"):
        assert fact in text
    assert "timm" not in text  # was not measured


def test_chart_describes_itself_to_screen_readers() -> None:
    chart = drawn(extract=90.0, timm_tuned=46.3)
    labels = [chart.find(f"{SVG}{name}") for name in chart.attrib["aria-labelledby"].split()]
    title, desc = (label.text or "" for label in labels if label is not None)
    assert "tiny<net>: images per second" in title
    assert "extract: 90.0" in desc
    assert "A processor" in desc


def test_chart_has_colors_for_dark_mode() -> None:
    assert "prefers-color-scheme: dark" in draw_chart.draw(results(extract=1.0))


def test_committed_chart_is_drawn_from_committed_figures() -> None:
    figures = json.loads((IMAGES / "throughput.json").read_text("utf-8"))
    assert draw_chart.draw(figures) == (IMAGES / "throughput.svg").read_text("utf-8")
    assert set(draw_chart.SIDES) <= set(figures["rates"])


def test_readme_describes_the_committed_chart() -> None:
    figures = json.loads((IMAGES / "throughput.json").read_text("utf-8"))
    readme = (IMAGES.parents[1] / "README.md").read_text("utf-8")
    described = readme.partition("![")[2].partition("](docs/img/throughput.svg)")[0]
    assert figures["model"] in described
    for side in draw_chart.SIDES:
        assert f"{figures['rates'][side]['median']:.1f}" in described
