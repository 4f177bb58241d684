"""HEIC, JPEG XL and camera raw are decoded by the extras, as the images they were made of."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from support.images import encoded, furthest, photo, pixels, reason, unresized
from support.tiffs import LONG, dng

from extractor.errors import DecodeError
from extractor.images import decode, files, plugins
from extractor.images.budget import PixelBudget
from extractor.images.containers.kinds import HEIF, JXL, RAW
from extractor.images.formats import has_decoder, looks_like_image
from extractor.images.types import EncodedImage
from extractor.loading.subprocess_decode import decode_apart

IMAGE = photo(64, 48, seed=5)
QUADRANTS = Image.new("RGB", (64, 32))
for box, color in (
    ((0, 0, 32, 16), (255, 0, 0)),
    ((32, 0, 64, 16), (0, 255, 0)),
    ((0, 16, 32, 32), (0, 0, 255)),
):
    QUADRANTS.paste(color, box)

ANIMATION = (
    "ff0a03054d0020260804010060004b188b1500d413638c3331ce014481f94580272d4e8c3e54080401006000"
    "4b188b1500d413638c3331ce011c81f945804330ae84c543080405006c004b188b1500d41963c68913e700a2"
    "e00c2a05b4f302341830405a08"
)

# The upright picture of an image that is stored with an EXIF orientation (CIPA DC-008).
TURNS: dict[int, Any] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


def exif_with(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def without_box(content: bytes, kind: bytes) -> bytes:
    """Return a file of boxes without those of one kind."""
    kept, offset = b"", 0
    while offset < len(content):
        length = int.from_bytes(content[offset : offset + 4], "big") or len(content) - offset
        if content[offset + 4 : offset + 8] != kind:
            kept += content[offset : offset + length]
        offset += length
    return kept


def limited(source: EncodedImage, max_pixels: int) -> None:
    out = np.zeros((8, 8, 3), np.uint8)
    decode.decode_into(source, [unresized(8, 8)], [out], PixelBudget(max_pixels))


class TestHeic:
    """The primary image, turned once."""

    @pytest.fixture(autouse=True)
    def plugin(self) -> None:
        self.library: Any = pytest.importorskip("pillow_heif")

    def heic(self, *images: Image.Image, **options: Any) -> bytes:
        file = self.library.HeifFile()
        for image in images:
            file.add_from_pillow(image)
        content = io.BytesIO()
        file.save(content, quality=-1, chroma=444, **options)
        return content.getvalue()

    def test_picture_is_the_image(self) -> None:
        out = pixels(EncodedImage(self.heic(IMAGE)), 64, 48)
        assert np.abs(out.astype(int) - np.asarray(IMAGE)).mean() < 1

    @pytest.mark.parametrize("orientation", TURNS)
    def test_orientation_is_applied_once(self, orientation: int) -> None:
        data = self.heic(QUADRANTS, exif=exif_with(orientation))
        expected = TURNS[orientation](np.asarray(QUADRANTS))
        assert (b"irot" in data or b"imir" in data) == (orientation > 1)
        out = pixels(EncodedImage(data), expected.shape[1], expected.shape[0])
        assert furthest(out, expected) <= 4

    def test_primary_image_of_several_is_taken(self) -> None:
        other = photo(32, 16, seed=9)
        for primary in (0, 1):
            data = self.heic(other, QUADRANTS, primary_index=primary)
            size = (64, 32) if primary else (32, 16)
            expected = QUADRANTS if primary else other
            assert furthest(pixels(EncodedImage(data), *size), np.asarray(expected)) <= 4

    @pytest.mark.parametrize("bits", [10, 12])
    def test_more_bits_become_eight(self, bits: int) -> None:
        ramp = np.linspace(0, 65535, 64, dtype=np.uint16)
        levels = np.tile(ramp[None, :, None], (48, 1, 3))
        file = self.library.from_bytes("RGB;16", (64, 48), levels.tobytes())
        content = io.BytesIO()
        self.library.options.SAVE_HDR_TO_12_BIT = bits == 12
        file.save(content, quality=-1, chroma=444)
        self.library.options.SAVE_HDR_TO_12_BIT = False
        assert furthest(pixels(EncodedImage(content.getvalue()), 64, 48), levels >> 8) <= 3

    def test_alpha_is_dropped(self) -> None:
        alpha = Image.linear_gradient("L").resize((64, 48))
        image = IMAGE.copy()
        image.putalpha(alpha)
        out = pixels(EncodedImage(self.heic(image)), 64, 48)
        assert np.abs(out.astype(int) - np.asarray(IMAGE)).mean() < 1

    def test_gray_is_gray(self) -> None:
        gray = IMAGE.convert("L")
        out = pixels(EncodedImage(self.heic(gray)), 64, 48)
        assert furthest(out, np.repeat(np.asarray(gray)[..., None], 3, axis=2)) <= 3

    def test_wrong_suffix_does_not_matter(self, tmp_path: Path) -> None:
        (tmp_path / "a.jpg").write_bytes(self.heic(QUADRANTS))
        (tmp_path / "b.HEIC").write_bytes(encoded(QUADRANTS, "JPEG", quality=100, subsampling=0))
        (tmp_path / "c").write_bytes(self.heic(QUADRANTS))
        for name in ("a.jpg", "b.HEIC", "c"):
            out = pixels(tmp_path / name, 64, 32)
            assert np.abs(out.astype(int) - np.asarray(QUADRANTS)).mean() < 2
        assert looks_like_image(os.fsencode(tmp_path / "c"))
        assert has_decoder(tmp_path / "a.jpg")

    def test_large_file_is_decoded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(files, "READ_WHOLE_BYTES", 100)
        (tmp_path / "a.heic").write_bytes(self.heic(QUADRANTS))
        assert furthest(pixels(tmp_path / "a.heic", 64, 32), np.asarray(QUADRANTS)) <= 4

    def test_image_beyond_the_pixel_limit_is_not_decoded(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = EncodedImage(self.heic(IMAGE))
        limited(source, 64 * 48)
        monkeypatch.setattr(self.library.HeifImageFile, "load", lambda self: pytest.fail("decoded"))
        with pytest.raises(DecodeError, match="64 x 48") as caught:
            limited(source, 64 * 48 - 1)
        assert caught.value.reason == "too-large"

    def test_cut_or_damaged_file_is_a_failure(self) -> None:
        data = self.heic(photo(300, 200))
        for end in (len(data) // 4, len(data) // 2, len(data) - 100):
            assert reason(EncodedImage(data[:end])) in ("truncated", "corrupt")
        assert reason(EncodedImage(data[:300] + bytes(2000))) in ("truncated", "corrupt")

    def test_cut_grid_of_tiles_is_truncated(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Phones write tiles. libheif leaves those gray that it does not find.
        monkeypatch.setattr(self.library.options, "GRID_TILE_SIZE", 128)
        image = photo(300, 200)
        data = self.heic(image)
        assert b"grid" in data
        for whole in (data, data + b"rubbish behind the file" * 9, data + bytes(3)):
            out = pixels(EncodedImage(whole), 300, 200)
            assert np.abs(out.astype(int) - np.asarray(image)).mean() < 1
        start = data.index(b"mdat") - 4
        ends = [start, start + 4, start + 8, *range(start + 9, len(data), 997), len(data) - 1]
        for end in ends:
            assert reason(EncodedImage(data[:end])) == "truncated"

    def test_data_to_the_end_of_the_file_is_complete(self) -> None:
        data = bytearray(self.heic(QUADRANTS))
        start = data.index(b"mdat") - 4
        assert start + int.from_bytes(data[start : start + 4], "big") == len(data)
        data[start : start + 4] = bytes(4)
        assert furthest(pixels(EncodedImage(bytes(data)), 64, 32), np.asarray(QUADRANTS)) <= 4

    def test_child_process_gives_the_same_picture(self, tmp_path: Path) -> None:
        path = tmp_path / "a.heic"
        path.write_bytes(self.heic(IMAGE, exif=exif_with(6)))
        out = np.zeros((64, 48, 3), np.uint8)
        decode_apart(
            os.fsencode(path), [unresized(48, 64)], [out], max_pixels=10**6, timeout_seconds=60
        )
        assert np.array_equal(out, pixels(path, 48, 64))


class TestJxl:
    """The picture of a JPEG XL file."""

    @pytest.fixture(autouse=True)
    def plugin(self) -> None:
        self.library: Any = pytest.importorskip("pillow_jxl")

    @pytest.mark.parametrize("use_container", [False, True])
    @pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
    def test_picture_is_the_image(self, mode: str, use_container: bool) -> None:
        image = IMAGE.convert(mode)
        data = encoded(image, "JXL", lossless=True, use_container=use_container)
        expected = np.asarray(image.convert("RGB"))
        assert np.array_equal(pixels(EncodedImage(data), 64, 48), expected)

    def test_sixteen_bit_gray_keeps_its_high_byte(self) -> None:
        levels = np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) * 21
        data = encoded(Image.fromarray(levels), "JXL", lossless=True)
        expected = np.repeat((levels >> 8)[..., None], 3, axis=2)
        assert furthest(pixels(EncodedImage(data), 64, 48), expected) <= 1

    def test_exif_orientation_is_ignored(self) -> None:
        # ISO/IEC 18181-2: the orientation of the codestream counts, which is 1 here.
        data = encoded(QUADRANTS, "JXL", lossless=True, exif=exif_with(6), use_container=True)
        assert np.array_equal(pixels(EncodedImage(data), 64, 32), np.asarray(QUADRANTS))

    def test_animation_is_refused(self) -> None:
        # Three frames of 24 x 16 pixels, made with libjxl: red, green, blue.
        data = bytes.fromhex(ANIMATION)
        header = plugins._JxlHeader(data)
        assert (header.size, header.is_animated) == ((24, 16), True)
        assert reason(EncodedImage(data)) == "unsupported"

    @pytest.mark.filterwarnings("ignore:Using JPEG reconstruction")
    @pytest.mark.parametrize("orientation", TURNS)
    def test_orientation_of_the_codestream_is_applied_once(
        self, tmp_path: Path, orientation: int
    ) -> None:
        path = tmp_path / "a.jpg"
        path.write_bytes(encoded(QUADRANTS, "JPEG", quality=95, exif=exif_with(orientation)))
        with Image.open(path) as image:
            data = encoded(image, "JXL", lossless_jpeg=True)
        without = without_box(data, b"jbrd")  # what restores the JPEG
        assert len(without) < len(data)
        expected = TURNS[orientation](np.asarray(QUADRANTS))
        out = pixels(EncodedImage(without), expected.shape[1], expected.shape[0])
        assert np.abs(out.astype(int) - expected).mean() < 4

    @pytest.mark.filterwarnings("ignore:Using JPEG reconstruction")
    @pytest.mark.parametrize("orientation", [1, 6])
    def test_jpeg_inside_gives_the_picture_of_the_jpeg(
        self, tmp_path: Path, orientation: int
    ) -> None:
        path = tmp_path / "a.jpg"
        path.write_bytes(encoded(QUADRANTS, "JPEG", quality=95, exif=exif_with(orientation)))
        size = (64, 32) if orientation == 1 else (32, 64)
        with Image.open(path) as image:
            data = encoded(image, "JXL", lossless_jpeg=True)
        assert np.array_equal(pixels(EncodedImage(data), *size), pixels(path, *size))

    @pytest.mark.parametrize(
        "size",
        [(8, 8), (256, 256), (120, 100), (133, 100), (65, 63), (3, 700), (1000, 750), (1, 1)],
    )
    @pytest.mark.parametrize("use_container", [False, True])
    def test_size_is_known_before_decoding(
        self, size: tuple[int, int], use_container: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = encoded(Image.new("RGB", size), "JXL", effort=1, use_container=use_container)
        header = plugins._JxlHeader(data)
        assert (header.size, header.is_animated) == (size, False)
        monkeypatch.setattr(self.library, "Decoder", lambda **options: pytest.fail("decoded"))
        with pytest.raises(DecodeError, match=f"{size[0]} x {size[1]}") as caught:
            limited(EncodedImage(data), size[0] * size[1] - 1)
        assert caught.value.reason == "too-large"

    def test_cut_or_damaged_file_is_a_failure(self) -> None:
        data = encoded(photo(300, 200), "JXL")
        for end in (2, 5, len(data) // 4, len(data) // 2, len(data) - 20):
            assert reason(EncodedImage(data[:end])) in ("truncated", "corrupt")
        boxes = bytes.fromhex("0000000c4a584c200d0a870a")
        for rest in (b"", bytes(100), struct.pack(">I4s", 8, b"free") * 2000):
            assert reason(EncodedImage(boxes + rest)) in ("truncated", "corrupt")

    @pytest.mark.slow
    def test_child_process_gives_the_same_picture(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jxl"
        path.write_bytes(encoded(IMAGE, "JXL"))
        out = np.zeros((48, 64, 3), np.uint8)
        decode_apart(
            os.fsencode(path), [unresized(64, 48)], [out], max_pixels=10**6, timeout_seconds=60
        )
        assert np.array_equal(out, pixels(path, 64, 48))


class TestRaw:
    """The full picture of a raw file, at the white balance of the camera."""

    @pytest.fixture(autouse=True)
    def plugin(self) -> None:
        self.library: Any = pytest.importorskip("rawpy")

    # Linear values of four quadrants: red, green, blue and gray.
    LEVELS = np.zeros((64, 96, 3))
    LEVELS[:32, :48] = 60000, 500, 500
    LEVELS[:32, 48:] = 500, 60000, 500
    LEVELS[32:, :48] = 500, 500, 60000
    LEVELS[32:, 48:] = 30000
    PREVIEW = Image.new("RGB", (16, 12), (1, 2, 3))

    @staticmethod
    def quadrants(picture: npt.NDArray[np.uint8]) -> list[list[int]]:
        """Return the colors of the four quadrants, row by row."""
        rows, columns = (slice(length // 4, None, length // 2) for length in picture.shape[:2])
        return picture[rows, columns].reshape(4, 3).tolist()

    @pytest.mark.parametrize("with_preview", [True, False])
    def test_picture_is_the_raw_image(self, with_preview: bool) -> None:
        data = dng(self.LEVELS, self.PREVIEW if with_preview else None)
        red, green, blue, gray = self.quadrants(pixels(EncodedImage(data), 96, 64))
        assert red[0] == green[1] == blue[2] == 255
        assert max(*red[1:], green[0], green[2], *blue[:2]) < 20
        assert max(gray) - min(gray) <= 2
        assert 160 < gray[0] < 200  # 172 by the curve of BT.709, which LibRaw brightens a little

    @pytest.mark.parametrize("orientation", [1, 3, 6, 8])
    def test_orientation_is_applied_once(self, orientation: int) -> None:
        upright = TURNS[orientation](np.arange(4).reshape(2, 2, 1))[..., 0].ravel().tolist()
        size = (96, 64) if orientation < 5 else (64, 96)
        plain = self.quadrants(pixels(EncodedImage(dng(self.LEVELS, None)), 96, 64))
        data = dng(self.LEVELS, self.PREVIEW, orientation)
        turned = self.quadrants(pixels(EncodedImage(data), *size))
        assert turned == [plain[i] for i in upright]

    def test_white_balance_is_the_cameras(self) -> None:
        levels = np.full((64, 96, 3), 30000.0)
        levels[..., 0] /= 2  # the sensor sees half of the red light
        data = dng(levels, self.PREVIEW, neutral=(1, 2))
        gray = pixels(EncodedImage(data), 96, 64)[32, 48].tolist()
        assert max(gray) - min(gray) <= 2

    def test_image_beyond_the_pixel_limit_is_not_decoded(self) -> None:
        source = EncodedImage(dng(self.LEVELS, self.PREVIEW))
        with pytest.raises(DecodeError, match="96 x 64") as caught:
            limited(source, 96 * 64 - 1)
        assert caught.value.reason == "too-large"
        limited(source, 96 * 64)

    def test_raw_image_cut_in_half_is_a_failure(self) -> None:
        data = dng(self.LEVELS, self.PREVIEW)
        strip = 64 * 96 * 2
        start = data.index(struct.pack("<HHII", 279, LONG, 1, strip)) - 36
        assert data[start : start + 2] == struct.pack("<H", 273)
        mosaic = int.from_bytes(data[start + 8 : start + 12], "little")
        moved = data[: start + 8] + struct.pack("<I", len(data)) + data[start + 12 :]
        whole = moved + data[mosaic : mosaic + strip]
        assert np.array_equal(
            pixels(EncodedImage(whole), 96, 64), pixels(EncodedImage(data), 96, 64)
        )
        assert reason(EncodedImage(whole[: -strip // 2])) in ("truncated", "corrupt")

    def test_camera_that_libraw_does_not_know_is_unsupported(self) -> None:
        assert reason(EncodedImage(b"FUJIFILMCCD-RAW" + bytes(4000))) == "unsupported"

    @pytest.mark.slow
    def test_child_process_gives_the_same_picture(self, tmp_path: Path) -> None:
        path = tmp_path / "a.dng"
        path.write_bytes(dng(self.LEVELS, self.PREVIEW))
        out = np.zeros((64, 96, 3), np.uint8)
        decode_apart(
            os.fsencode(path), [unresized(96, 64)], [out], max_pixels=10**6, timeout_seconds=60
        )
        assert np.array_equal(out, pixels(path, 96, 64))


def test_threads_that_decode_first_agree() -> None:
    library: Any = pytest.importorskip("pillow_heif")
    file = library.from_pillow(QUADRANTS)
    content = io.BytesIO()
    file.save(content, quality=-1, chroma=444)
    plugins._import.cache_clear()
    pictures: list[npt.NDArray[np.uint8]] = []
    threads = [
        threading.Thread(
            target=lambda: pictures.append(pixels(EncodedImage(content.getvalue()), 64, 32))
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pictures) == 8
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures)


def test_plugins_are_imported_by_the_first_file_only() -> None:
    names = [kind.module for kind in (HEIF, JXL, RAW)]
    code = f"""
import sys
import extractor.cli.main, extractor.images.decode, extractor.images.listing
print([name for name in {names} if name in sys.modules])
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
