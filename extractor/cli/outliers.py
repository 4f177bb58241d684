"""``extract outliers``: images that are far from all others, and labels that may be wrong."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from extractor.cli.duplicates import (
    SHEET_ROWS,
    add_output_options,
    check_output,
    draw_tiles,
    image_finder,
    write_csv,
)
from extractor.terminal.console import Bar, logging_to, one_line, print_lines, say
from extractor.terminal.parser import Parser
from extractor.text import plural

if TYPE_CHECKING:
    from extractor.analysis.outliers import LabelError, Outlier, Outliers

__all__ = ["outliers", "outliers_parser"]

SHEET_NEIGHBORS = 5
PHASES = {"classes": "comparing within classes ..."}

DESCRIPTION = """\
Rank images by their mean cosine distance to the nearest others. With --labels, also rank them
within their class, and list images whose neighbors agree on another label.

  extract outliers features/resnet50 --sheet outliers.png
  extract outliers features/resnet50 --labels folders --csv outliers.csv
"""


def outliers_parser() -> argparse.ArgumentParser:
    """Return the parser of ``extract outliers``."""
    parser = Parser(
        prog="extract outliers",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("store", metavar="STORE", help="folder of the store")
    parser.add_argument(
        "-k", type=int, metavar="N", help="number of neighbors (default: 10, or all others)"
    )
    parser.add_argument(
        "--labels",
        metavar="LABELS",
        help="folders for the name of the folder that holds the image, a CSV file with the columns "
        "path and label, or FILE.py:FUNCTION, which gets a path (default: no labels)",
    )
    add_output_options(parser, "images")
    return parser


def outliers(arguments: Sequence[str]) -> int:
    """List the outliers of a store; return the exit code."""
    parsed = outliers_parser().parse_args(arguments)
    check_output(parsed)
    from extractor.analysis.outliers import find_outliers

    bar = Bar(quiet=False, status="reading rows ...", unit="row")
    with bar, logging_to(bar.warn):
        found = find_outliers(parsed.store, parsed.labels, k=parsed.k, progress=bar.follow(PHASES))
    if parsed.csv:
        write_csv(parsed.csv, _HEAD, _records(found))
        say(f"table of all images: {parsed.csv}")
    if parsed.sheet:
        _draw(found, parsed)
    if parsed.json:
        print_lines([json.dumps(found.to_mapping(), indent=1)])
    else:
        print_lines(_page(found, parsed))
    return 0


def _page(found: Outliers, parsed: argparse.Namespace) -> list[str]:
    top: int = parsed.top
    lines = [
        f"{parsed.store}: {plural(len(found.store), 'row')}, {plural(found.k, 'neighbor')}, "
        f"{found.method}"
    ]
    if found.left_out:
        lines.append(f"{plural(found.left_out, 'row')} with NaN or infinity left out")
    lines += ["", f"{'rank':>6}  distance  path"]
    lines += [
        f"{each.rank:6,}  {each.distance:8.4f}  {one_line(each.path)}" for each in found[:top]
    ]
    if found.classes:
        lines += ["", f"{'images':>6}  distance  furthest in its class"]
        for rows in list(found.classes.values())[:top]:
            for each in found.of_rows(rows[:1]):
                lines.append(f"{len(rows):6,}  {each.class_distance:8.4f}  {one_line(each.path)}")
        if len(found.classes) > top:
            lines.append(f"{len(found.classes) - top:6,}  more classes")
    if parsed.labels:
        lines += ["", _heading(found.label_errors)]
        lines += [
            one_line(f"{each.agreement:6.0%}  {each.label} -> {each.suggested}  {each.path}")
            for each in found.label_errors[:top]
        ]
        if len(found.label_errors) > top:
            lines.append(f"{len(found.label_errors) - top:6,}  more; try --csv FILE or --json")
    return lines


def _heading(errors: Sequence[LabelError]) -> str:
    if not errors:
        return "no image whose neighbors agree on another label"
    return f"{plural(len(errors), 'image')} whose neighbors agree on another label:"


_HEAD = (
    "rank",
    "row",
    "id",
    "distance",
    "label",
    "class_rank",
    "class_distance",
    "suggested",
    "agreement",
    "path",
)


def _records(found: Outliers) -> Iterable[Sequence[Any]]:
    errors = {each.row: each for each in found.label_errors}
    for each in found:
        error = errors.get(each.row)
        yield (
            each.rank,
            each.row,
            each.id,
            each.distance,
            each.label,
            each.class_rank,
            each.class_distance,
            error.suggested if error else None,
            error.agreement if error else None,
            each.path,
        )


def _draw(found: Outliers, parsed: argparse.Namespace) -> None:
    find = image_finder(found.store, parsed.root)

    def tiles(each: Outlier | LabelError, head: str) -> list[tuple[str, str]]:
        row = [(find(each.row, each.path), f"{head}\n{each.path}")]
        for near in found.of_rows(list(each.neighbors[:SHEET_NEIGHBORS])):
            label = "near" if near.label is None else f"near: {near.label}"
            row.append((find(near.row, near.path), f"{label}\n{near.path}"))
        return row

    top = min(parsed.top, SHEET_ROWS // (2 if found.label_errors else 1))
    rows = [
        tiles(each, f"{each.suggested}? {each.agreement:.0%}") for each in found.label_errors[:top]
    ]
    rows += [tiles(each, f"rank {each.rank}: {each.distance:.3f}") for each in found[:top]]
    if not rows:
        say("no images to rank, so no contact sheet")
        return
    draw_tiles(parsed.sheet, rows, [parsed.root or found.store.root])
