"""``extract search`` and ``extract index``: rows of a store that are nearest to images."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from extractor.cli.duplicates import draw_tiles, image_finder
from extractor.errors import DecodeError, SourceError, UsageError
from extractor.options import Options
from extractor.terminal.console import Bar, logging_to, one_line, print_lines, say, warn
from extractor.terminal.parser import Parser
from extractor.text import plural

if TYPE_CHECKING:
    from extractor.api import Extractor
    from extractor.reading.reader import FeatureStore
    from extractor.search.hits import Hits
    from extractor.search.queries import Query

__all__ = ["index", "index_parser", "search", "search_parser"]

SOME_FAILED = 3
PHASES = {"training": "training the index ...", "measuring": "measuring the recall ..."}

DESCRIPTION = """\
Show the rows of a store that are nearest to images. A query that is in the store needs no model.
Any other image goes through the model, the weights and the pixels of the store.

  extract search features/resnet50 photo.jpg              an image file
  extract search features/resnet50 cats/tom.jpg row:17    a path in the store, and a row
  extract search features/resnet50 beach.jpg --minus people.jpg --sheet hits.png
"""


def search_parser() -> argparse.ArgumentParser:
    """Return the parser of ``extract search``."""
    parser = Parser(
        prog="extract search",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("store", metavar="STORE", help="folder of the store")
    parser.add_argument(
        "queries",
        metavar="QUERY",
        nargs="*",
        help="an image, a folder of images, a path in the store, or row:NUMBER",
    )
    parser.add_argument(
        "-k", type=int, metavar="N", help="number of rows per query (default: 10, or all)"
    )
    parser.add_argument(
        "--metric",
        choices=("cosine", "ip", "l2"),
        default="cosine",
        help="cosine similarity, inner product or Euclidean distance (default: %(default)s)",
    )
    for name, verb in (("--plus", "added to"), ("--minus", "subtracted from")):
        parser.add_argument(
            name,
            action="append",
            default=[],
            metavar="IMAGE",
            help=f"image whose direction is {verb} that of each query; may be repeated",
        )
    parser.add_argument(
        "--exact", action="store_true", help="search all rows even if there is an index"
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--csv", action="store_true", help="print CSV")
    parser.add_argument(
        "--sheet", metavar="FILE", help="draw queries and hits as thumbnails into a PNG or JPEG"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --sheet")
    parser.add_argument("--root", metavar="FOLDER", help="where the images are now, for --sheet")
    parser.add_argument("--weights", metavar="FILE", help="the store's weights, if they moved")
    parser.add_argument(
        "--device",
        default=Options().device,
        help="device for images without a row (default: %(default)s)",
    )
    return parser


def search(arguments: Sequence[str]) -> int:
    """Print the nearest rows of each query; return the exit code."""
    parsed = search_parser().parse_args(arguments)
    if not parsed.queries and not parsed.plus:
        raise UsageError("expected at least one QUERY; try extract search --help")
    from extractor.reading.reader import FeatureStore
    from extractor.search.queries import Names
    from extractor.search.searcher import Searcher

    if parsed.sheet:
        from extractor.search.sheet import check_sheet

        check_sheet(parsed.sheet, overwrite=parsed.overwrite)
        if parsed.root and not os.path.isdir(parsed.root):
            raise UsageError(f"root: there is no folder {parsed.root}")
    store = FeatureStore.open(parsed.store)
    with logging_to(warn):
        names = Names(store)
        queries = [query for word in parsed.queries for query in names.queries_of_word(word)]
        plus, minus = (
            [names.query_of_word(word) for word in words] for words in (parsed.plus, parsed.minus)
        )
        Searcher(store).check(parsed.k, parsed.metric, has_terms=bool(plus or minus))
        searcher = Searcher(store, extractor=_extractor(store, [*queries, *plus, *minus], parsed))
        vectors, errors = searcher.embed(queries)
        _check_errors(queries, errors)
        kept = [number for number in range(len(queries)) if number not in errors]
        queries = [queries[number] for number in kept]
        own = [query.row for query in queries]
        hits = searcher.find(
            vectors[kept],
            parsed.k,
            parsed.metric,
            own,
            plus=plus,
            minus=minus,
            exact=parsed.exact,
        )
    _print(store, queries, hits, parsed)
    if parsed.sheet:
        _draw(store, queries or plus, hits, parsed)
    method = "exact search" if hits.method == "exact" else hits.method
    say(f"{parsed.store}: {method}, {plural(len(store), 'row')}")
    return SOME_FAILED if errors else 0


def index_parser() -> argparse.ArgumentParser:
    """Return the parser of ``extract index``."""
    parser = Parser(
        prog="extract index",
        description="Build an index for fast approximate search, or bring it up to date. It lies "
        "in STORE/derived, or in the user's cache if the store is read-only. Needs faiss: "
        "pip install 'backbone-extractor[search]'.",
    )
    parser.add_argument("store", metavar="STORE", help="folder of the store")
    parser.add_argument(
        "--kind",
        choices=("flat", "hnsw", "ivf"),
        help="kind of index (default: that of the present one, or else hnsw below a million rows "
        "and ivf from there on)",
    )
    parser.add_argument(
        "--metric",
        choices=("cosine", "ip", "l2"),
        default="cosine",
        help="metric to search by (default: %(default)s)",
    )
    return parser


def index(arguments: Sequence[str]) -> int:
    """Build the index of a store, or bring it up to date; return the exit code."""
    parsed = index_parser().parse_args(arguments)
    from extractor.reading.reader import FeatureStore
    from extractor.search.searcher import Searcher

    store = FeatureStore.open(parsed.store)
    bar = Bar(quiet=False, status="reading the index ...", unit="row")
    with bar, logging_to(bar.warn):
        built = Searcher(store).build_index(
            parsed.kind, metric=parsed.metric, progress=bar.follow(PHASES)
        )
    entry = built.entry
    done = f"{plural(built.added, 'row')} {'indexed' if built.was_built else 'added'}"
    lines = [
        f"{parsed.store}: {done if built.added else 'already up to date'}",
        f"index   {entry.path}",
        f"kind    {entry.kind}, {parsed.metric}, {plural(entry.file.bytes, 'byte')}",
        f"recall  {entry.recall:.3f} of the 10 nearest rows, for {plural(entry.sample, 'row')}",
    ]
    print_lines(lines)
    return 0


def _extractor(
    store: FeatureStore, queries: Sequence[Query], parsed: argparse.Namespace
) -> Extractor | None:
    """Return what embeds images, if a query needs it."""
    if all(query.row >= 0 for query in queries):
        return None
    from extractor.api import Extractor

    return Extractor.for_store(store, device=parsed.device, weights=parsed.weights)


def _check_errors(queries: Sequence[Query], errors: Mapping[int, DecodeError]) -> None:
    """Warn of images in folders that cannot be decoded.

    Raises:
        SourceError: A query that was named cannot be decoded, or none of a folder can.
    """
    for number, error in errors.items():
        what = str(error).partition("): ")[2]  # after "image 0 (PATH): "
        message = f"{queries[number].name}: {error.reason}: {what}"
        if not queries[number].from_folder:
            raise SourceError(message)
        warn(message)
    if queries and len(errors) == len(queries):
        raise SourceError("none of the queries can be decoded")


def _print(
    store: FeatureStore, queries: Sequence[Query], hits: Hits, parsed: argparse.Namespace
) -> None:
    if parsed.json:
        content = {
            "store": str(store.path),
            "token": store.token,
            "metric": parsed.metric,
            "method": hits.method,
            "plus": parsed.plus,
            "minus": parsed.minus,
            "queries": [
                {
                    "query": query.name,
                    "row": query.row if query.row >= 0 else None,
                    "hits": [hit._asdict() for hit in found],
                }
                for query, found in zip(_named(queries), hits, strict=True)
            ],
        }
        print_lines([json.dumps(content, indent=2)])
        return
    lines: list[str] = []
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["query", "rank", "row", "id", "score", "path"])
    for query, found in zip(_named(queries), hits, strict=True):
        lines.append(one_line(query.name))
        for rank, hit in enumerate(found, 1):
            lines.append(f"{rank:4}  {hit.score:.4f}  {one_line(hit.path)}")
            writer.writerow([query.name, rank, *hit])
    print_lines([table.getvalue().rstrip("\n")] if parsed.csv else lines)


def _named(queries: Sequence[Query]) -> Sequence[Query]:
    """Return the queries; one for the sum of ``--plus`` and ``--minus`` if there is none."""
    from extractor.search.queries import Query

    return queries or [Query("plus and minus")]


def _draw(
    store: FeatureStore, queries: Sequence[Query], hits: Hits, parsed: argparse.Namespace
) -> None:
    find = image_finder(store, parsed.root)
    rows = []
    for query, found in zip(queries[: len(hits)], hits, strict=True):
        image = find(query.row, query.name) if query.row >= 0 else query.image
        tiles = [(image, f"query\n{query.name}")]
        tiles += [(find(hit.row, hit.path), f"{hit.score:.3f}\n{hit.path}") for hit in found]
        rows.append(tiles)
    draw_tiles(parsed.sheet, rows, [parsed.root or store.root])
