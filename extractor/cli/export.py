"""``extract export``: a store in the format of another tool."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from extractor.errors import UnknownTokenError
from extractor.terminal.console import Bar, logging_to, print_lines
from extractor.terminal.parser import Parser
from extractor.text import plural

__all__ = ["export", "export_parser"]

FORMATS = ("npy", "parquet", "clip-retrieval", "faiss", "hdf5", "csv")


def export_parser() -> argparse.ArgumentParser:
    """Return the parser of ``extract export``."""
    parser = Parser(
        prog="extract export",
        description="Write the rows of a store in the format of another tool. The target appears "
        "complete or not at all.",
    )
    parser.add_argument("store", metavar="STORE", help="folder of the store")
    parser.add_argument("--to", required=True, metavar="PATH", help="file or folder to write")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="format (default: that of the file's ending, or a folder of parquet files)",
    )
    parser.add_argument(
        "--column",
        default="embedding",
        metavar="NAME",
        help="name of the column of the embeddings, such as vector (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        help="type of the written values (default: that of the store)",
    )
    parser.add_argument("--normalize", action="store_true", help="scale rows to unit length")
    parser.add_argument(
        "--since",
        metavar="TOKEN",
        help="write only what changed since an earlier state, which an export names",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an export that is there")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def export(arguments: Sequence[str]) -> int:
    """Export a store; return the exit code."""
    parsed = export_parser().parse_args(arguments)
    from extractor.export.exporting import export_store

    bar = Bar(quiet=False, status="opening the store ...", unit="row")
    try:
        with bar, logging_to(bar.warn):
            report = export_store(
                parsed.store,
                parsed.to,
                parsed.format,
                column=parsed.column,
                dtype=parsed.dtype,
                normalize=parsed.normalize,
                since=parsed.since,
                overwrite=parsed.overwrite,
                progress=bar.follow({}),
            )
    except UnknownTokenError as error:
        what = str(error).partition("; ")[0]
        raise UnknownTokenError(f"{what}; leave --since out to export everything") from error
    if parsed.json:
        print_lines([json.dumps({**asdict(report), "path": str(report.path)})])
        return 0
    removed = f", {plural(report.removed, 'id')} to remove" if parsed.since is not None else ""
    print_lines(
        [
            f"{parsed.to}: {plural(report.rows, 'row')} as {report.format}{removed}",
            f"next time: --since {report.token}",
        ]
    )
    return 0
