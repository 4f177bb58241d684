"""Measure how long one image takes an Extractor that serves 1, 2 and 8 callers.

    python scripts/benchmarks/serving.py images/ --model resnet50 --weights random
    python scripts/benchmarks/serving.py images/ --against ../an-earlier-clone

Each caller hands in one encoded image at a time, as a web server does. Decoding alone and the
model alone are measured in the same process; what is left of a lone call is the overhead.
--against measures the code of another folder beside this one, in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import argument_parser, progress, report, spread

WARM_UP = 5


def main() -> None:
    """Print a line for each side and number of callers."""
    parser = argument_parser(__doc__, repeats=5)
    parser.add_argument("images", help="a folder of images")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--weights", default="random")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="threads of the model, by default torch's own")
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--requests", type=int, default=100, help="images of each measurement")
    parser.add_argument("--window", type=float, default=5, help="milliseconds to gather calls")
    parser.add_argument("--against", type=Path, help="folder of another version of the code")
    parser.add_argument("--side", choices=["alone", "gathering"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args)))
        return
    here = Path(__file__).parents[2]
    sides = {"now": (here, "alone"), "now, gathering": (here, "gathering")}
    if args.against:
        sides = {"before": (args.against, "alone"), **sides}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for turn in range(args.repeats):
        progress(f"turn {turn + 1} of {args.repeats}")
        for name, (tree, side) in sides.items():
            turns[name].append(in_process(tree, side))
    figures = {name: summary(values) for name, values in turns.items()}
    lines = [line for name, values in figures.items() for line in describe(name, values)]
    report({"sides": figures}, lines, args.json)


def in_process(tree: Path, side: str) -> dict[str, Any]:
    """Measure one side in a process of its own, with the code of a folder."""
    environment = {**os.environ, "PYTHONPATH": os.fspath(tree.absolute())}
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    measured: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return measured


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of every call, and those of decoding and of the model alone."""
    import numpy as np
    import torch

    from extractor import Extractor
    from extractor.images.decode import decode_into
    from extractor.images.types import EncodedImage

    options: dict[str, Any] = {"batch_window_ms": args.window} if args.side == "gathering" else {}
    if args.threads:
        torch.set_num_threads(args.threads)
    extractor = Extractor(
        args.model, weights=args.weights, device=args.device, precision="float32", **options
    )
    files = sorted(path for path in Path(args.images).rglob("*") if path.is_file())
    encoded = [path.read_bytes() for path in files[: args.requests]]
    (backbone,) = extractor.backbones
    out = np.empty((*backbone.preprocess.input_size, 3), np.uint8)
    pixels = torch.zeros(1, 3, *backbone.preprocess.input_size)

    def decode(content: bytes) -> None:
        decode_into(EncodedImage(content), [backbone.preprocess], [out])

    def compute(_: bytes) -> None:
        backbone.embed(pixels)[0].cpu()

    def call(content: bytes) -> None:
        extractor([content])

    for content in encoded[:WARM_UP]:
        call(content)
    # One after the other for each image, so that a busy machine slows all three alike.
    lone = [[seconds_of(work, content) for work in (decode, compute, call)] for content in encoded]
    return {
        "decode": [row[0] for row in lone],
        "model": [row[1] for row in lone],
        "overhead": [row[2] - row[1] - row[0] for row in lone],
        "callers": {str(count): serve(call, encoded, count) for count in args.callers},
    }


def seconds_of(work: Callable[[bytes], None], content: bytes) -> float:
    """Return the seconds that a function takes for one image."""
    started = time.perf_counter()
    work(content)
    return time.perf_counter() - started


def serve(
    call: Callable[[bytes], None], encoded: Sequence[bytes], count: int
) -> dict[str, list[float] | float]:
    """Let several callers share the images; return the seconds of each call, and of all."""
    latencies: list[float] = []
    waiting = iter(encoded)
    lock = threading.Lock()

    def caller() -> None:
        while True:
            with lock:
                content = next(waiting, None)
            if content is None:
                return
            latencies.append(seconds_of(call, content))

    threads = [threading.Thread(target=caller) for _ in range(count)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"latencies": latencies, "seconds": time.perf_counter() - started}


def summary(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return medians over all turns, in milliseconds and images per second."""

    def pooled(name: str) -> float:
        return statistics.median(value for turn in turns for value in turn[name]) * 1000

    callers = {}
    for count in turns[0]["callers"]:
        measured = [turn["callers"][count] for turn in turns]
        latencies = sorted(value for each in measured for value in each["latencies"])
        rates = [len(each["latencies"]) / each["seconds"] for each in measured]
        callers[count] = {
            "median_ms": statistics.median(latencies) * 1000,
            "p95_ms": latencies[int(0.95 * (len(latencies) - 1))] * 1000,
            "images_per_second": spread(rates),
        }
    return {
        "decode_ms": pooled("decode"),
        "model_ms": pooled("model"),
        "overhead_ms": pooled("overhead"),
        "callers": callers,
    }


def describe(name: str, figures: dict[str, Any]) -> list[str]:
    """Return the figures of one side as lines."""
    lines = [
        f"{name}: decoding {figures['decode_ms']:.2f} ms, model {figures['model_ms']:.2f} ms, "
        f"overhead of a lone call {figures['overhead_ms']:.2f} ms"
    ]
    for count, values in figures["callers"].items():
        lines.append(
            f"  callers {count}: median {values['median_ms']:.1f} ms, p95 "
            f"{values['p95_ms']:.1f} ms, {values['images_per_second']['median']:.1f} images/s"
        )
    return lines


if __name__ == "__main__":
    main()
