"""``extract transform``: the rows of a store normalized, projected and whitened."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from extractor.terminal.console import Bar, logging_to, print_lines
from extractor.terminal.parser import Parser
from extractor.text import plural

if TYPE_CHECKING:
    from extractor.upkeep.transforming import TransformReport

__all__ = ["transform", "transform_parser"]

PHASES = {"fitting": "fitting the PCA ...", "writing": "writing rows ..."}


def transform_parser() -> argparse.ArgumentParser:
    """Return the parser of ``extract transform``."""
    parser = Parser(
        prog="extract transform",
        description="Write a store whose rows are those of STORE: scaled to unit length, projected "
        "by PCA, whitened and scaled to unit length again, as the options say. Searching the "
        "result applies the same to queries. Run it again without options after STORE has grown.",
    )
    parser.add_argument("store", metavar="STORE", help="folder of the store to read")
    parser.add_argument(
        "-o", "--out", required=True, metavar="OUT", help="folder of the store to write"
    )
    parser.add_argument(
        "--normalize",
        action="store_true",
        help="scale rows to unit length, before the PCA and at the end",
    )
    parser.add_argument(
        "--pca", type=int, metavar="N", help="keep N dimensions, those of the largest variance"
    )
    parser.add_argument(
        "--whiten",
        action="store_true",
        help="scale the kept dimensions to variance 1 (without --pca: all dimensions)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        help="type of the written values (default: that of STORE)",
    )
    parser.add_argument(
        "--fit",
        metavar="OTHER_STORE",
        help="fit the PCA on another store of the same model (default: on STORE)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a store that is there, and fit anew"
    )
    parser.add_argument(
        "--no-lock",
        dest="lock",
        action="store_false",
        help="write to a file system without file locks",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def transform(arguments: Sequence[str]) -> int:
    """Transform a store; return the exit code."""
    parsed = transform_parser().parse_args(arguments)
    from extractor.report import Progress
    from extractor.upkeep.transforming import transform_store

    bar = Bar(quiet=False, status="opening the store ...", unit="row")

    def show(phase: str, done: int, total: int) -> None:
        if done:
            bar.update(Progress(done, total, 0))
        else:
            bar.show(PHASES[phase])

    with bar, logging_to(bar.warn):
        report = transform_store(
            parsed.store,
            parsed.out,
            normalize=parsed.normalize,
            pca=parsed.pca,
            whiten=parsed.whiten,
            dtype=parsed.dtype,
            fit=parsed.fit,
            overwrite=parsed.overwrite,
            lock=parsed.lock,
            progress=show,
        )
    if parsed.json:
        print_lines([json.dumps({**asdict(report), "out": str(report.out)})])
    else:
        print_lines([_sentence(report)])
    return 0


def _sentence(report: TransformReport) -> str:
    size = f"{' x '.join(map(str, report.shape))} {report.dtype}"
    if not report.is_changed:
        return f"{report.out}: nothing to do, up to date ({plural(report.rows, 'row')}, {size})"
    removed = f", {plural(report.removed, 'row')} removed" if report.removed else ""
    added = f"{plural(report.added, 'row')} transformed{removed}"
    return f"{report.out}: {added}, {plural(report.rows, 'row')} in all, {size}"
