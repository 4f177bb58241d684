#!/usr/bin/env python3
"""Shows that the cost of a run does not grow with the number of images: rate and memory over time.

    python scripts/benchmarks/million.py --images 1000000

Makes so many small JPEGs (links to a few), embeds them with a network of one layer, so that nothing
hides what the program itself costs, and prints images/s and resident memory after each tenth of
the run. Then: listing, what a second run finds to do, and opening the store.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from extractor.system.process_tuning import freeze_imports, keep_freed_memory

with freeze_imports():  # as the command does
    import torch
    from torch import nn

    from extractor import Backbone, FeatureStore, Preprocess, extract
    from extractor.images.listing import list_images
    from extractor.report import Progress

PICTURES = 100  # that are really different; a file may have some 65,000 links
IN_A_FOLDER = 10_000
SIZE = 32


class Colours(nn.Module):
    """The mean of each colour."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean((2, 3))


def make_images(folder: Path, count: int) -> None:
    """So many paths of small JPEGs."""
    pictures = [folder / f"{i}.jpg" for i in range(PICTURES)]
    for picture in pictures:
        Image.effect_noise((48, 40), 60).convert("RGB").save(picture)
    for i in range(count):
        place = folder / "images" / f"{i // IN_A_FOLDER:05d}"
        if i % IN_A_FOLDER == 0:
            place.mkdir(parents=True)
        os.link(pictures[i % PICTURES], place / f"{i:08d}.jpg")


def resident_megabytes() -> float:
    """Memory of this process, without what is only mapped from files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return int(values["RssAnon"].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--folder", help="where to make the images and the store (default: /tmp)")
    options = parser.parse_args()
    keep_freed_memory()  # as the command does
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        begun = time.perf_counter()
        make_images(Path(place), options.images)
        print(f"{options.images} images made in {time.perf_counter() - begun:.0f} s", flush=True)
        measure(Path(place))


def measure(place: Path) -> None:
    """Run, and print what it costs."""
    before, begun = resident_megabytes(), time.perf_counter()
    images = list_images(place / "images")
    seconds, grown = time.perf_counter() - begun, resident_megabytes() - before
    print(f"listed in {seconds:.1f} s, {grown:.0f} MB", flush=True)

    preprocess = Preprocess.standard(SIZE)
    backbone = Backbone.from_module(Colours(), head=None, preprocess=preprocess, device="cpu")
    print(f"{'images':>10} {'images/s':>9} {'MB':>6}")
    marks = [len(images) * tenth // 10 for tenth in range(1, 11)]
    last = [0, time.perf_counter()]

    def show(progress: Progress) -> None:
        if marks and progress.done >= marks[0]:
            now = time.perf_counter()
            rate = (progress.done - last[0]) / (now - last[1])
            last[:] = progress.done, now
            print(f"{progress.done:>10} {rate:>9.0f} {resident_megabytes():>6.0f}", flush=True)
            while marks and progress.done >= marks[0]:
                marks.pop(0)

    report = extract(images, backbone, place / "store", batch_size=256, progress=show)
    assert report.spent is not None
    write = report.spent.seconds["write"] / report.seconds
    print(f"whole run {report.seconds:.0f} s, {report.images_per_second:.0f} images/s")
    print(f"writing {write:.1%} of it")

    begun = time.perf_counter()
    again = extract(images, backbone, place / "store", batch_size=256)
    print(f"nothing to do: {time.perf_counter() - begun:.1f} s, {again.resumed} there")
    milliseconds = opening(place / "store") * 1000
    print(f"the store opens in {milliseconds:.1f} ms, in a process that has imported the package")
    assert len(FeatureStore.open(place / "store")) == len(images)


def opening(store: Path) -> float:
    """Seconds until a store is open and its first row read; the median of five processes."""
    program = (
        "import sys, time; from extractor import FeatureStore; begun = time.perf_counter(); "
        "FeatureStore.open(sys.argv[1])[0]; print(time.perf_counter() - begun)"
    )
    return statistics.median(
        float(subprocess.check_output([sys.executable, "-c", program, str(store)]))
        for _ in range(5)
    )


if __name__ == "__main__":
    main()
