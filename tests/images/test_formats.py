"""Images are recognized by their content, and suffixes by their formats."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features
from support.images import (
    encoded,
    furthest,
    photo,
    pixels,
    reason,
)

from extractor.images.formats import looks_like_image, readable_suffixes
from extractor.images.types import EncodedImage


class TestFormats:
    def test_common_suffixes_are_readable(self) -> None:
        common = {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".mpo", ".ppm"}
        assert common <= readable_suffixes()

    def test_suffixes_of_undecodable_formats_are_not_readable(self) -> None:
        refused = {".eps", ".ps", ".wmf", ".emf", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".pdf"}
        assert not refused & readable_suffixes()

    def test_suffixes_are_lower_case_with_a_dot(self) -> None:
        assert all(
            suffix == suffix.lower() and suffix.startswith(".") for suffix in readable_suffixes()
        )

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO"])
    def test_images_are_recognized_by_their_content(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "a.txt"
        path.write_bytes(encoded(photo(16, 16), kind))
        assert looks_like_image(os.fsencode(path))

    def test_writable_formats_are_readable(self) -> None:
        kinds = ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA", "JPEG2000"]
        kinds += ["AVIF"] if features.check("avif") else []
        image = Image.new("RGB", (16, 16), (200, 30, 40))
        for kind in kinds:
            out = pixels(EncodedImage(encoded(image, kind)), 16, 16)
            assert furthest(out, np.broadcast_to((200, 30, 40), out.shape)) <= 4, kind

    @pytest.mark.usefixtures("fail_if_stuck")
    def test_other_files_are_not_recognized_as_images(self, tmp_path: Path) -> None:
        (tmp_path / "text.jpg").write_text("text")
        (tmp_path / "empty.jpg").touch()
        (tmp_path / "a.eps").write_bytes(encoded(photo(16, 16), "EPS"))
        os.mkfifo(tmp_path / "pipe.jpg")
        for name in ("text.jpg", "empty.jpg", "a.eps", "pipe.jpg", "gone.jpg", "."):
            assert not looks_like_image(os.fsencode(tmp_path / name)), name


class TestSeveralImages:
    """The picture of a file that holds several images is the main one."""

    LARGE = Image.new("RGB", (128, 128), (200, 30, 40))

    def test_largest_icon_is_taken(self) -> None:
        sizes = [(16, 16), (128, 128), (48, 48)]
        for kind in ("png", "bmp"):
            data = encoded(self.LARGE, "ICO", sizes=sizes, bitmap_format=kind)
            assert furthest(pixels(EncodedImage(data), 128, 128), self.LARGE) == 0
        cursor = b"\0\0\2\0" + data[4:]
        assert furthest(pixels(EncodedImage(cursor), 128, 128), self.LARGE) == 0

    def test_first_image_of_several_in_a_jpeg_is_taken(self) -> None:
        other = Image.new("RGB", (16, 16))
        data = encoded(self.LARGE, "MPO", save_all=True, append_images=[other])
        assert furthest(pixels(EncodedImage(data), 128, 128), self.LARGE) <= 4

    def test_thumbnail_in_the_metadata_is_not_taken(self) -> None:
        thumbnail = encoded(Image.new("RGB", (16, 16)), "JPEG")
        exif = Image.Exif()
        exif.get_ifd(1).update({0x0103: 6, 0x0201: 0, 0x0202: len(thumbnail)})
        data = encoded(self.LARGE, "JPEG", exif=exif.tobytes() + thumbnail)
        assert furthest(pixels(EncodedImage(data), 128, 128), self.LARGE) <= 4

    @pytest.mark.parametrize("has_picture", [True, False])
    def test_psd_without_its_merged_picture_is_refused(self, has_picture: bool) -> None:
        version = struct.pack(">IB", 1, has_picture) + bytes(9)
        resource = b"8BIM" + struct.pack(">HHI", 1057, 0, len(version)) + version
        header = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 4, 6, 8, 3)
        planes = np.arange(72, dtype=np.uint8)
        data = header + bytes(4) + struct.pack(">I", len(resource)) + resource
        source = EncodedImage(data + bytes(4) + bytes(2) + planes.tobytes())
        if has_picture:
            assert np.array_equal(pixels(source, 6, 4), planes.reshape(3, 4, 6).transpose(1, 2, 0))
        else:
            assert reason(source) == "no-picture"
