"""Measures the rate of a run beside the common recipe on the same images, turn by turn.

    python scripts/benchmark.py images/ --model resnet50 --weights random --repeats 3

Every measurement is a process of its own, the two sides take turns, and the medians are compared:
single figures of a busy machine mean little. Rates are images per second from the first image
that is opened to the last embedding that is there (for this program: written to the store);
loading the libraries and the model is left out on both sides.

The common recipe is what most projects copy: torchvision's ``ImageFolder`` and ``DataLoader`` with
worker processes, the model's own evaluation transform on PIL images, ``torch.no_grad``, float32.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def measure_ours(options: argparse.Namespace) -> dict[str, float]:
    """Rate of ``extract`` with its defaults."""
    from extractor.devices import keep_freed_memory
    from extractor.pipeline import extract

    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        report = extract(
            options.images,
            options.model,
            folder,
            weights=options.weights,
            device=options.device,
            batch_size=options.batch_size,
            workers=options.workers,
        )
    return {"images": report.images, "images_per_second": report.images_per_second}


def measure_recipe(options: argparse.Namespace) -> dict[str, float]:
    """Rate of ImageFolder, DataLoader, PIL and float32."""
    import numpy as np
    import torch
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    from extractor import load_backbone

    backbone = load_backbone(options.model, weights=options.weights, device=options.device)
    given = backbone.preprocess
    filters = transforms.InterpolationMode
    size = given.resize_size[0] if given.resize == "shortest" else given.resize_size
    transform = transforms.Compose(
        [
            transforms.Resize(size, interpolation=filters(given.interpolation)),
            transforms.CenterCrop(given.input_size),
            transforms.ToTensor(),
            transforms.Normalize(given.mean, given.std),
        ]
    )
    module = backbone.module.to(memory_format=torch.contiguous_format)
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(os.path.abspath(options.images), Path(folder) / "all")
        dataset = ImageFolder(folder, transform)
        loader = DataLoader(
            dataset,
            batch_size=options.batch_size or 32,
            num_workers=options.workers or 2,
            pin_memory=backbone.device.type == "cuda",
        )
        started = time.perf_counter()
        rows = []
        with torch.no_grad():
            for pixels, _ in loader:
                rows.append(module(pixels.to(backbone.device)).cpu().numpy())
        np.save(Path(folder) / "features.npy", np.concatenate(rows))
        seconds = time.perf_counter() - started
    return {"images": len(dataset), "images_per_second": len(dataset) / seconds}


SIDES = {"extract": measure_ours, "common recipe": measure_recipe}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", help="a folder of images")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--weights", default="default")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print figures for a program")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(SIDES[options.side](options)))
        return

    rates: dict[str, list[float]] = {side: [] for side in SIDES}
    images = 0
    for _ in range(options.repeats):
        for side in SIDES:
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--side", side],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            figures = json.loads(done.stdout.splitlines()[-1])
            rates[side].append(figures["images_per_second"])
            images = figures["images"]
    report(options, rates, images)


def report(options: argparse.Namespace, rates: dict[str, list[float]], images: int) -> None:
    """Print medians, spread and the ratio of the two sides, turn by turn."""
    import torch

    ratios = [ours / theirs for ours, theirs in zip(*rates.values(), strict=True)]
    figures: dict[str, Any] = {
        "model": options.model,
        "images": images,
        "repeats": options.repeats,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "rates": rates,
        "ratios": ratios,
    }
    if options.json:
        print(json.dumps(figures, indent=2))
        return
    print(f"{options.model}, {images} images, {options.repeats} turns")
    print(f"{figures['machine']}; {figures['versions']}")
    for side, values in rates.items():
        spread = f"{min(values):.1f} to {max(values):.1f}"
        print(f"  {side:14} {statistics.median(values):7.1f} images/s   ({spread})")
    print(f"  ratio          {statistics.median(ratios):7.2f}            (median of the turns)")


if __name__ == "__main__":
    main()
