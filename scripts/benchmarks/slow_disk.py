"""Measure decoding where each file takes a while to open, as on a network disk.

    python scripts/benchmarks/slow_disk.py PHOTOS --milliseconds 20

Opening a file is delayed artificially. The same images are decoded with threads that read ahead,
without them, and with no delay, turn by turn.
"""

from __future__ import annotations

import itertools
import os
import time
from typing import IO

from common import argument_parser, format_rates, in_turns, report, spread

from extractor import Preprocess
from extractor.images import files
from extractor.images.listing import ImageList, list_images
from extractor.loading import read_ahead
from extractor.loading.loader import BatchLoader
from extractor.loading.options import LoaderOptions
from extractor.system.cpu import available_cores
from extractor.text import plural

BATCH = 32


def main() -> None:
    """Print the images/s of each side."""
    parser = argument_parser(__doc__)
    parser.add_argument("images", help="a folder of images")
    parser.add_argument("--milliseconds", type=float, default=20, help="delay of each file")
    parser.add_argument("--count", type=int, default=2000, help="images to decode; they repeat")
    args = parser.parse_args()
    images, delay = list_images(args.images), args.milliseconds / 1000
    readers = read_ahead.MAX_READERS
    rate(images, BATCH, readers, 0.0)  # load the decoders
    rates = in_turns(
        {
            "no delay": lambda: rate(images, args.count, readers, 0.0),
            "read ahead": lambda: rate(images, args.count, readers, delay),
            "no read ahead": lambda: rate(images, args.count, 0, delay),
        },
        args.repeats,
    )
    lines = [
        f"{plural(args.count, 'image')}, {plural(available_cores(), 'thread')}, "
        f"{args.milliseconds:g} ms per file"
    ]
    lines += [f"{side:13} {format_rates(values)}" for side, values in rates.items()]
    figures = {
        "images": args.count,
        "milliseconds": args.milliseconds,
        "repeats": args.repeats,
        "rates": {side: spread(values) for side, values in rates.items()},
    }
    report(figures, lines, args.json)


def rate(images: ImageList, count: int, readers: int, delay_seconds: float) -> float:
    """Return the images/s of decoding alone.

    Args:
        images: The images, taken again from the start if there are less than ``count``.
        count: Number of images to decode.
        readers: Number of threads that may read ahead.
        delay_seconds: Time until a file is open.
    """
    open_regular = files.open_regular

    def open_slowly(path: str | bytes | os.PathLike[str]) -> IO[bytes]:
        time.sleep(delay_seconds)
        return open_regular(path)

    indexes = itertools.islice(itertools.cycle(range(len(images))), count)
    paths = [images.full_path(index) for index in indexes]
    batches = (paths[start : start + BATCH] for start in range(0, count, BATCH))
    files.open_regular, read_ahead.MAX_READERS = open_slowly, readers
    try:
        started = time.perf_counter()
        with BatchLoader(
            batches,
            [Preprocess.standard(224)],
            LoaderOptions(batch_size=BATCH, workers=available_cores()),
        ) as loaded:
            for batch in loaded:
                batch.release()
        return count / (time.perf_counter() - started)
    finally:
        files.open_regular = open_regular


if __name__ == "__main__":
    main()
