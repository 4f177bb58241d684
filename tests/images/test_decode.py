"""Every image, whatever holds it, comes out as it is looked at, or says why it does not."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import socket
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import EpsImagePlugin, Image, ImageOps, features
from timm.data import create_transform
from timm.data.transforms import ResizeKeepRatio, str_to_interp_mode

from extractor.errors import DecodeError
from extractor.images import decode, files
from extractor.images.formats import looks_like_image, readable_suffixes
from extractor.images.jpeg import JPEG_END
from extractor.images.types import EncodedImage, ImageInfo, ImageSource
from extractor.models import from_timm
from extractor.preprocess import Preprocess

Pixels = npt.NDArray[np.uint8]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def decode_into(source: ImageSource, preprocess: Preprocess, out: np.ndarray) -> ImageInfo:
    """One picture of an image; several of one are tested in test_several.py."""
    return decode.decode_into(source, [preprocess], [out])


def whole(width: int, height: int) -> Preprocess:
    """Nothing is resized: the model's picture is the image."""
    return Preprocess((height, width), "squash", (height, width), "bilinear", MEAN, STD)


def pixels(source: ImageSource, width: int, height: int) -> Pixels:
    """The image as it is, where ``width`` and ``height`` are its own."""
    out = np.full((height, width, 3), 201, np.uint8)
    info = decode_into(source, whole(width, height), out)
    assert (info.width, info.height) == (width, height)
    return out


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colors, as a photo has."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (max(2, height // 12), max(2, width // 12), 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("scale", [1, 8])
def test_a_jpeg_without_its_end_is_read_though_something_else_follows(
    tmp_path: Path, scale: int
) -> None:
    content = encoded(photo(400 * scale, 300 * scale), "JPEG", quality=90)
    assert content.endswith(JPEG_END)
    noise = np.random.default_rng(0).integers(0, 256, 2**16, np.uint8).tobytes()
    path = tmp_path / "a.jpg"
    path.write_bytes(content[:-2] + bytes(2**16) + noise)
    expected, preprocess = np.empty((64, 64, 3), np.uint8), Preprocess.standard(64)
    decode_into(EncodedImage(content), preprocess, expected)
    for source in (path, EncodedImage(path.read_bytes())):
        out = np.zeros_like(expected)
        decode_into(source, preprocess, out)
        np.testing.assert_array_equal(out, expected)


def furthest(one: npt.ArrayLike, other: npt.ArrayLike) -> int:
    return int(np.abs(np.asarray(one, np.int64) - np.asarray(other, np.int64)).max())


def reason(source: ImageSource) -> str:
    """Why a source cannot be decoded."""
    with pytest.raises(DecodeError, match=r".") as caught:
        decode_into(source, whole(8, 8), np.zeros((8, 8, 3), np.uint8))
    return caught.value.reason


@pytest.fixture
def promptly() -> Iterator[None]:
    """Fails a test that waits, say for the other end of a pipe."""

    def fail(*_: object) -> None:
        pytest.fail("still waiting after 10 seconds")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


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

    KINDS = ("JPEG", "PNG", "WEBP", "TIFF")

    @staticmethod
    def turned(image: Image.Image, kind: str, orientation: int) -> bytes:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(kind, {})
        return encoded(image, kind, exif=exif, **options)

    @pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_every_pixel_comes_to_its_upright_place(self, kind: str, orientation: int) -> None:
        stored = np.asarray(photo(5, 3))
        upright = self.UPRIGHT[orientation](stored)
        height, width, _ = upright.shape
        source = EncodedImage(self.turned(Image.fromarray(stored), kind, orientation))
        assert np.array_equal(pixels(source, width, height), upright)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_orientation_and_crop_commute(self, kind: str, orientation: int) -> None:
        for target, mode, size in [
            ((64, 64), "center", (101, 77)),
            ((48, 80), "center", (77, 101)),
            ((48, 80), "border", (90, 31)),
            ((63, 41), "squash", (64, 99)),
        ]:
            data = self.turned(photo(*size), kind, orientation)
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
    @pytest.mark.parametrize("kind", KINDS)
    def test_numbers_without_a_meaning_turn_nothing(self, kind: str, orientation: int) -> None:
        image = photo(16, 8)
        with_it = EncodedImage(self.turned(image, kind, orientation))
        without = EncodedImage(self.turned(image, kind, 1))
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
    def test_a_photo_with_broken_exif_is_still_a_photo(self, kind: str, exif: bytes) -> None:
        image = photo(16, 8)
        broken = EncodedImage(encoded(image, kind, exif=b"Exif\0\0" + exif))
        whole_one = EncodedImage(encoded(image, kind))
        assert np.array_equal(pixels(broken, 16, 8), pixels(whole_one, 16, 8))

    @pytest.mark.filterwarnings("ignore")
    def test_exif_with_random_changes_never_costs_the_photo(self) -> None:
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
            for place in random.integers(6, len(block), random.integers(1, 6)):
                block[place] = random.integers(256)
            data = encoded(image, "JPEG", exif=bytes(block))
            decode_into(EncodedImage(data), whole(12, 12), out)

    def test_xmp_orientation_counts_where_there_is_no_exif(self) -> None:
        xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
        stored = np.asarray(photo(5, 3))
        data = encoded(Image.fromarray(stored), "WEBP", lossless=True, xmp=xmp)
        assert np.array_equal(pixels(EncodedImage(data), 3, 5), self.UPRIGHT[6](stored))


class TestColors:
    """Images come out looking like themselves; expected values are the ones they are made of."""

    RAMP = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    RGB = np.asarray(photo(24, 16, seed=1))

    @staticmethod
    def gray(levels: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.repeat(levels[:, :, None], 3, axis=2)

    @pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "PPM"])
    def test_bilevel(self, kind: str) -> None:
        dots = np.random.default_rng(0).integers(0, 2, (8, 16)).astype(bool)
        image = Image.fromarray(dots.astype(np.uint8) * 255).convert("1")
        out = pixels(EncodedImage(encoded(image, kind)), 16, 8)
        assert np.array_equal(out, self.gray(dots * 255))

    @pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "PPM"])
    def test_gray(self, kind: str) -> None:
        out = pixels(EncodedImage(encoded(Image.fromarray(self.RAMP), kind)), 256, 4)
        assert np.array_equal(out, self.gray(self.RAMP))

    @pytest.mark.parametrize("kind", ["PNG", "TIFF"])
    def test_gray_with_alpha_drops_the_alpha(self, kind: str) -> None:
        image = Image.merge("LA", [Image.fromarray(self.RAMP), Image.fromarray(self.RAMP[:, ::-1])])
        out = pixels(EncodedImage(encoded(image, kind)), 256, 4)
        assert np.array_equal(out, self.gray(self.RAMP))

    @pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
    def test_rgba_drops_the_alpha(self, kind: str) -> None:
        alpha = np.random.default_rng(0).integers(0, 256, (16, 24, 1), np.uint8)
        image = Image.fromarray(np.concatenate([self.RGB, alpha], axis=2))
        options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        out = pixels(EncodedImage(encoded(image, kind, **options)), 24, 16)
        assert np.array_equal(out, self.RGB)

    @pytest.mark.filterwarnings("ignore:Palette images with Transparency")
    @pytest.mark.parametrize(
        ("kind", "options"),
        [
            ("PNG", {}),
            ("GIF", {}),
            ("TIFF", {}),
            ("BMP", {}),
            ("PNG", {"transparency": 3}),
            ("GIF", {"transparency": 3}),
            ("PNG", {"transparency": bytes(range(0, 240, 30))}),  # an alpha for each color
        ],
    )
    def test_palette_with_and_without_transparency(self, kind: str, options: Any) -> None:
        palette = np.random.default_rng(2).integers(0, 256, (8, 3), np.uint8)
        index = np.random.default_rng(3).integers(0, 8, (16, 24), np.uint8)
        image = Image.fromarray(index, "L")
        image.putpalette(palette.tobytes())
        assert image.mode == "P"
        out = pixels(EncodedImage(encoded(image, kind, **options)), 24, 16)
        assert np.array_equal(out, palette[index])

    def test_transparent_pixels_are_resized_as_they_are_stored(self) -> None:
        # As after convert("RGB"): neither blended with a background nor weighed by alpha.
        rgba = np.dstack([self.RGB, np.zeros((16, 24), np.uint8)])
        out, expected = np.zeros((2, 8, 8, 3), np.uint8)
        preprocess = Preprocess((8, 8), "squash", (8, 8), "bicubic", MEAN, STD)
        decode_into(rgba, preprocess, out)
        decode_into(self.RGB, preprocess, expected)
        assert out.any()
        assert np.array_equal(out, expected)

    def test_cmyk_tiff(self) -> None:
        image = Image.fromarray(self.RGB).convert("CMYK")
        assert furthest(pixels(EncodedImage(encoded(image, "TIFF")), 24, 16), self.RGB) <= 1

    def test_cmyk_jpeg_is_not_inverted(self) -> None:
        image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan: red
        out = pixels(EncodedImage(encoded(image, "JPEG", quality=100)), 16, 16)
        assert furthest(out, np.broadcast_to((255, 0, 0), out.shape)) <= 3
        black = Image.new("CMYK", (16, 16), (0, 0, 0, 255))
        assert pixels(EncodedImage(encoded(black, "JPEG", quality=100)), 16, 16).max() <= 3

    def test_ycbcr(self) -> None:
        image = Image.fromarray(self.RGB).convert("YCbCr")
        assert furthest(pixels(image, 24, 16), self.RGB) <= 3
        assert (
            furthest(pixels(Image.new("YCbCr", (2, 2), (76, 85, 255)), 2, 2)[0, 0], (254, 0, 0))
            <= 2
        )

    def test_hsv(self) -> None:
        assert tuple(pixels(Image.new("HSV", (2, 2), (0, 255, 255)), 2, 2)[0, 0]) == (255, 0, 0)

    @pytest.mark.parametrize(
        ("lab", "rgb"),
        [  # L in 0..255, a and b around 0; CIE L*a*b* of the sRGB colors, white point D50
            ((255, 0, 0), (255, 255, 255)),
            ((0, 0, 0), (0, 0, 0)),
            ((137, 0, 0), (128, 128, 128)),
            ((129, 48, 37), (200, 80, 60)),
            ((142, -39, 23), (60, 150, 90)),
            ((103, 14, -51), (70, 90, 180)),
        ],
    )
    @pytest.mark.parametrize("as_file", [False, True])
    def test_lab(self, lab: tuple[int, int, int], rgb: tuple[int, int, int], as_file: bool) -> None:
        image = Image.frombytes("LAB", (4, 4), bytes(value % 256 for value in lab) * 16)
        source = EncodedImage(encoded(image, "TIFF")) if as_file else image
        out = pixels(source, 4, 4)
        # Whole levels of L*a*b* and the tables of the color engine are this coarse.
        assert furthest(out, np.broadcast_to(rgb, out.shape)) <= 6

    @pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
    def test_16_bit_gray_looks_like_8_bit_gray(self, kind: str) -> None:
        fine = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (4, 1))
        out = pixels(EncodedImage(encoded(Image.fromarray(fine), kind)), 256, 4)
        assert furthest(out, self.gray(self.RAMP)) <= 1

    @pytest.mark.parametrize("dtype", ["<u2", ">u2"])
    def test_16_bit_gray_in_either_byte_order(self, dtype: str) -> None:
        mode = "I;16" if dtype == "<u2" else "I;16B"
        fine = (self.RAMP.astype(np.uint16) * 257).astype(dtype)
        image = Image.frombytes(mode, (256, 4), fine.tobytes())
        assert furthest(pixels(image, 256, 4), self.gray(self.RAMP)) <= 1

    @pytest.mark.parametrize(("color_type", "channels"), [(2, 3), (4, 2), (6, 4)])
    def test_16_bit_png_of_every_color_type(self, color_type: int, channels: int) -> None:
        ramps = np.stack([self.RAMP, self.RAMP[:, ::-1], self.RAMP // 2, self.RAMP], axis=2)
        coarse = ramps[:, :, :channels]
        rows = (coarse.astype(np.uint16) * 257).astype(">u2")
        data = b"".join(b"\0" + row.tobytes() for row in rows)  # no filter
        file = png((256, 4), data, depth=16, color_type=color_type)
        expected = self.gray(self.RAMP) if channels == 2 else coarse[:, :, :3]
        assert furthest(pixels(EncodedImage(file), 256, 4), expected) <= 1

    @pytest.mark.parametrize("kind", ["TIFF", None])
    @pytest.mark.parametrize(
        ("values", "levels"),
        [
            (RAMP.astype(np.int32) * 257, RAMP),
            (RAMP.astype(np.float32) / 255, RAMP),
            (RAMP.astype(np.float32), RAMP),
            (RAMP.astype(np.float32) * 257, RAMP),
            (RAMP.astype(np.int32) - 128, RAMP),  # stretched from the least to the greatest
            (RAMP.astype(np.float32) * 1e6 - 5e7, RAMP),
            (np.zeros((4, 256), np.float32), RAMP * 0),
            (np.full((4, 256), -7, np.int32), RAMP * 0),
        ],
        ids=["16-bit", "to-1", "to-255", "to-65535", "signed", "any", "black", "constant"],
    )
    def test_32_bit_gray(self, values: npt.NDArray[Any], levels: Pixels, kind: str | None) -> None:
        image = Image.fromarray(values)
        assert image.mode == ("F" if values.dtype.kind == "f" else "I")
        source = EncodedImage(encoded(image, kind)) if kind else image
        assert furthest(pixels(source, 256, 4), self.gray(levels)) <= 1

    def test_not_a_number_is_black(self) -> None:
        values = self.RAMP.astype(np.float32)
        values[0, 10:13] = np.nan, np.inf, -np.inf
        levels = self.RAMP.copy()
        levels[0, 10:13] = 0
        assert np.array_equal(pixels(Image.fromarray(values), 256, 4), self.gray(levels))


class TestAnimation:
    COLORS = ((250, 10, 20), (10, 250, 20), (10, 20, 250))

    @pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
    def test_the_first_frame_counts(self, kind: str) -> None:
        first, *others = (Image.new("RGB", (16, 16), color) for color in self.COLORS)
        options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(first, kind, save_all=True, append_images=others, **options)
        with Image.open(io.BytesIO(data)) as image:
            assert getattr(image, "n_frames", 1) == 3
        out = pixels(EncodedImage(data), 16, 16)
        tolerance = 3 if kind == "MPO" else 0  # its frames are JPEG
        assert furthest(out, np.broadcast_to(self.COLORS[0], out.shape)) <= tolerance


class TestSources:
    """Where an image comes from makes no difference to its pixels."""

    RGB = np.asarray(photo(20, 12, seed=4))

    def test_gray_arrays(self) -> None:
        gray = self.RGB[:, :, 0]
        expected = np.repeat(gray[:, :, None], 3, axis=2)
        assert np.array_equal(pixels(gray, 20, 12), expected)
        assert np.array_equal(pixels(gray[:, :, None], 20, 12), expected)

    def test_color_arrays(self) -> None:
        assert np.array_equal(pixels(self.RGB, 20, 12), self.RGB)
        alpha = np.full((12, 20, 1), 9, np.uint8)
        assert np.array_equal(pixels(np.concatenate([self.RGB, alpha], 2), 20, 12), self.RGB)

    def test_arrays_of_any_memory_layout(self) -> None:
        assert np.array_equal(
            pixels(self.RGB[::-1, ::-1, ::-1], 20, 12), self.RGB[::-1, ::-1, ::-1]
        )
        channels_first = np.ascontiguousarray(self.RGB.transpose(2, 0, 1)).transpose(1, 2, 0)
        assert np.array_equal(pixels(channels_first, 20, 12), self.RGB)

    def test_an_array_is_left_as_it_was(self) -> None:
        array = self.RGB.copy()
        array.flags.writeable = False
        pixels(array, 20, 12)
        assert np.array_equal(array, self.RGB)

    @pytest.mark.parametrize(
        "array",
        [
            np.zeros((4, 4, 3), np.float32),
            np.zeros((4, 4, 3), np.int64),
            np.zeros((4, 4, 3), bool),
            np.zeros((4, 4, 2), np.uint8),
            np.zeros((3, 4, 4, 3), np.uint8),
            np.zeros((3, 4, 5), np.uint8),
            np.zeros(4, np.uint8),
            np.zeros((0, 4, 3), np.uint8),
            np.zeros((4, 0), np.uint8),
            np.zeros((), np.uint8),
        ],
        ids=lambda array: f"{array.dtype}-{array.shape}",
    )
    def test_other_arrays_are_refused(self, array: Any) -> None:
        with pytest.raises(DecodeError, match=r"expected .* got ") as caught:
            decode_into(array, whole(4, 4), np.zeros((4, 4, 3), np.uint8))
        assert caught.value.reason == "not-an-image"

    def test_every_source_of_one_image_gives_the_same_pixels(self, tmp_path: Path) -> None:
        data = encoded(Image.fromarray(self.RGB), "PNG")
        path = tmp_path / "a.png"
        path.write_bytes(data)
        opened = Image.open(io.BytesIO(data))  # not loaded yet
        for source in (path, str(path), os.fsencode(path), EncodedImage(data), opened, self.RGB):
            assert np.array_equal(pixels(source, 20, 12), self.RGB)

    def test_a_name_that_is_no_text_can_be_read(self, tmp_path: Path) -> None:
        path = os.fsencode(tmp_path) + b"/\xff\xfe \n.png"
        try:
            with open(path, "wb") as file:
                file.write(encoded(Image.fromarray(self.RGB), "PNG"))
        except OSError:
            pytest.skip("the file system takes only UTF-8 names")
        assert np.array_equal(pixels(path, 20, 12), self.RGB)
        assert np.array_equal(pixels(os.fsdecode(path), 20, 12), self.RGB)

    def test_the_content_and_not_the_ending_tells_the_format(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jpg"
        path.write_bytes(encoded(Image.fromarray(self.RGB), "PNG"))
        assert np.array_equal(pixels(path, 20, 12), self.RGB)

    def test_a_pil_image_stays_as_it_was_and_open(self) -> None:
        image = Image.fromarray(self.RGB).convert("L")
        image.getexif()[0x0112] = 6
        before = image.tobytes()
        assert pixels(image, 12, 20).any()  # turned
        assert (image.mode, image.size, image.tobytes()) == ("L", (20, 12), before)

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "GIF"])
    def test_large_files_are_read_piece_by_piece_to_the_same_end(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        path = tmp_path / "a"
        path.write_bytes(encoded(Image.fromarray(self.RGB), kind))
        expected = pixels(path, 20, 12)
        monkeypatch.setattr(files, "READ_WHOLE_BYTES", 0)
        assert np.array_equal(pixels(path, 20, 12), expected)

    def test_a_tall_view_of_a_batch_is_written_in_place(self) -> None:
        batch = np.full((3, 12, 20, 3), 7, np.uint8)
        decode_into(self.RGB, whole(20, 12), batch[1])
        assert np.array_equal(batch[1], self.RGB)
        assert (batch[[0, 2]] == 7).all()


class TestInfo:
    def test_a_path_gives_the_size_and_time_of_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "a.png"
        path.write_bytes(encoded(photo(30, 20), "PNG"))
        os.utime(path, ns=(1, 1_600_000_000_123_456_789))
        status = path.stat()
        out = np.zeros((8, 8, 3), np.uint8)
        info = decode_into(path, whole(8, 8), out)
        digest = hashlib.sha256(path.read_bytes()).digest()
        assert info == ImageInfo(status.st_size, status.st_mtime_ns, 30, 20, digest)

    def test_a_link_gives_those_of_the_file_that_it_leads_to(self, tmp_path: Path) -> None:
        path = tmp_path / "a.png"
        path.write_bytes(encoded(photo(30, 20), "PNG"))
        (tmp_path / "link.png").symlink_to(path)
        info = decode_into(tmp_path / "link.png", whole(8, 8), np.zeros((8, 8, 3), np.uint8))
        assert (info.size, info.mtime_ns) == (path.stat().st_size, path.stat().st_mtime_ns)

    def test_bytes_have_a_size_and_no_time(self) -> None:
        data = encoded(photo(30, 20), "PNG")
        info = decode_into(EncodedImage(data), whole(8, 8), np.zeros((8, 8, 3), np.uint8))
        assert info == ImageInfo(len(data), -1, 30, 20)

    def test_decoded_images_have_neither(self) -> None:
        for source in (photo(30, 20), np.asarray(photo(30, 20))):
            info = decode_into(source, whole(8, 8), np.zeros((8, 8, 3), np.uint8))
            assert info == ImageInfo(-1, -1, 30, 20)

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("kind", TestOrientation.KINDS)
    def test_width_and_height_are_those_of_the_upright_image(
        self, kind: str, orientation: int
    ) -> None:
        data = TestOrientation.turned(photo(30, 20), kind, orientation)
        info = decode_into(EncodedImage(data), whole(8, 8), np.zeros((8, 8, 3), np.uint8))
        assert (info.width, info.height) == ((30, 20) if orientation < 5 else (20, 30))


class TestPadding:
    @pytest.mark.parametrize("orientation", [1, 6])
    def test_nothing_of_the_last_picture_is_left(self, orientation: int) -> None:
        preprocess = Preprocess((40, 40), "contain", (40, 40), "bicubic", MEAN, STD, (12, 200, 77))
        data = TestOrientation.turned(Image.new("RGB", (80, 40), (1, 2, 3)), "PNG", orientation)
        out = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
        decode_into(EncodedImage(data), preprocess, out)
        expected = np.empty((40, 40, 3), np.uint8)
        expected[:] = (12, 200, 77)
        expected[10:30] = (1, 2, 3)
        assert np.array_equal(out, expected if orientation == 1 else expected.swapaxes(0, 1))


def png(size: tuple[int, int], rows: bytes, *, depth: int = 8, color_type: int = 2) -> bytes:
    """A PNG file of unfiltered rows."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">L", len(body)) + name + body + struct.pack(">L", zlib.crc32(name + body))
        )

    header = struct.pack(">LLBBBBB", *size, depth, color_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


class TestFailures:
    @pytest.mark.parametrize("share", [0.3, 0.5, 0.9, 0.99])
    @pytest.mark.parametrize("kind", ["JPEG", "PNG"])
    def test_a_cut_file_is_truncated(self, tmp_path: Path, kind: str, share: float) -> None:
        grain = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        data = encoded(Image.fromarray(grain), kind)
        path = tmp_path / "a"
        path.write_bytes(data[: int(len(data) * share)])
        assert reason(path) == "truncated"
        assert reason(EncodedImage(path.read_bytes())) == "truncated"

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
    def test_a_file_cut_anywhere_gives_an_error_and_no_half_picture(self, kind: str) -> None:
        grain = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
        data = encoded(Image.fromarray(grain), kind)
        for length in np.linspace(0, len(data) * 0.9, 40).astype(int):
            assert reason(EncodedImage(data[:length])) in {
                "empty",
                "not-an-image",
                "truncated",
                "corrupt",
            }

    @pytest.mark.parametrize(
        "content", [b"some text\n", b"<html>not found</html>", b"\0" * 100, b"x", b"\xff\xd8"]
    )
    def test_content_that_is_no_image_is_not_an_image(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "a.jpg"
        path.write_bytes(content)
        assert reason(path) == "not-an-image"
        assert reason(EncodedImage(content)) == "not-an-image"

    def test_the_message_shows_how_the_file_starts(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jpg"
        path.write_bytes(b"<html>not found</html>")
        with pytest.raises(DecodeError, match=r"no image format .* starts with b'<html>not"):
            decode_into(path, whole(8, 8), np.zeros((8, 8, 3), np.uint8))

    def test_no_bytes_are_empty(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jpg"
        path.touch()
        assert reason(path) == "empty"
        assert reason(EncodedImage(b"")) == "empty"

    def test_a_missing_file_is_unreadable(self, tmp_path: Path) -> None:
        for path in (tmp_path / "gone.jpg", str(tmp_path / "gone.jpg"), b"/no/such/file.jpg", ""):
            with pytest.raises(DecodeError, match="No such file or directory") as caught:
                decode_into(path, whole(8, 8), np.zeros((8, 8, 3), np.uint8))
            assert caught.value.reason == "unreadable"

    def test_links_without_an_end_are_unreadable(self, tmp_path: Path) -> None:
        (tmp_path / "a.jpg").symlink_to("a.jpg")
        (tmp_path / "b.jpg").symlink_to("gone.jpg")
        assert reason(tmp_path / "a.jpg") == "unreadable"
        assert reason(tmp_path / "b.jpg") == "unreadable"

    def test_a_path_that_leads_through_a_file_is_unreadable(self, tmp_path: Path) -> None:
        (tmp_path / "a.jpg").touch()
        assert reason(tmp_path / "a.jpg/b.jpg") == "unreadable"
        assert reason(tmp_path / ("a" * 300)) == "unreadable"

    def test_a_path_with_a_zero_byte_is_unreadable(self, tmp_path: Path) -> None:
        assert reason(os.fsencode(tmp_path) + b"/a\0.jpg") == "unreadable"

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_a_closed_file_is_unreadable(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jpg"
        path.write_bytes(encoded(photo(8, 8), "JPEG"))
        path.chmod(0)
        with pytest.raises(DecodeError, match="Permission denied") as caught:
            decode_into(path, whole(8, 8), np.zeros((8, 8, 3), np.uint8))
        assert caught.value.reason == "unreadable"

    @pytest.mark.usefixtures("promptly")
    def test_a_pipe_is_not_a_file(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "a.jpg")
        assert reason(tmp_path / "a.jpg") == "not-a-file"
        (tmp_path / "b.jpg").symlink_to("a.jpg")
        with pytest.raises(DecodeError, match="expected a regular file, got a pipe"):
            decode_into(tmp_path / "b.jpg", whole(8, 8), np.zeros((8, 8, 3), np.uint8))

    @pytest.mark.usefixtures("promptly")
    def test_a_device_is_not_a_file(self) -> None:
        with pytest.raises(DecodeError, match="expected a regular file, got a device") as caught:
            decode_into("/dev/null", whole(8, 8), np.zeros((8, 8, 3), np.uint8))
        assert caught.value.reason == "not-a-file"

    def test_a_folder_is_not_a_file(self, tmp_path: Path) -> None:
        with pytest.raises(DecodeError, match="expected a regular file, got a folder") as caught:
            decode_into(tmp_path, whole(8, 8), np.zeros((8, 8, 3), np.uint8))
        assert caught.value.reason == "not-a-file"

    @pytest.mark.usefixtures("promptly")
    def test_a_socket_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)  # names of sockets must be short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("a.jpg")
            assert reason("a.jpg") in {"not-a-file", "unreadable"}

    def test_eps_is_refused_and_no_process_is_started(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        started: list[object] = []

        def start(*args: object, **_: object) -> None:
            started.append(args)
            raise OSError("not started")

        monkeypatch.setattr(subprocess, "Popen", start)
        monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
        data = encoded(photo(16, 16), "EPS")
        with Image.open(io.BytesIO(data)) as image, pytest.raises(OSError, match="not started"):
            image.load()  # this is what Pillow would do
        assert started
        started.clear()
        for name in ("a.eps", "a.jpg"):
            (tmp_path / name).write_bytes(data)
            assert reason(tmp_path / name) == "not-an-image"
        assert reason(EncodedImage(data)) == "not-an-image"
        assert not started

    @pytest.mark.filterwarnings("ignore")
    def test_an_image_of_too_many_pixels_is_too_large(self) -> None:
        assert reason(EncodedImage(png((60_000, 60_000), b""))) == "too-large"

    def test_memory_that_runs_out_is_told_apart(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object, **__: object) -> None:
            raise MemoryError

        image = photo(9, 9)
        monkeypatch.setattr("extractor.images.resize.resize", full)
        assert reason(image) == "out-of-memory"

    def test_an_error_of_the_disk_is_unreadable(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Failing(io.FileIO):
            def read(self, *_: object) -> bytes:
                raise OSError(5, "Input/output error")

        path = tmp_path / "a.jpg"
        path.write_bytes(encoded(photo(8, 8), "JPEG"))
        monkeypatch.setattr(os, "fdopen", lambda descriptor, mode: Failing(descriptor, mode))
        with pytest.raises(DecodeError, match="Input/output error") as caught:
            decode_into(path, whole(8, 8), np.zeros((8, 8, 3), np.uint8))
        assert caught.value.reason == "unreadable"

    @pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no list of open files")
    def test_no_file_stays_open(self, tmp_path: Path) -> None:
        good, bad, cut = (tmp_path / name for name in ("good", "bad", "cut"))
        data = encoded(photo(40, 40), "JPEG")
        good.write_bytes(data)
        bad.write_bytes(b"text")
        cut.write_bytes(data[: len(data) // 2])
        out = np.zeros((8, 8, 3), np.uint8)
        before = os.listdir("/proc/self/fd")
        caught = []  # an error that is kept must not keep its file
        for path in (good, bad, cut, tmp_path):
            try:
                decode_into(path, whole(8, 8), out)
            except DecodeError as error:
                caught.append(error)
        assert len(caught) == 3
        assert len(os.listdir("/proc/self/fd")) == len(before)

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
    def test_random_changes_raise_nothing_but_decode_errors(
        self, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500_000)  # broken sizes cost no time
        good = encoded(photo(24, 17), kind)
        random = np.random.default_rng(0)
        out = np.zeros((8, 8, 3), np.uint8)
        errors = []
        for _ in range(120):
            data = bytearray(good)
            # Half of the changes go to the head, where sizes and offsets are.
            head = int(random.choice([min(64, len(data)), len(data)]))
            for place in random.integers(0, head, random.integers(1, 5)):
                data[place] = random.integers(256)
            if random.random() < 0.2:
                del data[random.integers(len(data)) :]
            try:
                decode_into(EncodedImage(bytes(data)), whole(8, 8), out)
            except DecodeError as error:
                errors.append(error)
        assert len(errors) > 10  # else the changes were too kind to show anything
        assert all(error.reason and str(error) for error in errors)


class TestFormats:
    def test_common_endings_are_readable(self) -> None:
        common = {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".mpo", ".ppm"}
        assert common <= readable_suffixes()

    def test_endings_of_formats_that_are_not_decoded_are_not(self) -> None:
        refused = {".eps", ".ps", ".wmf", ".emf", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".pdf"}
        assert not refused & readable_suffixes()

    def test_endings_are_in_lower_case_with_a_dot(self) -> None:
        assert all(
            suffix == suffix.lower() and suffix.startswith(".") for suffix in readable_suffixes()
        )

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO"])
    def test_images_look_like_images_whatever_their_name(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "a.txt"
        path.write_bytes(encoded(photo(16, 16), kind))
        assert looks_like_image(os.fsencode(path))

    def test_what_can_be_written_can_be_read(self) -> None:
        kinds = ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA", "JPEG2000"]
        kinds += ["AVIF"] if features.check("avif") else []
        image = Image.new("RGB", (16, 16), (200, 30, 40))
        for kind in kinds:
            out = pixels(EncodedImage(encoded(image, kind)), 16, 16)
            assert furthest(out, np.broadcast_to((200, 30, 40), out.shape)) <= 4, kind

    @pytest.mark.usefixtures("promptly")
    def test_other_things_do_not_look_like_images(self, tmp_path: Path) -> None:
        (tmp_path / "text.jpg").write_text("text")
        (tmp_path / "empty.jpg").touch()
        (tmp_path / "a.eps").write_bytes(encoded(photo(16, 16), "EPS"))
        os.mkfifo(tmp_path / "pipe.jpg")
        for name in ("text.jpg", "empty.jpg", "a.eps", "pipe.jpg", "gone.jpg", "."):
            assert not looks_like_image(os.fsencode(tmp_path / name)), name


class TestCallers:
    @pytest.mark.parametrize("shape", [(5, 5, 3), (8, 6), (6, 8, 3), (8, 6, 4)])
    def test_a_place_of_the_wrong_shape_is_the_callers_mistake(
        self, shape: tuple[int, ...]
    ) -> None:
        preprocess = Preprocess((8, 6), "squash", (8, 6), "box", (0, 0, 0), (1, 1, 1))
        with pytest.raises(ValueError, match=r"out: got uint8 .* expected uint8 \(8, 6, 3\)"):
            decode_into(np.zeros((4, 4), np.uint8), preprocess, np.zeros(shape, np.uint8))

    def test_what_is_no_source_is_the_callers_mistake(self) -> None:
        preprocess = Preprocess((8, 6), "squash", (8, 6), "box", (0, 0, 0), (1, 1, 1))
        with pytest.raises(TypeError, match="source: got NoneType"):
            decode_into(None, preprocess, np.zeros((8, 6, 3), np.uint8))  # type: ignore[arg-type]
