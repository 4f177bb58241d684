"""``extract map``: a map of a store, as a picture and as a table."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from extractor.cli.duplicates import warn_if_among_images
from extractor.cli.evaluate import LABELS_HELP
from extractor.terminal.console import Bar, logging_to, print_lines
from extractor.terminal.parser import Parser
from extractor.text import plural

if TYPE_CHECKING:
    from extractor.analysis.mapping import StoreMap

__all__ = ["map_parser", "map_rows"]

DESCRIPTION = """\
Put the rows of a store on a map, where similar images lie near each other. The map is kept in
STORE/derived, or in the user's cache if the store is read-only. Rows keep their coordinates, and
new rows are placed among them. --refit starts over.

  extract map features/resnet50 -o map.png                    a picture with thumbnails
  extract map features/resnet50 --method umap -o map.svg      needs backbone-extractor[map]
  extract map features/resnet50 --parquet map.parquet         a table for embedding-atlas
"""


def map_parser() -> argparse.ArgumentParser:
    """Return the parser of ``extract map``."""
    parser = Parser(
        prog="extract map",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("store", metavar="STORE", help="folder of the store")
    parser.add_argument(
        "--method",
        choices=("pca", "umap"),
        default="pca",
        help="two principal components, or UMAP, which shows clusters better (default: "
        "%(default)s)",
    )
    parser.add_argument("--labels", metavar="FILE", help=LABELS_HELP)
    parser.add_argument(
        "-o",
        dest="pictures",
        action="append",
        default=[],
        metavar="FILE",
        help="picture to draw, which ends with .png or .svg; may be repeated",
    )
    parser.add_argument(
        "--parquet", metavar="FILE", help="table to write: id, path, x, y, neighbors and images"
    )
    parser.add_argument(
        "--neighbors",
        type=int,
        default=10,
        metavar="N",
        help="number of neighbors of each row in the table; 0 for none (default: %(default)s)",
    )
    parser.add_argument(
        "--no-thumbnails",
        dest="thumbnails",
        action="store_false",
        help="neither draw images nor write them to the table",
    )
    parser.add_argument("--root", metavar="FOLDER", help="where the images are now")
    parser.add_argument(
        "--refit", action="store_true", help="make the map anew; all rows get other coordinates"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def map_rows(arguments: Sequence[str]) -> int:
    """Make or read the map of a store, and draw or write it; return the exit code."""
    parsed = map_parser().parse_args(arguments)
    from extractor.analysis.mapping import map_labels, map_store
    from extractor.analysis.maps.picture import check_pictures
    from extractor.analysis.maps.table import check_table
    from extractor.reading.reader import FeatureStore

    # What can be refused is refused before the map is made, which may take minutes.
    if parsed.pictures:
        check_pictures(parsed.pictures, overwrite=parsed.overwrite)
    if parsed.parquet:
        check_table(parsed.parquet, parsed.neighbors, overwrite=parsed.overwrite)
    store = FeatureStore.open(parsed.store)
    labels = None
    if parsed.pictures or parsed.parquet:
        labels = map_labels(store, parsed.labels)
    written: dict[str, str] = {}
    bar = Bar(quiet=False, status="reading the map ...", unit="row")
    with bar, logging_to(bar.warn):
        store_map = map_store(store, parsed.method, refit=parsed.refit)
        _write(store_map, labels, parsed, bar, written)
    for picture in parsed.pictures:
        if not picture.lower().endswith(".svg"):  # which is no image of a run
            warn_if_among_images(picture, [parsed.root or store.root])
    if parsed.json:
        print_lines([json.dumps(_content(store_map, written), indent=1)])
    else:
        print_lines(_page(store_map, written))
    return 0


def _write(
    store_map: StoreMap,
    labels: list[str] | None,
    parsed: argparse.Namespace,
    bar: Bar,
    written: dict[str, str],
) -> None:
    """Write what was asked for, and note for each file which images are missing in it."""
    from extractor.report import Progress

    options: dict[str, Any] = {
        "labels": labels,
        "thumbnails": parsed.thumbnails,
        "root": parsed.root,
        "overwrite": parsed.overwrite,
    }
    if parsed.pictures:
        bar.show("drawing the map ...")
        counts = store_map.draw(parsed.pictures, **options)
        written.update(dict.fromkeys(parsed.pictures, counts.problems))
    if parsed.parquet:
        bar.show("writing the table ...")
        counts = store_map.write_table(
            parsed.parquet,
            neighbors=parsed.neighbors,
            progress=lambda done, total: bar.update(Progress(done, total, 0)),
            **options,
        )
        written[parsed.parquet] = counts.problems
    for file, problems in written.items():
        if problems:
            bar.warn(f"{file}: {problems}")


def _content(store_map: StoreMap, written: dict[str, str]) -> dict[str, Any]:
    return {
        "store": os.fspath(store_map.store.path),
        "token": store_map.store.token,
        "method": store_map.method,
        "rows": len(store_map.store),
        "fitted": store_map.fitted,
        "placed": store_map.placed,
        "left_out": store_map.left_out,
        "was_made": store_map.was_made,
        "explained": store_map.explained,
        "path": os.fspath(store_map.path),
        "files": list(written),
    }


def _page(store_map: StoreMap, written: dict[str, str]) -> list[str]:
    rows = plural(len(store_map.rows), "row")
    if store_map.was_made:
        what = f"a new map of {rows}"
    elif store_map.placed:
        what = f"{plural(store_map.placed, 'new row')} placed among {rows}"
    else:
        what = f"{rows}, as before"
    lines = [f"{store_map.store.path}: {what}"]
    method: str = store_map.method
    if store_map.explained is not None:
        method += f", {100 * sum(store_map.explained):.1f} % of the variance"
    lines.append(f"method  {method}")
    lines.append(f"map     {store_map.path}")
    lines += [f"wrote   {file}" for file in written]
    if store_map.left_out:
        lines.append(f"{plural(store_map.left_out, 'row')} left out, with NaN or infinity")
    if store_map.fitted < len(store_map.rows) / 2:
        lines.append(
            f"the map was made from {plural(store_map.fitted, 'row')}; --refit makes it from all"
        )
    return lines
