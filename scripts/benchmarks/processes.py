"""Measure what several processes gain, and what leases cost.

    python scripts/benchmarks/processes.py --small 200000 --photos /data/photos

Two questions, each answered by whole runs in turns:

- Images of 48 x 40 pixels and a network of one layer, which a machine embeds faster than one
  process can: images/s of one process and of several.
- Photos and real networks: the images/s of one worker process against those of a plain run. With
  ``--ray``, those of one worker of a Ray cluster that this program starts, too.

The rates leave out the start: listing, loading and the start of the workers.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import (
    argument_parser,
    copies_of,
    format_rates,
    in_turns,
    median_ratio,
    positive,
    progress,
    report,
    spread,
)

SMALL_SIZE = (48, 40)
DISTINCT = 500  # different small images; the others are links to them
BATCH = 256
NETWORKS = ("resnet50", "mobilenetv3_small_100")

ONE_LAYER = '''
import torch


def network(pretrained=False, **options):
    """Return a network of one layer, with a classifier."""
    layers = torch.nn.Sequential()
    layers.add_module("conv", torch.nn.Conv2d(3, 16, 16, 16))
    layers.add_module("pool", torch.nn.AdaptiveAvgPool2d(1))
    layers.add_module("flatten", torch.nn.Flatten())
    layers.add_module("fc", torch.nn.Linear(16, 10))
    layers.num_features = 16
    return layers
'''

# Runs in a process of its own, so that each run starts alike. Prints the rate.
RUN = """
import json, sys
from extractor.system.process_tuning import keep_freed_memory, spin_briefly
keep_freed_memory()  # as the command and every worker do
spin_briefly()
from extractor import extract
options = json.loads(sys.argv[1])
result = extract(options.pop("images"), options.pop("model"), options.pop("out"), **options)
print(json.dumps([result.images_per_second, result.rows, result.failed]))
"""


def rate(work: Path, options: Mapping[str, Any]) -> float:
    """Return the images/s of one run into a new store."""
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    arguments = json.dumps({**options, "out": str(out)})
    run = [sys.executable, "-c", RUN, arguments]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    rates, rows, failed = json.loads(done.stdout.splitlines()[-1])
    if failed or not rows:
        sys.exit(f"{failed} images failed")
    return float(rates)


def small_images(folder: Path, count: int) -> Path:
    """Write small JPEGs, most of them links."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    (folder / "distinct").mkdir(parents=True)
    for i in range(DISTINCT):
        pixels = rng.integers(0, 256, (5, 6, 3), np.uint8)
        picture = Image.fromarray(pixels).resize(SMALL_SIZE, Image.Resampling.BICUBIC)
        picture.save(folder / f"distinct/{i}.jpg", quality=90)
    for i in range(count):
        group = folder / f"images/{i // 1000:05d}"
        if i % 1000 == 0:
            group.mkdir(parents=True)
        os.link(folder / f"distinct/{i % DISTINCT}.jpg", group / f"{i % 1000:03d}.jpg")
    return folder / "images"


def measure_small(work: Path, count: int, processes: Sequence[int], repeats: int) -> dict[str, Any]:
    """Return the images/s of one process without workers, and of each number of processes."""
    code = work / "one_layer.py"
    code.write_text(ONE_LAYER)
    options = {
        "images": str(small_images(work, count)),
        "model": f"{code}:network",
        "device": "cpu",
        "precision": "float32",
        "image_size": 32,
        "batch_size": BATCH,
    }
    sides = {"plain": functools.partial(rate, work, options)}
    for number in processes:
        sides[str(number)] = functools.partial(rate, work, {**options, "processes": number})
    return dict(in_turns(sides, repeats))


def measure_photos(
    work: Path, photos: Path, network: str, repeats: int, *, ray: bool
) -> dict[str, Any]:
    """Return the images/s of a plain run, of one worker process, and of one worker of Ray."""
    options = {
        "images": str(photos),
        "model": network,
        "weights": "random",
        "device": "cpu",
        "precision": "float32",
    }
    sides = {
        "plain": lambda: rate(work, options),
        "worker": lambda: rate(work, {**options, "processes": 1}),
    }
    if ray:
        sides["ray"] = lambda: rate(work, {**options, "engine": "ray"})
    return dict(in_turns(sides, repeats))


def main() -> None:
    """Measure and report."""
    parser = argument_parser(__doc__)
    parser.add_argument("--small", type=positive, help="number of small images")
    parser.add_argument("--processes", type=positive, nargs="+", default=[1, 2])
    parser.add_argument("--photos", type=Path, help="folder of photos")
    parser.add_argument("--copies", type=positive, default=1, help="times that each photo counts")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--ray", action="store_true", help="measure a worker of Ray, too")
    chosen = parser.parse_args()
    figures: dict[str, Any] = {}
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if chosen.small:
            progress(f"{chosen.small} small images")
            rates = measure_small(work, chosen.small, chosen.processes, chosen.repeats)
            figures["small"] = {side: spread(values) for side, values in rates.items()}
            lines.append(f"{chosen.small:,} images of 48 x 40, one layer")
            for side, values in rates.items():
                name = "plain run" if side == "plain" else f"--processes {side}"
                ratio = median_ratio(values, rates["plain"])
                lines.append(f"  {name:14} {format_rates(values)}   {ratio:.3f}")
        if chosen.photos:
            with copies_of(chosen.photos, chosen.copies) as photos:
                for network in chosen.networks:
                    progress(network)
                    rates = measure_photos(work, photos, network, chosen.repeats, ray=chosen.ray)
                    figures[network] = {side: spread(values) for side, values in rates.items()}
                    lines.append(network)
                    for side, values in rates.items():
                        ratio = median_ratio(values, rates["plain"])
                        lines.append(f"  {side:14} {format_rates(values)}   {ratio:.3f}")
    report(figures, lines, chosen.json)


if __name__ == "__main__":
    main()
