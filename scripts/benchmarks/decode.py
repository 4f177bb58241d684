"""Measures how fast images become pictures, and how far the fast way is from the exact one.

    python scripts/benchmarks/decode.py camera/ --image-size 224

One thread, files in the page cache. The three ways: what the common recipe does (Pillow decodes the
whole image, resizes the whole of it, and crops), and this program's ``--decode exact`` and
``scaled``, each from the file to uint8 pixels at the model's input size. This program also takes
the SHA-256 of each file, which the recipe does not: a fourth line leaves that out.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from unittest import mock

import numpy as np
import PIL
from PIL import Image

from extractor.errors import DecodeError
from extractor.images.budget import allow_pixels
from extractor.images.decode import decode_into
from extractor.images.listing import list_images
from extractor.options import MAX_PIXELS
from extractor.preprocess import INTERPOLATIONS, Preprocess

WAYS = ("scaled", "exact")  # of the CPU


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", help="a folder")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--interpolation", choices=INTERPOLATIONS, default="bicubic")
    parser.add_argument("--repeats", type=int, default=3)
    parsed = parser.parse_args()
    allow_pixels(MAX_PIXELS)
    preprocess = Preprocess.standard(
        parsed.image_size, crop_pct=0.875, interpolation=parsed.interpolation
    )
    listed = list_images(parsed.images)
    pictures: dict[str, list[np.ndarray]] = {how: [] for how in WAYS}
    paths = []
    for path in map(listed.full_path, range(len(listed))):
        made = {how: np.empty((*preprocess.input_size, 3), np.uint8) for how in WAYS}
        try:
            for how, out in made.items():
                decode_into(path, [preprocess], [out], decode_mode=how)
        except DecodeError as error:
            print(f"left out: {os.fsdecode(path)}: {error}")
            continue
        paths.append(path)
        for how, out in made.items():
            pictures[how].append(out.astype(np.int16))
    ways: dict[str, Callable[[bytes], None]] = {"common recipe": _common(preprocess)}
    for how in WAYS:
        ways[how] = _ours(preprocess, how)
    ways["no digest"] = _undigested(ways["scaled"])
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(parsed.repeats):
        for name, way in ways.items():
            begun = time.perf_counter()
            for path in paths:
                way(path)
            rates[name].append(len(paths) / (time.perf_counter() - begun))
    print(f"{len(paths)} images, {parsed.image_size} px, {parsed.interpolation}, one thread")
    print(f"{platform.machine()}, Python {platform.python_version()}, Pillow {PIL.__version__}")
    for name, values in rates.items():
        spread = f"{min(values):.1f} to {max(values):.1f}"
        ratios = [a / b for a, b in zip(values, rates["common recipe"], strict=True)]
        ratio = statistics.median(ratios)
        print(f"{name:14} {statistics.median(values):7.1f} images/s ({spread}), ratio {ratio:.2f}")
    apart = [
        float(abs(a - b).mean()) for a, b in zip(*(pictures[how] for how in WAYS), strict=True)
    ]
    mean, worst = statistics.mean(apart), max(apart)
    print(f"scaled and exact differ by {mean:.2f} of 255 levels (worst image {worst:.2f})")


def _ours(preprocess: Preprocess, how: str) -> Callable[[bytes], None]:
    out = np.empty((*preprocess.input_size, 3), np.uint8)

    def way(path: bytes) -> None:
        decode_into(path, [preprocess], [out], decode_mode=how)

    return way


def _undigested(way: Callable[[bytes], None]) -> Callable[[bytes], None]:
    class NoDigest:
        def __init__(self, _: bytes) -> None: ...

        def digest(self) -> bytes:
            return b""

    def undigested(path: bytes) -> None:
        with mock.patch("hashlib.sha256", NoDigest):
            way(path)

    return undigested


def _common(preprocess: Preprocess) -> Callable[[bytes], None]:
    height, width = preprocess.input_size
    resample = Image.Resampling[preprocess.interpolation.upper()]

    def way(path: bytes) -> None:
        with Image.open(os.fsdecode(path)) as image:
            rgb = image.convert("RGB")
        resized = rgb.resize(preprocess.resized_size(*rgb.size), resample)
        left, top = (resized.width - width) // 2, (resized.height - height) // 2
        np.asarray(resized.crop((left, top, left + width, top + height)))

    return way


if __name__ == "__main__":
    main()
