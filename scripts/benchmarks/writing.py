"""What writing costs a run: its rate beside that of one that drops its rows, in turns.

    python scripts/benchmarks/writing.py images/ --model mobilenetv3_small_100

The seconds that a run counts as writing are more than that: most of them pass while the decoding
threads have the cores, which then do their own work. Each run is a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import platform
import statistics
import tempfile
from typing import TYPE_CHECKING, NamedTuple
from unittest import mock

from extractor.errors import ExtractorError
from extractor.system.process_tuning import freeze_imports, keep_freed_memory, spin_briefly

if TYPE_CHECKING:
    from collections.abc import Sequence

    from extractor.images.types import Failure, ImageInfo
    from extractor.run.output import StoreOutput


class Run(NamedTuple):
    """``rate`` in images a second; ``share`` of the seconds of computing that count as writing."""

    rate: float
    share: float


def run(images: str, model: str, weights: str, is_written: bool) -> Run:
    """One whole run, in this process."""
    spin_briefly()
    keep_freed_memory()
    logging.disable(logging.WARNING)  # of the random weights, every time
    with freeze_imports():
        from extractor.api import extract
        from extractor.run.output import StoreOutput
        from extractor.store.shard import ShardWriter
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        if not is_written:
            stack.enter_context(mock.patch.object(StoreOutput, "append", _drop))
            stack.enter_context(mock.patch.object(ShardWriter, "finish"))
        report = extract(images, model, folder, weights=weights)
    seconds = report.spent.seconds
    busy = sum(seconds[kind] for kind in ("transfer", "model", "write", "idle"))
    return Run(report.images_per_second, seconds["write"] / busy)


def _drop(
    filling: StoreOutput, start: int, rows: object, outcomes: Sequence[ImageInfo | Failure]
) -> None:
    filling.rows += len(outcomes)
    filling.done = start + len(outcomes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", help="a folder of images")
    parser.add_argument("--model", default="mobilenetv3_small_100")
    parser.add_argument("--weights", default="random")
    parser.add_argument("--repeats", type=int, default=9)
    parsed = parser.parse_args()
    if parsed.repeats < 1:
        parser.error(f"--repeats: got {parsed.repeats}, expected 1 or more")
    processes = multiprocessing.get_context("spawn")
    runs: dict[bool, list[Run]] = {True: [], False: []}
    for _ in range(parsed.repeats):
        for is_written in (False, True):
            with processes.Pool(1) as pool:
                task = (parsed.images, parsed.model, parsed.weights, is_written)
                try:
                    runs[is_written].append(pool.apply(run, task))
                except ExtractorError as error:
                    parser.error(str(error))
    costs = [1 - w.rate / d.rate for w, d in zip(runs[True], runs[False], strict=True)]
    rates = {key: statistics.median(one.rate for one in ones) for key, ones in runs.items()}
    share = statistics.median(one.share for one in runs[True])
    print(f"{parsed.model}, {platform.machine()}, {parsed.repeats} turns, medians")
    print(f"{rates[True]:.1f} images/s; {rates[False]:.1f} without writing rows")
    print(f"writing costs {statistics.median(costs):.1%}; it counts as {share:.1%} of the seconds")


if __name__ == "__main__":
    main()
