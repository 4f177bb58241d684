"""``extract compare``: which model, layer or variant tells the classes of images apart best."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from extractor.cli.evaluate import PHASES, add_measure_options, percent
from extractor.errors import UsageError
from extractor.terminal.console import Bar, logging_to, one_line, print_lines
from extractor.terminal.parser import Command, Parser, parse
from extractor.text import plural

if TYPE_CHECKING:
    from extractor.evaluation.comparing import ComparedStore, Comparison, Difference

__all__ = ["compare", "compare_parser"]

MANIFEST = "store.json"
SHOWN = ("accuracy", "MAP@R", "R-precision", "linear probe")


def compare_parser() -> argparse.ArgumentParser:
    """Return the parser of ``extract compare``; the words that it leaves are those of a run."""
    parser = Parser(
        prog="extract compare",
        usage="extract compare STORE STORE... [options]\n"
        "       extract compare -m NAME -m NAME... INPUT... [options] [options of extract]",
        description="Compare embeddings of the same images, best first. With images, it extracts "
        "them first, as extract does, and each image is read once.",
        allow_abbrev=False,
    )
    add_measure_options(parser)
    parser.add_argument(
        "--speed",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="load each network, count its parameters and measure its speed (default: only with "
        "images)",
    )
    return parser


def compare(arguments: Sequence[str]) -> int:
    """Compare stores, or models that embed images first; return the exit code."""
    parser = compare_parser()
    parsed, words = parser.parse_known_args(arguments)
    command = parse(words, verb=parser)
    inputs = list(command.own.inputs)
    are_stores = [os.path.isfile(os.path.join(path, MANIFEST)) for path in inputs]
    exit_code, device, speed = 0, command.options.device, parsed.speed
    if inputs and all(are_stores):
        if other := [word for word in words if word not in inputs]:
            raise UsageError(f"compare: {other[0]} is an option of a run, and stores need none")
        stores = inputs
    elif any(are_stores):
        raise UsageError(
            f"compare: got stores and others ({inputs[are_stores.index(False)]}), expected stores "
            "or images"
        )
    else:
        stores, exit_code = _extracted(command, quiet=parsed.json)
        speed = True if speed is None else speed
    from extractor.evaluation.comparing import compare_stores

    bar = Bar(quiet=command.own.quiet, status="reading rows ...", unit="query")
    with bar, logging_to(bar.warn):
        comparison = compare_stores(
            stores,
            parsed.labels,
            k=parsed.k,
            metric=parsed.metric,
            probe=parsed.probe,
            speed=bool(speed),
            device=device,
            progress=bar.follow(PHASES),
        )
    if parsed.json:
        print_lines([json.dumps(comparison.to_mapping(), indent=1)])
    else:
        print_lines(_page(comparison))
    return exit_code


def _extracted(command: Command, *, quiet: bool) -> tuple[list[str], int]:
    """Embed images; return the folders of the stores and the exit code of the run."""
    from extractor.cli.extract import run
    from extractor.terminal.json_log import Events
    from extractor.terminal.signals import Stopping

    layers = command.options.layers
    may_be_several = len(layers) > 1 or any(set(layer) & set("*?[") for layer in layers)  # globs
    if len(command.own.model) < 2 and not may_be_several:
        raise UsageError(
            "compare: got one model, expected several -m or --layer, or the folders of stores"
        )
    own = replace(command.own, quiet=command.own.quiet or quiet)
    report = run(replace(command, own=own), Stopping(), Events())
    if not own.quiet:
        print_lines([""])
    return [os.fspath(store.out) for store in report.stores], report.exit_code


def _page(comparison: Comparison) -> list[str]:
    names = [one_line(each.name) for each in comparison.stores]
    width = max(5, *map(len, names))
    best = comparison.stores[0]
    first = best.evaluation
    measures = [name for name in first.scores if name.startswith(SHOWN)]
    classes = plural(len(first.classes), "class", "classes")
    images = plural(comparison.images, "image")
    lines = [f"{images}, {classes}, {first.metric}, best {comparison.measure} first"]
    if left_out := sum(each.left_out for each in comparison.stores):
        lines.append(f"left out {plural(left_out, 'row')} whose images are not in all stores")
    head = "".join(f"  {name:>12}" for name in measures)
    columns = ("images/s", "dim", "bytes/image", "parameters")
    lines += ["", f"{'store':{width}}{head}" + "".join(f"  {name:>11}" for name in columns)]
    for name, each in zip(names, comparison.stores, strict=True):
        scores = "".join(f"  {percent(each.evaluation.scores[m].value):>12}" for m in measures)
        lines.append(f"{name:{width}}{scores}{_costs(each)}")
    wide = max(width, len("difference to the best"))
    lines += ["", f"{'difference to the best':{wide}}" + "".join(f"  {m:>22}" for m in measures)]
    for name, each in zip(names[1:], comparison.stores[1:], strict=True):
        cells = [_cell(comparison.differences, best, each, measure) for measure in measures]
        lines.append(f"{name:{wide}}" + "".join(f"  {cell:>22}" for cell in cells))
    lines.append("* the difference is real: its interval excludes 0")
    return [*lines, "", *_similarities(comparison, names, wide)]


def _similarities(comparison: Comparison, names: Sequence[str], width: int) -> list[str]:
    widths = [max(4, len(name)) for name in names]
    heads = zip(names, widths, strict=True)
    lines = [f"{'linear CKA':{width}}" + "".join(f"  {name:>{wide}}" for name, wide in heads)]
    for name, row in zip(names, comparison.cka.tolist(), strict=True):
        cells = zip(row, widths, strict=True)
        lines.append(f"{name:{width}}" + "".join(f"  {value:>{wide}.2f}" for value, wide in cells))
    return lines


def _costs(each: ComparedStore) -> str:
    speed = "-" if each.images_per_second is None else f"{each.images_per_second:,.1f}"
    parameters = "-" if each.parameters is None else f"{each.parameters / 1e6:,.1f} M"
    cells = (speed, f"{each.dim:,}", f"{each.bytes_per_image:,}", parameters)
    return "".join(f"  {cell:>11}" for cell in cells)


def _cell(
    differences: Sequence[Difference], best: ComparedStore, other: ComparedStore, measure: str
) -> str:
    """Return how far another store is from the best one, with the interval."""
    (found,) = (
        each
        for each in differences
        if each.measure == measure and {each.better, each.worse} == {best.name, other.name}
    )
    value, low, high = found.value, found.low, found.high
    if found.better == best.name:
        value, low, high = -value, -high, -low
    mark = "*" if found.is_real else " "
    return f"{_signed(value)} ({_signed(low)} to {_signed(high)}){mark}"


def _signed(value: float) -> str:
    """Return a difference in percent; one that rounds to zero has no minus."""
    return f"{round(100 * value, 1) + 0.0:+.1f}"
