"""EXIF orientation is applied, in every format and to every transform."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from support.images import (
    EXIF_KINDS,
    MEAN,
    STD,
    Pixels,
    decode_into,
    encoded,
    photo,
    pixels,
    turned,
    unresized,
)
from timm.data import create_transform
from timm.data.transforms import ResizeKeepRatio, str_to_interp_mode

from extractor.images.types import EncodedImage
from extractor.models import from_timm


class TestOrientation:
    # How to make, of the stored pixels, the upright ones: CIPA DC-008, tag 0x0112.
    UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {  # noqa: RUF012
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: a[::-1].swapaxes(0, 1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: a.swapaxes(0, 1)[::-1],
    }

    @pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_every_pixel_is_turned_upright(self, kind: str, orientation: int) -> None:
        stored = np.asarray(photo(5, 3))
        upright = self.UPRIGHT[orientation](stored)
        height, width, _ = upright.shape
        source = EncodedImage(turned(Image.fromarray(stored), kind, orientation))
        assert np.array_equal(pixels(source, width, height), upright)

    @pytest.mark.parametrize("kind", EXIF_KINDS)
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_orientation_and_crop_commute(self, kind: str, orientation: int) -> None:
        for target, mode, size in [
            ((64, 64), "center", (101, 77)),
            ((48, 80), "center", (77, 101)),
            ((48, 80), "border", (90, 31)),
            ((63, 41), "squash", (64, 99)),
        ]:
            data = turned(photo(*size), kind, orientation)
            config: dict[str, Any] = {
                "input_size": (3, *target),
                "interpolation": "bicubic",
                "mean": MEAN,
                "std": STD,
                "crop_pct": 0.9,
                "crop_mode": mode,
            }
            preprocess = from_timm._preprocess(config)
            out = np.full((*target, 3), 201, np.uint8)
            info = decode_into(EncodedImage(data), preprocess, out)

            with Image.open(io.BytesIO(data)) as image:
                upright = ImageOps.exif_transpose(image).convert("RGB")
            assert (info.width, info.height) == upright.size
            assert (upright.size == size) is (orientation < 5)
            transform = create_transform(**config)
            for step in transform.transforms:
                if isinstance(step, ResizeKeepRatio):  # older timm forgets the filter here
                    step.interpolation = str_to_interp_mode("bicubic")
            reference = transform(upright).numpy().transpose(1, 2, 0)
            expected = np.rint((reference * STD + MEAN) * 255)
            difference = np.abs(out - expected)
            # Pillow rounds between the two axes, and the stored image has them the other way round.
            assert difference.max() <= 5  # before Pillow 13: rows always after columns
            assert difference.mean() < 0.35

    @pytest.mark.parametrize("orientation", [0, 9, 255, 65535])
    @pytest.mark.parametrize("kind", EXIF_KINDS)
    def test_undefined_orientations_are_ignored(self, kind: str, orientation: int) -> None:
        image = photo(16, 8)
        with_it = EncodedImage(turned(image, kind, orientation))
        without = EncodedImage(turned(image, kind, 1))
        assert np.array_equal(pixels(with_it, 16, 8), pixels(without, 16, 8))

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
    @pytest.mark.parametrize(
        "exif",
        [
            b"",
            b"garbage",
            b"MM",
            b"II*\0\xff\xff\xff\x7f",  # the directory lies outside
            b"II*\0\x08\0\0\0\xff\xff",  # 65535 entries, none there
            b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHLL", 0x0112, 2, 2, 0x36),  # the text "6"
            b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHLL", 0x0112, 5, 1, 0xFFFF),  # a fraction
            b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHLL", 0x0112, 99, 1, 6),  # no such type
        ],
        ids=["none", "garbage", "short", "outside", "many", "text", "fraction", "type"],
    )
    def test_broken_exif_is_ignored(self, kind: str, exif: bytes) -> None:
        image = photo(16, 8)
        broken = EncodedImage(encoded(image, kind, exif=b"Exif\0\0" + exif))
        without_exif = EncodedImage(encoded(image, kind))
        assert np.array_equal(pixels(broken, 16, 8), pixels(without_exif, 16, 8))

    @pytest.mark.filterwarnings("ignore")
    def test_randomly_changed_exif_never_fails(self) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        exif[0x010F] = "a maker"
        exif.get_ifd(0x8769)[0x9003] = "2024:01:01 00:00:00"
        exif.get_ifd(0x8825)[1] = "N"
        good = exif.tobytes()
        random = np.random.default_rng(0)
        image = photo(12, 12)
        out = np.zeros((12, 12, 3), np.uint8)
        for _ in range(200):
            block = bytearray(good)
            for index in random.integers(6, len(block), random.integers(1, 6)):
                block[index] = random.integers(256)
            data = encoded(image, "JPEG", exif=bytes(block))
            decode_into(EncodedImage(data), unresized(12, 12), out)

    def test_xmp_orientation_applies_without_exif(self) -> None:
        xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
        stored = np.asarray(photo(5, 3))
        data = encoded(Image.fromarray(stored), "WEBP", lossless=True, xmp=xmp)
        assert np.array_equal(pixels(EncodedImage(data), 3, 5), self.UPRIGHT[6](stored))
