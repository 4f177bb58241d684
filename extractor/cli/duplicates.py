"""``extract duplicates``: equal files and nearly equal images of a store, or of two."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from extractor.errors import UsageError
from extractor.terminal.console import Bar, logging_to, one_line, print_lines, say, warn
from extractor.terminal.parser import Parser
from extractor.text import plural

if TYPE_CHECKING:
    from extractor.analysis.duplicate_groups import DuplicateGroup, DuplicateImage, Duplicates
    from extractor.reading.reader import FeatureStore

__all__ = [
    "add_output_options",
    "check_output",
    "draw_tiles",
    "duplicates",
    "duplicates_parser",
    "image_finder",
    "warn_if_among_images",
    "write_csv",
]

PHASES = {"clustering": "clustering rows ...", "measuring": "measuring the recall ..."}
SHEET_ROWS = 80  # which fit into one picture
SHEET_IMAGES = 10  # of one group

DESCRIPTION = """\
List images that a store holds twice: equal files, by their SHA-256, and near duplicates, by the
cosine similarity of their rows. Nothing is deleted.

  extract duplicates features/resnet50 --sheet duplicates.png     look at them
  extract duplicates features/resnet50 --csv duplicates.csv       all of them as a table
  extract duplicates features/test --against features/train       images of test in train
"""


def duplicates_parser() -> argparse.ArgumentParser:
    """Return the parser of ``extract duplicates``."""
    parser = Parser(
        prog="extract duplicates",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("store", metavar="STORE", help="folder of the store")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.98,
        metavar="X",
        help="least cosine similarity of near duplicates (default: %(default)s)",
    )
    parser.add_argument(
        "--against",
        metavar="OTHER",
        help="list images of STORE that are also in another store of the same backbone",
    )
    add_output_options(parser, "groups")
    return parser


def add_output_options(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the options for output that ``duplicates`` and ``outliers`` have in common."""
    parser.add_argument(
        "--top",
        type=int,
        default=20,
        metavar="N",
        help=f"number of {what} that are printed and drawn (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print all of them as JSON")
    parser.add_argument("--csv", metavar="FILE", help="write all of them into a CSV file")
    parser.add_argument(
        "--sheet", metavar="FILE", help="draw them as thumbnails into a PNG or JPEG"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the files of --csv and --sheet"
    )
    parser.add_argument("--root", metavar="FOLDER", help="where the images are now, for --sheet")


def check_output(parsed: argparse.Namespace) -> None:
    """Check what is written before anything is computed.

    Raises:
        UsageError: A file exists, or cannot be written.
    """
    if parsed.top < 1:
        raise UsageError(f"--top: got {parsed.top}, expected at least 1")
    from extractor.search.sheet import check_new_file, check_sheet

    if parsed.sheet:
        check_sheet(parsed.sheet, overwrite=parsed.overwrite)
    if parsed.csv:
        check_new_file(parsed.csv, "csv", overwrite=parsed.overwrite)
    if parsed.root and not os.path.isdir(parsed.root):
        raise UsageError(f"root: there is no folder {parsed.root}")


def duplicates(arguments: Sequence[str]) -> int:
    """List the duplicates of a store; return the exit code."""
    parsed = duplicates_parser().parse_args(arguments)
    check_output(parsed)
    from extractor.analysis.duplicates import find_duplicates

    bar = Bar(quiet=False, status="reading rows ...", unit="row")
    with bar, logging_to(bar.warn):
        found = find_duplicates(
            parsed.store,
            threshold=parsed.threshold,
            against=parsed.against,
            progress=bar.follow(PHASES),
        )
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


def _page(found: Duplicates, parsed: argparse.Namespace) -> list[str]:
    recall = ""
    if found.method != "exact":
        recall = ", recall not measured: no sampled row has a near one"
        if found.recall is not None:
            recall = f", recall {found.recall:.3f} of {plural(found.recall_pairs, 'sampled pair')}"
    against = f" against {parsed.against}, {plural(len(found.other), 'row')}" if found.other else ""
    lines = [
        f"{parsed.store}: {plural(len(found.store), 'row')}{against}, threshold "
        f"{found.threshold:g}, {found.method}{recall}"
    ]
    if found.left_out:
        lines.append(f"{plural(found.left_out, 'row')} without a direction: zeros, NaN or infinity")
    for number, group in enumerate(found[: parsed.top], 1):
        more = f", {plural(group.omitted, 'image')} more" if group.omitted else ""
        lines += ["", f"group {number}, {group.kind}, {plural(len(group.images), 'image')}{more}"]
        role = "keep" if found.other is None else "image"
        lines += [_line(image, at, role) for at, image in enumerate(group.images)]
    if len(found) > parsed.top:
        lines += ["", f"{plural(len(found) - parsed.top, 'more group')}; try --csv FILE or --json"]
    lines.append("")
    if found.other is None:
        redundant = plural(found.redundant, "image")
        lines.append(f"{plural(len(found), 'group')}, {redundant} beside those to keep")
    else:
        lines.append(f"{plural(found.redundant, 'image')} of {parsed.store} in {parsed.against}")
    return lines


def _line(image: DuplicateImage, at: int, role: str) -> str:
    text = "same" if image.same_file else _similarity(image)
    size = f"{image.width}x{image.height}"
    return f"  {'' if at else role:5} {text if at else '':>6}  {size:>9}  {one_line(image.path)}"


def _similarity(image: DuplicateImage) -> str:
    return "-" if image.similarity is None else f"{image.similarity:.4f}"


_HEAD = (
    "group",
    "kind",
    "keep",
    "store",
    "row",
    "id",
    "similarity",
    "same_file",
    "width",
    "height",
    "size",
    "path",
)


def _records(found: Duplicates) -> Iterable[Sequence[Any]]:
    for number, group in enumerate(found, 1):
        for at, image in enumerate(group.images):
            other = found.other if image.in_other else None
            yield (
                number,
                group.kind,
                int(at == 0),
                (other or found.store).path,
                image.row,
                image.id,
                image.similarity,
                int(image.same_file),
                image.width,
                image.height,
                image.size,
                image.path,
            )


def write_csv(path: str, head: Sequence[str], records: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file, which appears whole or not at all.

    Raises:
        UsageError: It cannot be written.
    """
    from extractor.search.sheet import write_new_file

    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(records)
    content = table.getvalue().encode("utf-8", "surrogateescape")
    write_new_file(path, "csv", content)


def image_finder(store: FeatureStore, root: str | None) -> Callable[[int, str], str]:
    """Return what gives the file of a row and its path."""

    def find(row: int, path: str) -> str:
        return os.path.join(root, path) if root else store.full_path(row)

    return find


def warn_if_among_images(file: str, folders: Iterable[str]) -> None:
    """Warn of a picture that a run over a folder of images would take for one of them."""
    from extractor.search.sheet import lies_in

    if any(lies_in(file, folder) for folder in folders):
        warn(
            f"{file} lies in the folder of the images, so a run over that folder takes it for an "
            "image; better write it beside the folder"
        )


def draw_tiles(
    file: str, rows: Sequence[Sequence[tuple[str, str]]], folders: Iterable[str]
) -> None:
    """Draw images with labels; say how many cannot be found.

    Args:
        file: File of the sheet.
        rows: A file and a label for each tile.
        folders: Folders of the images.

    Raises:
        UsageError: The file cannot be written.
    """
    from extractor.search.sheet import Tile, write_sheet

    write_sheet(file, [[Tile(image, label) for image, label in row] for row in rows])
    say(f"contact sheet: {file}")
    warn_if_among_images(file, folders)
    missing = {image for row in rows for image, _ in row if not os.path.isfile(image)}
    if missing:
        warn(f"{plural(len(missing), 'image')} not found; name their folder with --root")


def _draw(found: Duplicates, parsed: argparse.Namespace) -> None:
    finders = [image_finder(found.store, parsed.root)]
    if found.other is not None:
        finders.append(image_finder(found.other, None))

    def tiles(group: DuplicateGroup, number: int) -> list[tuple[str, str]]:
        row = []
        for at, image in enumerate(group.images[:SHEET_IMAGES]):
            text = "same file" if image.same_file else _similarity(image)
            text = text if at else f"{number}: {plural(len(group.images), 'image')}"
            label = f"{text}  {image.width}x{image.height}\n{image.path}"
            row.append((finders[image.in_other](image.row, image.path), label))
        return row

    groups = found[: min(parsed.top, SHEET_ROWS)]
    if not groups:
        say("no duplicates, so no contact sheet")
        return
    folders = [parsed.root or found.store.root]
    folders += [] if found.other is None else [found.other.root]
    rows = [tiles(group, number) for number, group in enumerate(groups, 1)]
    draw_tiles(parsed.sheet, rows, folders)
