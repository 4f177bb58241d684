#!/usr/bin/env python3
"""Draw the README's bar chart from the JSON of scripts/benchmarks/throughput.py.

    python scripts/benchmarks/throughput.py PHOTOS --json docs/img/throughput.json
    python scripts/draw_chart.py docs/img/throughput.json docs/img/throughput.svg

The SVG is plain text: it needs no plotting library, follows the reader's light or dark color
scheme, and describes itself to screen readers. Each bar is the median of the measured turns.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

# Side of the benchmark -> (name, description) in the chart, from top to bottom.
SIDES = {
    "extract": ("extract", "this program, default options"),
    "timm-tuned": ("timm's loader, tuned", "half precision, channels last, a worker per core"),
    "common-recipe": ("the common recipe", "ImageFolder, DataLoader, PIL, float32"),
}
WIDTH = 760
MARGIN = 16
BAR_HEIGHT = 22
ROW_HEIGHT = 58  # one line of text, its bar and the gap below
TOP = 58  # title and subtitle
VALUE_WIDTH = 110  # room for the figure behind the longest bar
FULL_BAR = WIDTH - 2 * MARGIN - VALUE_WIDTH

STYLE = """\
    text { font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
    .strong { font-size: 15px; font-weight: 600; fill: #1f2328; }
    .label { font-size: 14px; fill: #1f2328; }
    .muted { font-size: 13px; fill: #59636e; }
    .ours { fill: #0969da; }
    .other { fill: #8c959f; }
    @media (prefers-color-scheme: dark) {
      .strong, .label { fill: #f0f6fc; }
      .muted { fill: #9198a1; }
      .ours { fill: #4493f8; }
      .other { fill: #656c76; }
    }"""


def machine(results: dict[str, Any]) -> str:
    """Return one line that names the machine, the versions and the date of the measurement."""
    hardware = results["machine"]["gpu"] or results["machine"]["cpu"]
    cores = results["machine"]["cores"]
    torch = results["versions"].get("torch", "").partition("+")[0]
    parts = [hardware, f"{cores} cores", f"torch {torch}", results.get("date", "")]
    return ", ".join(part for part in parts if part)


def draw(results: dict[str, Any]) -> str:
    """Return the chart as SVG.

    Args:
        results: The benchmark's JSON. Only ``extract`` and the sides of ``SIDES`` are drawn.
    """
    measured = results["rates"]
    rates = {side: measured[side]["median"] for side in SIDES if side in measured}
    images = f"{results['images']:,} photos"
    title = f"{results['model']}: images per second, higher is better"
    facts = "; ".join(f"{SIDES[side][0]}: {rates[side]:.1f}" for side in rates)
    height = TOP + ROW_HEIGHT * len(rates) + MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}"'
        f' viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="title desc">',
        f'  <title id="title">{escape(title)}</title>',
        f'  <desc id="desc">{escape(f"Bar chart, {images}, {machine(results)}. {facts}.")}</desc>',
        f"  <style>\n{STYLE}\n  </style>",
        _text(MARGIN, 24, "strong", title),
        _text(MARGIN, 44, "muted", f"{images}; {machine(results)}"),
    ]
    for index, side in enumerate(rates):
        top = TOP + ROW_HEIGHT * index
        width = FULL_BAR * rates[side] / max(rates.values())
        name, description = SIDES[side]
        lines.append(
            f'  <text x="{MARGIN}" y="{top + 20}"><tspan class="label">{escape(name)}</tspan>'
            f'<tspan class="muted" dx="8">{escape(description)}</tspan></text>'
        )
        lines.append(
            f'  <rect class="{"ours" if side == "extract" else "other"}" x="{MARGIN}"'
            f' y="{top + 28}" width="{width:.1f}" height="{BAR_HEIGHT}" rx="3"/>'
        )
        lines.append(_text(MARGIN + width + 8, top + 44, "strong", f"{rates[side]:.1f}"))
    return "\n".join([*lines, "</svg>"]) + "\n"


def _text(x: float, y: float, style: str, content: str) -> str:
    return f'  <text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(content)}</text>'


def main() -> None:
    """Draw the chart named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="JSON of the benchmark")
    parser.add_argument("chart", type=Path, help="SVG to write")
    args = parser.parse_args()
    args.chart.write_text(draw(json.loads(args.results.read_text("utf-8"))), "utf-8")


if __name__ == "__main__":
    main()
