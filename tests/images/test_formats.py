"""Images are recognized by their content, and suffixes by their formats."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features
from support.images import (
    encoded,
    furthest,
    photo,
    pixels,
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
