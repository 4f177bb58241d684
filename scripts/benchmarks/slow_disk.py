#!/usr/bin/env python3
"""Images that are decoded a second where every file takes a while to open, as on a network disk.

    python scripts/benchmarks/slow_disk.py PHOTOS --milliseconds 20

Opening is delayed artificially, and the same images are decoded with threads that read ahead and
without, turn by turn, and with no delay for comparison.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from typing import IO

from extractor import Preprocess
from extractor.images import files
from extractor.images.listing import ImageList, list_images
from extractor.loading import read_ahead
from extractor.loading.loader import BatchLoader
from extractor.loading.options import LoaderOptions
from extractor.system.cpu import available_cores

BATCH = 32


def rate(images: ImageList, count: int, readers: int, delay: float) -> float:
    """Images/s of decoding alone.

    Args:
        count: of images; the list is repeated.
        readers: threads that may read ahead.
        delay: seconds until a file is open.
    """
    opened = files.open_regular

    def slow(path: str | bytes | os.PathLike[str]) -> IO[bytes]:
        time.sleep(delay)
        return opened(path)

    places = itertools.islice(itertools.cycle(range(len(images))), count)
    paths = [images.full_path(place) for place in places]
    plan = (paths[start : start + BATCH] for start in range(0, count, BATCH))
    files.open_regular, read_ahead.MAX_READERS = slow, readers
    try:
        begun = time.perf_counter()
        with BatchLoader(
            plan,
            [Preprocess.standard(224)],
            LoaderOptions(batch_size=BATCH, workers=available_cores()),
        ) as batches:
            for batch in batches:
                batch.release()
        return count / (time.perf_counter() - begun)
    finally:
        files.open_regular = opened


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", help="a folder of images")
    parser.add_argument("--milliseconds", type=float, default=20)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    images, delay = list_images(options.images), options.milliseconds / 1000
    most = read_ahead.MAX_READERS
    sides = {
        "no delay": (most, 0.0),
        "read ahead": (most, delay),
        "not read ahead": (0, delay),
    }
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(options.repeats):
        for side, how in sides.items():
            rates[side].append(rate(images, options.count, *how))
    print(
        f"{options.count} images, {available_cores()} threads, {options.milliseconds:g} ms a file"
    )
    for side, values in rates.items():
        spread = f"{min(values):.0f} to {max(values):.0f}"
        print(f"{side:15} {statistics.median(values):6.0f} images/s ({spread})")


if __name__ == "__main__":
    main()
