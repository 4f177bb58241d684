"""``extract evaluate``: how well a store tells classes apart."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from extractor.terminal.console import Bar, logging_to, one_line, print_lines
from extractor.terminal.parser import Parser
from extractor.text import plural

if TYPE_CHECKING:
    from extractor.evaluation.evaluating import Evaluation

__all__ = ["PHASES", "add_measure_options", "evaluate", "evaluate_parser", "numbers", "percent"]

METRICS = ("cosine", "ip", "l2")
PHASES = {
    "measuring": "measuring the speed of the networks ...",
    "training": "training the linear classifier ...",
    "resampling": "resampling the differences ...",
}
LABELS_HELP = (
    "CSV file with the columns path and label, or FILE.py:FUNCTION, which gets a path (default: "
    "folders, the name of the folder that holds the image)"
)


def numbers(text: str) -> list[int]:
    """Return numbers that are separated by commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected numbers separated by commas"
        ) from error


def add_measure_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that ``evaluate`` and ``compare`` have in common."""
    parser.add_argument("--labels", metavar="FILE", help=LABELS_HELP)
    parser.add_argument(
        "-k",
        type=numbers,
        metavar="K,...",
        help="numbers of neighbors (default: 1,5,20)",
    )
    parser.add_argument(
        "--metric",
        choices=METRICS,
        default="cosine",
        help="how rows are compared (default: %(default)s)",
    )
    parser.add_argument(
        "--probe", action="store_true", help="also train a linear classifier (scikit-learn)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def evaluate_parser() -> argparse.ArgumentParser:
    """Return the parser of ``extract evaluate``."""
    parser = Parser(
        prog="extract evaluate",
        description="Measure how well the nearest rows tell the class of an image. Each row is a "
        "query whose own row is left out, unless --queries names others.",
    )
    parser.add_argument("store", metavar="STORE", help="folder of the store")
    add_measure_options(parser)
    parser.add_argument(
        "--queries", metavar="STORE", help="another store of the same backbone, with the queries"
    )
    parser.add_argument("--query-labels", metavar="FILE", help="labels of the queries")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the intervals and of the linear probe (default: %(default)s)",
    )
    return parser


def evaluate(arguments: Sequence[str]) -> int:
    """Evaluate a store; return the exit code."""
    parsed = evaluate_parser().parse_args(arguments)
    from extractor.evaluation.evaluating import evaluate_store

    bar = Bar(quiet=False, status="reading rows ...", unit="query")
    with bar, logging_to(bar.warn):
        evaluation = evaluate_store(
            parsed.store,
            parsed.labels,
            k=parsed.k,
            metric=parsed.metric,
            queries=parsed.queries,
            query_labels=parsed.query_labels,
            probe=parsed.probe,
            seed=parsed.seed,
            progress=bar.follow(PHASES),
        )
    if parsed.json:
        print_lines([json.dumps(evaluation.to_mapping(), indent=1)])
    else:
        print_lines(_page(evaluation))
    return 0


def _page(evaluation: Evaluation) -> list[str]:
    counts = f"{plural(evaluation.rows, 'row')}, {plural(evaluation.queries, 'query', 'queries')}"
    classes = plural(len(evaluation.classes), "class", "classes")
    lines = [f"{evaluation.store}: {evaluation.model}, {counts}, {classes}, {evaluation.metric}"]
    if evaluation.unmatched:
        unmatched = plural(evaluation.unmatched, "query", "queries")
        lines.append(f"no other row has the class of {unmatched}; they count for accuracy only")
    lines += ["", f"{'measure':14} {'all':>6}  95 % interval"]
    lines += [
        f"{name:14} {percent(score.value):>6}  {percent(score.low)} to {percent(score.high)}"
        for name, score in evaluation.scores.items()
    ]
    shown = [name for name in evaluation.scores if not name.startswith("recall")]
    width = max(5, *(len(one_line(name)) for name in evaluation.classes))
    head = "".join(f"  {name:>12}" for name in shown)
    lines += ["", f"{'class':{width}} {'queries':>8}{head}"]
    for name, each in evaluation.classes.items():
        cells = "".join(f"  {percent(each.scores[measure]):>12}" for measure in shown)
        lines.append(f"{one_line(name):{width}} {each.queries:>8,}{cells}")
    return lines


def percent(value: float) -> str:
    """Return a fraction in percent, or a dash for NaN."""
    return "-" if math.isnan(value) else f"{100 * value:.1f}"
