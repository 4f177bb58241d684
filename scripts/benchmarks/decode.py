"""Measure how fast images are decoded, and how far the fast mode is from the exact one.

    python scripts/benchmarks/decode.py camera/ --image-size 224

One thread, files in the page cache, from the file to uint8 pixels at the model's input size:

- recipe: the common one; Pillow decodes the whole image, resizes the whole of it, and crops
- scaled, exact: this program's two ``--decode`` modes on a CPU
- no digest: ``scaled`` without the SHA-256 of each file, which the recipe does not take either
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from typing import TypeAlias
from unittest import mock

import numpy as np
import numpy.typing as npt
from common import argument_parser, format_rates, in_turns, median_ratio, report, seconds, spread
from PIL import Image

from extractor.errors import DecodeError
from extractor.images.budget import allow_pixels
from extractor.images.decode import decode_into
from extractor.images.listing import list_images
from extractor.options import MAX_PIXELS
from extractor.preprocess import INTERPOLATIONS, Preprocess
from extractor.text import plural

MODES = ("scaled", "exact")

Decode: TypeAlias = Callable[[bytes], None]


def main() -> None:
    """Print one line for each way to decode."""
    parser = argument_parser(__doc__)
    parser.add_argument("images", help="a folder of images")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--interpolation", choices=INTERPOLATIONS, default="bicubic")
    args = parser.parse_args()
    allow_pixels(MAX_PIXELS)
    preprocess = Preprocess.standard(
        args.image_size, crop_pct=0.875, interpolation=args.interpolation
    )
    images = list_images(args.images)
    paths, differences = compare_modes(map(images.full_path, range(len(images))), preprocess)
    ways: dict[str, Decode] = {
        "recipe": recipe(preprocess),
        "scaled": decoder(preprocess, "scaled"),
        "exact": decoder(preprocess, "exact"),
        "no digest": without_digest(decoder(preprocess, "scaled")),
    }

    def rate(decode: Decode) -> float:
        return len(paths) / seconds(lambda: [decode(path) for path in paths])  # type: ignore[func-returns-value]

    rates = in_turns(
        {name: lambda decode=decode: rate(decode) for name, decode in ways.items()},
        args.repeats,
    )
    difference = {"mean": statistics.mean(differences), "max": max(differences)}
    lines = [
        f"{plural(len(paths), 'image')}, {args.image_size} px, {args.interpolation}, one thread"
    ]
    for name, values in rates.items():
        ratio = median_ratio(values, rates["recipe"])
        lines.append(f"{name:10} {format_rates(values)}, {ratio:.2f} times the recipe")
    lines.append(
        f"scaled and exact differ by {difference['mean']:.2f} of 255 levels on average "
        f"(worst image {difference['max']:.2f})"
    )
    figures = {
        "images": len(paths),
        "image_size": args.image_size,
        "interpolation": args.interpolation,
        "rates": {name: spread(values) for name, values in rates.items()},
        "levels_between_scaled_and_exact": difference,
    }
    report(figures, lines, args.json)


def compare_modes(paths: map[bytes], preprocess: Preprocess) -> tuple[list[bytes], list[float]]:
    """Return the decodable paths, and for each the mean difference of both modes in levels."""
    decodable, differences = [], []
    for path in paths:
        pictures = []
        try:
            for mode in MODES:
                out = np.empty((*preprocess.input_size, 3), np.uint8)
                decode_into(path, [preprocess], [out], decode_mode=mode)
                pictures.append(out.astype(np.int16))
        except DecodeError as error:
            print(f"skipped {os.fsdecode(path)}: {error}")
            continue
        decodable.append(path)
        differences.append(float(abs(pictures[0] - pictures[1]).mean()))
    return decodable, differences


def decoder(preprocess: Preprocess, mode: str) -> Decode:
    """Return this program's decoder in one mode."""
    out: npt.NDArray[np.uint8] = np.empty((*preprocess.input_size, 3), np.uint8)

    def decode(path: bytes) -> None:
        decode_into(path, [preprocess], [out], decode_mode=mode)

    return decode


def without_digest(decode: Decode) -> Decode:
    """Return a decoder that takes no SHA-256."""

    class NoDigest:
        def __init__(self, _: bytes) -> None: ...

        def digest(self) -> bytes:
            return b""

    def decode_only(path: bytes) -> None:
        with mock.patch("hashlib.sha256", NoDigest):
            decode(path)

    return decode_only


def recipe(preprocess: Preprocess) -> Decode:
    """Return the common way: Pillow decodes and resizes the whole image, then crops."""
    height, width = preprocess.input_size
    resample = Image.Resampling[preprocess.interpolation.upper()]

    def decode(path: bytes) -> None:
        with Image.open(os.fsdecode(path)) as image:
            rgb = image.convert("RGB")
        resized = rgb.resize(preprocess.resized_size(*rgb.size), resample)
        left, top = (resized.width - width) // 2, (resized.height - height) // 2
        np.asarray(resized.crop((left, top, left + width, top + height)))

    return decode


if __name__ == "__main__":
    main()
