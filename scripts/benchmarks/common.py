"""Helpers that the benchmarks share: arguments, images, turns, statistics, JSON.

Imports no torch: a process that measures memory or imports starts from a small parent.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from extractor.system.cpu import available_cores

COPY = "copy-{:05d}"  # name of one copy of the folder of images
FIRST_COPY = COPY.format(0)
VERSIONS = ("torch", "torchvision", "timm", "pillow", "img2vec_pytorch", "transformers")


def argument_parser(description: str | None, *, repeats: int | None = 3) -> argparse.ArgumentParser:
    """Return a parser with ``--repeats``, unless that is None, and ``--json``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if repeats is not None:
        parser.add_argument(
            "--repeats",
            type=positive,
            default=repeats,
            help="number of turns (default: %(default)s)",
        )
    parser.add_argument(
        "--json", metavar="FILE", help="write all figures as JSON; - prints them and nothing else"
    )
    return parser


def positive(text: str) -> int:
    """Return a positive integer from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def report(figures: Mapping[str, Any], lines: Sequence[str], json_file: str | None) -> None:
    """Print the lines of a benchmark, and write its figures where ``--json`` asks for them.

    The figures get ``machine`` and ``versions``.
    """
    if json_file != "-":
        print("\n".join(lines))
    if json_file:
        text = json.dumps({"machine": machine(), "versions": versions(), **figures}, indent=2)
        if json_file == "-":
            print(text)
        else:
            Path(json_file).write_text(f"{text}\n", "utf-8")


def machine() -> dict[str, Any]:
    """Return the name of the processor and the number of cores that this process may use."""
    return {"cpu": cpu_name(), "cores": available_cores()}


def cpu_name() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed libraries."""
    found = {"Python": platform.python_version()}
    for library in VERSIONS:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[library] = importlib.metadata.version(library)
    return found


def progress(message: str) -> None:
    """Print a line of progress to stderr."""
    print(message, file=sys.stderr, flush=True)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the least and the largest value."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def format_rates(values: Sequence[float]) -> str:
    """Return rates as text: ``12.3 images/s (11.0 to 13.1)``."""
    return f"{statistics.median(values):,.1f} images/s ({min(values):,.1f} to {max(values):,.1f})"


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median of the ratios of each turn."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def in_turns(sides: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Measure every side once per turn, so that a busy machine slows all of them alike."""
    figures: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, measure in sides.items():
            figures[name].append(measure())
    return figures


def seconds(work: Callable[[], object]) -> float:
    """Return the seconds that a function takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@contextmanager
def copies_of(folder: Path, copies: int) -> Iterator[Path]:
    """Yield a folder that holds ``copies`` links to a folder of images."""
    if copies == 1:
        yield folder
        return
    with tempfile.TemporaryDirectory() as repeated:
        for index in range(copies):
            os.symlink(os.path.abspath(folder), Path(repeated) / COPY.format(index))
        yield Path(repeated)


def read_once(folder: Path) -> None:
    """Read all files into the page cache, so that the first side does not wait for the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file, open(os.devnull, "wb") as sink:
                shutil.copyfileobj(file, sink)
