"""Every color mode becomes RGB that looks like the image."""

from __future__ import annotations

import io
import struct
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from support.images import (
    MEAN,
    STD,
    Pixels,
    decode_into,
    encoded,
    furthest,
    photo,
    pixels,
    png,
    unresized,
)

from extractor.images import decode
from extractor.images.color import to_rgb
from extractor.images.types import EncodedImage
from extractor.preprocess import GrayBits, Preprocess

# A pixel of every mode of Pillow, and the color that it stands for.
MODES: dict[str, tuple[Any, tuple[int, int, int]]] = {
    "1": (255, (255, 255, 255)),
    "L": (90, (90, 90, 90)),
    "P": (7, (21, 22, 23)),  # three colors per index, see below
    "RGB": ((200, 100, 40), (200, 100, 40)),
    "RGBA": ((200, 100, 40, 128), (200, 100, 40)),
    "RGBX": ((200, 100, 40, 128), (200, 100, 40)),
    "RGBa": ((100, 50, 20, 128), (199, 99, 39)),  # 100 * 255 // 128
    "LA": ((90, 51), (90, 90, 90)),
    "La": ((18, 51), (90, 90, 90)),  # 18 * 255 / 51
    "PA": ((7, 51), (21, 22, 23)),
    "CMYK": ((0, 51, 102, 0), (255, 204, 153)),  # 255 - ink, without black
    "YCbCr": ((90, 128, 128), (90, 90, 90)),
    "HSV": ((0, 255, 200), (200, 0, 0)),  # fully saturated red
    "LAB": ((255, 128, 128), (255, 255, 255)),  # the lightest color without a hue
    "I;16": (90 * 256 + 255, (90, 90, 90)),
    "I;16L": (90 * 256 + 255, (90, 90, 90)),
    "I;16B": (90 * 256 + 255, (90, 90, 90)),
    "I;16N": (90 * 256 + 255, (90, 90, 90)),
    "I": (90 * 256, (90, 90, 90)),
    "F": (90.0, (90, 90, 90)),
}


@pytest.mark.parametrize("mode", MODES)
def test_pixel_of_every_mode_has_its_color(mode: str) -> None:
    value, expected = MODES[mode]
    image = Image.new(mode, (3, 2), value)
    if mode in ("P", "PA"):
        image.putpalette(bytes(range(240)))
    rgb = to_rgb(image)
    assert (rgb.mode, rgb.size) == ("RGB", (3, 2))
    # LAB goes through two color profiles, which round.
    tolerance = 1 if mode == "LAB" else 0
    assert furthest(np.asarray(rgb), np.broadcast_to(expected, (2, 3, 3))) <= tolerance


def test_every_mode_of_pillow_has_a_test() -> None:
    assert set(Image.MODES) <= set(MODES)


@pytest.mark.parametrize("alpha", [0, 1, 100, 255])
def test_premultiplied_gray_is_the_gray_it_was_made_of(alpha: int) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    straight = Image.merge("LA", [Image.fromarray(levels), Image.new("L", (16, 16), alpha)])
    rgb = np.asarray(to_rgb(straight.convert("La")))
    # A level loses the precision that the multiplication rounds away.
    assert furthest(rgb[..., 0], levels if alpha else 0) <= (127.5 / alpha + 1 if alpha else 0)


def test_opaque_tiff_of_premultiplied_gray_equals_the_gray_image() -> None:
    gray = photo(24, 16).convert("L")
    data = encoded(gray.convert("LA"), "TIFF")
    extra_samples = [struct.pack("<HHIH", 338, 3, 1, kind) for kind in (2, 1)]
    assert data.count(extra_samples[0]) == 1
    data = data.replace(*extra_samples)
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "La"
    expected = np.repeat(np.asarray(gray)[:, :, None], 3, axis=2)
    assert np.array_equal(pixels(EncodedImage(data), 24, 16), expected)


class TestColors:
    """Colors survive every mode and format. Expected values are those the image was made of."""

    RAMP = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    RGB = np.asarray(photo(24, 16, seed=1))

    @staticmethod
    def gray(levels: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.repeat(levels[:, :, None], 3, axis=2)

    @pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "PPM"])
    def test_bilevel_images_are_black_and_white(self, kind: str) -> None:
        dots = np.random.default_rng(0).integers(0, 2, (8, 16)).astype(bool)
        image = Image.fromarray(dots.astype(np.uint8) * 255).convert("1")
        out = pixels(EncodedImage(encoded(image, kind)), 16, 8)
        assert np.array_equal(out, self.gray(dots * 255))

    @pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "PPM"])
    def test_gray_levels_are_kept(self, kind: str) -> None:
        out = pixels(EncodedImage(encoded(Image.fromarray(self.RAMP), kind)), 256, 4)
        assert np.array_equal(out, self.gray(self.RAMP))

    @pytest.mark.parametrize("kind", ["PNG", "TIFF"])
    def test_alpha_of_gray_images_is_dropped(self, kind: str) -> None:
        image = Image.merge("LA", [Image.fromarray(self.RAMP), Image.fromarray(self.RAMP[:, ::-1])])
        out = pixels(EncodedImage(encoded(image, kind)), 256, 4)
        assert np.array_equal(out, self.gray(self.RAMP))

    @pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
    def test_alpha_of_color_images_is_dropped(self, kind: str) -> None:
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
    def test_palettes_are_resolved_with_and_without_transparency(
        self, kind: str, options: Any
    ) -> None:
        palette = np.random.default_rng(2).integers(0, 256, (8, 3), np.uint8)
        index = np.random.default_rng(3).integers(0, 8, (16, 24), np.uint8)
        image = Image.fromarray(index, "L")
        image.putpalette(palette.tobytes())
        assert image.mode == "P"
        out = pixels(EncodedImage(encoded(image, kind, **options)), 24, 16)
        assert np.array_equal(out, palette[index])

    def test_transparent_pixels_are_resized_as_stored(self) -> None:
        # As after convert("RGB"): neither blended with a background nor weighed by alpha.
        rgba = np.dstack([self.RGB, np.zeros((16, 24), np.uint8)])
        out, expected = np.zeros((2, 8, 8, 3), np.uint8)
        preprocess = Preprocess((8, 8), "squash", (8, 8), "bicubic", MEAN, STD)
        decode_into(rgba, preprocess, out)
        decode_into(self.RGB, preprocess, expected)
        assert out.any()
        assert np.array_equal(out, expected)

    def test_cmyk_tiff_keeps_its_colors(self) -> None:
        image = Image.fromarray(self.RGB).convert("CMYK")
        assert furthest(pixels(EncodedImage(encoded(image, "TIFF")), 24, 16), self.RGB) <= 1

    def test_cmyk_jpeg_is_not_inverted(self) -> None:
        image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan: red
        out = pixels(EncodedImage(encoded(image, "JPEG", quality=100)), 16, 16)
        assert furthest(out, np.broadcast_to((255, 0, 0), out.shape)) <= 3
        black = Image.new("CMYK", (16, 16), (0, 0, 0, 255))
        assert pixels(EncodedImage(encoded(black, "JPEG", quality=100)), 16, 16).max() <= 3

    def test_ycbcr_is_converted(self) -> None:
        image = Image.fromarray(self.RGB).convert("YCbCr")
        assert furthest(pixels(image, 24, 16), self.RGB) <= 3
        assert (
            furthest(pixels(Image.new("YCbCr", (2, 2), (76, 85, 255)), 2, 2)[0, 0], (254, 0, 0))
            <= 2
        )

    def test_hsv_is_converted(self) -> None:
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
    def test_lab_is_converted_to_srgb(
        self, lab: tuple[int, int, int], rgb: tuple[int, int, int], as_file: bool
    ) -> None:
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
    def test_16_bit_gray_ignores_byte_order(self, dtype: str) -> None:
        mode = "I;16" if dtype == "<u2" else "I;16B"
        fine = (self.RAMP.astype(np.uint16) * 257).astype(dtype)
        image = Image.frombytes(mode, (256, 4), fine.tobytes())
        assert furthest(pixels(image, 256, 4), self.gray(self.RAMP)) <= 1

    @pytest.mark.parametrize(("color_type", "channels"), [(2, 3), (4, 2), (6, 4)])
    def test_16_bit_png_of_every_color_type_looks_like_8_bit(
        self, color_type: int, channels: int
    ) -> None:
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
    def test_32_bit_gray_is_scaled_by_its_range(
        self, values: npt.NDArray[Any], levels: Pixels, kind: str | None
    ) -> None:
        image = Image.fromarray(values)
        assert image.mode == ("F" if values.dtype.kind == "f" else "I")
        source = EncodedImage(encoded(image, kind)) if kind else image
        assert furthest(pixels(source, 256, 4), self.gray(levels)) <= 1

    @pytest.mark.parametrize("bits", range(8, 17))
    @pytest.mark.parametrize("kind", ["PNG", "TIFF", None])
    def test_gray_bits_equal_the_values_shifted_to_16_bits(self, bits: int, kind: str) -> None:
        values = np.random.default_rng(bits).integers(0, 2**bits, (4, 256)).astype(np.uint16)
        low, high = Image.fromarray(values), Image.fromarray(values << (16 - bits))
        source = EncodedImage(encoded(low, kind)) if kind else low
        assert np.array_equal(pixels(source, 256, 4, gray_bits=bits), pixels(high, 256, 4))

    @pytest.mark.parametrize("dtype", ["<u2", ">u2", "i4", "f4"])
    @pytest.mark.parametrize("bits", [10, 12])
    def test_gray_bits_hold_for_every_type_of_values(self, dtype: str, bits: int) -> None:
        # Eight bits spread over all of the range, and values beyond it.
        levels = self.RAMP.astype(np.int64)
        values = (levels << (bits - 8)) + (levels >> (16 - bits))
        values[0, :3] = 2**bits, 2**15, 2**16 - 1
        expected = self.RAMP.copy()
        expected[0, :3] = 255
        mode = {"<u2": "I;16", ">u2": "I;16B", "i4": "I", "f4": "F"}[dtype]
        image = Image.frombytes(mode, (256, 4), values.astype(dtype).tobytes())
        assert np.array_equal(pixels(image, 256, 4, gray_bits=bits), self.gray(expected))

    @pytest.mark.parametrize("mode", ["I;16", "I", "F"])
    @pytest.mark.parametrize(("factor", "lowest"), [(1, 0), (3, 1000), (257, 0)])
    def test_minmax_stretches_each_image(self, mode: str, factor: int, lowest: int) -> None:
        values = self.RAMP.astype(np.int64) * factor + lowest
        dtype = {"I;16": "<u2", "I": "i4", "F": "f4"}[mode]
        image = Image.frombytes(mode, (256, 4), values.astype(dtype).tobytes())
        assert np.array_equal(pixels(image, 256, 4, gray_bits="minmax"), self.gray(self.RAMP))

    def test_minmax_ignores_values_that_are_not_finite(self) -> None:
        values = self.RAMP.astype(np.float32) * 3 + 1000
        values[0, 10:13] = np.nan, np.inf, -np.inf
        levels = self.RAMP.copy()
        levels[0, 10:13] = 0, 255, 0
        out = pixels(Image.fromarray(values), 256, 4, gray_bits="minmax")
        assert np.array_equal(out, self.gray(levels))

    @pytest.mark.parametrize("value", [0, 7, 65535])
    def test_minmax_makes_a_constant_image_black(self, value: int) -> None:
        image = Image.fromarray(np.full((4, 4), value, np.uint16))
        assert not pixels(image, 4, 4, gray_bits="minmax").any()

    @pytest.mark.parametrize("bits", [12, "minmax"])
    def test_gray_bits_leave_8_bit_images_and_unit_floats_alone(self, bits: GrayBits) -> None:
        dark = self.RAMP // 4
        unit = self.RAMP.astype(np.float32) / 255
        assert np.array_equal(
            pixels(Image.fromarray(dark), 256, 4, gray_bits=bits), self.gray(dark)
        )
        assert np.array_equal(
            pixels(Image.fromarray(self.RGB // 4), 24, 16, gray_bits=bits), self.RGB // 4
        )
        out = pixels(Image.fromarray(unit), 256, 4, gray_bits=bits)
        assert furthest(out, self.gray(self.RAMP)) <= 1

    def test_tiff_of_12_bits_is_scaled_from_them(self) -> None:
        # 256 values of 12 bits, two in three bytes, in a TIFF without compression.
        values = self.RAMP[0].astype(np.int64) * 16
        pairs = (values[::2] << 12) + values[1::2]
        data = b"".join(int(pair).to_bytes(3, "big") for pair in pairs)
        fields = {256: 256, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: len(data)}
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, v) for tag, v in fields.items())
        folder = struct.pack("<H", len(fields)) + entries + bytes(4)
        file = b"II*\0" + struct.pack("<I", 8 + len(data)) + data + folder
        assert np.array_equal(pixels(EncodedImage(file), 256, 1), self.gray(self.RAMP[:1]))
        out = pixels(EncodedImage(file), 256, 1, gray_bits=13)
        assert np.array_equal(out, self.gray(self.RAMP[:1] // 2))

    def test_pictures_of_several_gray_bits_are_made_together(self) -> None:
        image = Image.fromarray(self.RAMP.astype(np.uint16) * 16)
        plain = unresized(256, 4)
        wide, narrow = np.zeros((2, 4, 256, 3), np.uint8)
        decode.decode_into(image, [plain, replace(plain, gray_bits=12)], [wide, narrow])
        assert np.array_equal(wide, self.gray(self.RAMP // 16))
        assert np.array_equal(narrow, self.gray(self.RAMP))

    def test_nan_and_infinity_are_black(self) -> None:
        values = self.RAMP.astype(np.float32)
        values[0, 10:13] = np.nan, np.inf, -np.inf
        levels = self.RAMP.copy()
        levels[0, 10:13] = 0
        assert np.array_equal(pixels(Image.fromarray(values), 256, 4), self.gray(levels))
