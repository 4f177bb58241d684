"""Measure what writing costs: the rate of a run, and of one that drops its rows, in turns.

    python scripts/benchmarks/writing.py images/ --model mobilenetv3_small_100

The share of seconds that a run counts as writing is larger than that: most of them pass while the
decoding threads use the cores for their own work. Each run is a process of its own.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import statistics
import tempfile
from typing import TYPE_CHECKING, NamedTuple
from unittest import mock

from common import argument_parser, report, spread

from extractor.errors import ExtractorError
from extractor.system.process_tuning import freeze_imports, keep_freed_memory, spin_briefly
from extractor.text import plural

if TYPE_CHECKING:
    from collections.abc import Sequence

    from extractor.images.types import Failure, ImageInfo
    from extractor.run.output import StoreOutput


class Run(NamedTuple):
    """Images/s of a run, and the share of its busy seconds that count as writing."""

    rate: float
    share: float


def main() -> None:
    """Print both rates, and what writing costs."""
    parser = argument_parser(__doc__, repeats=9)
    parser.add_argument("images", help="a folder of images")
    parser.add_argument("--model", default="mobilenetv3_small_100")
    parser.add_argument("--weights", default="random")
    args = parser.parse_args()
    processes = multiprocessing.get_context("spawn")
    runs: dict[bool, list[Run]] = {True: [], False: []}
    for _ in range(args.repeats):
        for is_written in (False, True):
            with processes.Pool(1) as pool:
                try:
                    task = (args.images, args.model, args.weights, is_written)
                    runs[is_written].append(pool.apply(run, task))
                except ExtractorError as error:
                    parser.error(str(error))
    written, dropped = ([run.rate for run in runs[key]] for key in (True, False))
    cost = statistics.median(1 - w / d for w, d in zip(written, dropped, strict=True))
    share = statistics.median(run.share for run in runs[True])
    lines = [
        f"{args.model}, {plural(args.repeats, 'turn')}, medians",
        f"{statistics.median(written):.1f} images/s; "
        f"{statistics.median(dropped):.1f} without writing rows",
        f"writing costs {cost:.1%}; it counts as {share:.1%} of the seconds",
    ]
    figures = {
        "model": args.model,
        "repeats": args.repeats,
        "rates": {"written": spread(written), "dropped": spread(dropped)},
        "cost": cost,
        "share_of_seconds": share,
    }
    report(figures, lines, args.json)


def run(images: str, model: str, weights: str, is_written: bool) -> Run:
    """Run once, in this process."""
    spin_briefly()
    keep_freed_memory()
    logging.disable(logging.WARNING)  # about random weights, in every run
    with freeze_imports():
        from extractor.api import extract
        from extractor.run.output import StoreOutput
        from extractor.store.shard import ShardWriter
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        if not is_written:
            stack.enter_context(mock.patch.object(StoreOutput, "append", _drop))
            stack.enter_context(mock.patch.object(ShardWriter, "finish"))
        result = extract(images, model, folder, weights=weights)
    assert result.spent is not None
    spent = result.spent.seconds
    busy = sum(spent[kind] for kind in ("transfer", "model", "write", "idle"))
    return Run(result.images_per_second, spent["write"] / busy)


def _drop(
    output: StoreOutput, start: int, rows: object, outcomes: Sequence[ImageInfo | Failure]
) -> None:
    output.rows += len(outcomes)
    output.done = start + len(outcomes)


if __name__ == "__main__":
    main()
