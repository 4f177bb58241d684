"""Show that the cost of a run does not grow with the number of images: rate and memory over time.

    python scripts/benchmarks/million.py --images 1000000

Makes that many small JPEGs (links to a few), and embeds them with a network of one layer, so that
nothing hides the cost of the program itself. Prints images/s and resident memory after each tenth
of the run. Then it measures the listing, a second run that has nothing to do, and opening the
store.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import argument_parser, positive, progress, report, seconds
from PIL import Image

from extractor.system.process_tuning import freeze_imports, keep_freed_memory

with freeze_imports():  # as the command does
    import torch
    from torch import nn

    from extractor import Backbone, FeatureStore, Preprocess, extract
    from extractor.images.listing import ImageList, list_images
    from extractor.report import Progress

PICTURES = 100  # distinct ones; a file may have about 65,000 links
IMAGES_PER_FOLDER = 10_000
SIZE = 32
BATCH = 256


class MeanColor(nn.Module):
    """Maps ``(B, 3, H, W)`` pixels to the mean of each channel, ``(B, 3)``."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the mean of each channel."""
        return pixels.mean((2, 3))


class Monitor:
    """Records images/s and resident memory after each tenth of a run."""

    def __init__(self, images: int) -> None:
        self.tenths: list[dict[str, float]] = []
        self._marks = [images * tenth // 10 for tenth in range(1, 11)]
        self._done, self._time = 0, time.perf_counter()

    def __call__(self, update: Progress) -> None:
        """Take the progress of a run."""
        if not self._marks or update.done < self._marks[0]:
            return
        now = time.perf_counter()
        rate = (update.done - self._done) / (now - self._time)
        self._done, self._time = update.done, now
        megabytes = resident_megabytes()
        self.tenths.append(
            {"images": update.done, "images_per_second": rate, "megabytes": megabytes}
        )
        progress(f"{update.done:>10,} images {rate:>9,.0f} images/s {megabytes:>6.0f} MB")
        while self._marks and update.done >= self._marks[0]:
            self._marks.pop(0)


def main() -> None:
    """Make the images, measure, and print the figures."""
    parser = argument_parser(__doc__, repeats=None)
    parser.add_argument("--images", type=positive, default=1_000_000)
    parser.add_argument("--folder", help="parent of the images and the store (default: /tmp)")
    args = parser.parse_args()
    keep_freed_memory()  # as the command does
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        made = seconds(lambda: make_images(Path(folder), args.images))
        progress(f"made {args.images:,} images in {made:.0f} s")
        figures = measure(Path(folder))
    lines = [
        f"{figures['images']:,} images listed in {figures['list_seconds']:.1f} s, "
        f"{figures['list_megabytes']:.0f} MB",
        f"whole run {figures['run_seconds']:.0f} s, {figures['images_per_second']:,.0f} images/s, "
        f"{figures['write_share']:.1%} of it for writing",
        f"second run with nothing to do {figures['second_run_seconds']:.1f} s",
        f"store opened in {figures['open_milliseconds']:.1f} ms, imports not counted",
    ]
    lines += [
        f"{tenth['images']:>10,} images {tenth['images_per_second']:>9,.0f} images/s "
        f"{tenth['megabytes']:>6.0f} MB"
        for tenth in figures["tenths"]
    ]
    report(figures, lines, args.json)


def make_images(folder: Path, count: int) -> None:
    """Make ``count`` paths of small JPEGs below ``folder/images``."""
    pictures = [folder / f"{i}.jpg" for i in range(PICTURES)]
    for picture in pictures:
        Image.effect_noise((48, 40), 60).convert("RGB").save(picture)
    for i in range(count):
        parent = folder / "images" / f"{i // IMAGES_PER_FOLDER:05d}"
        if i % IMAGES_PER_FOLDER == 0:
            parent.mkdir(parents=True)
        os.link(pictures[i % PICTURES], parent / f"{i:08d}.jpg")


def resident_megabytes() -> float:
    """Return the memory of this process, without what is only mapped from files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return int(values["RssAnon"].split()[0]) / 1024


def measure(folder: Path) -> dict[str, Any]:
    """Run twice, open the store, and return what that costs."""
    before = resident_megabytes()
    lists: list[ImageList] = []
    list_seconds = seconds(lambda: lists.append(list_images(folder / "images")))
    (images,) = lists
    list_megabytes = resident_megabytes() - before

    preprocess = Preprocess.standard(SIZE)
    backbone = Backbone.from_module(MeanColor(), head=None, preprocess=preprocess, device="cpu")
    monitor = Monitor(len(images))
    run = extract(images, backbone, folder / "store", batch_size=BATCH, progress=monitor)
    assert run.spent is not None
    second_run = seconds(lambda: extract(images, backbone, folder / "store", batch_size=BATCH))
    assert len(FeatureStore.open(folder / "store")) == len(images)
    return {
        "images": len(images),
        "list_seconds": list_seconds,
        "list_megabytes": list_megabytes,
        "tenths": monitor.tenths,
        "run_seconds": run.seconds,
        "images_per_second": run.images_per_second,
        "write_share": run.spent.seconds["write"] / run.seconds,
        "second_run_seconds": second_run,
        "open_milliseconds": open_seconds(folder / "store") * 1000,
    }


def open_seconds(store: Path) -> float:
    """Return the seconds to open a store and read a row; the median of five processes."""
    program = (
        "import sys, time; from extractor import FeatureStore; started = time.perf_counter(); "
        "FeatureStore.open(sys.argv[1])[0]; print(time.perf_counter() - started)"
    )
    return statistics.median(
        float(subprocess.check_output([sys.executable, "-c", program, str(store)]))
        for _ in range(5)
    )


if __name__ == "__main__":
    main()
