"""Thumbnails show unchanged images only, and count the others."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
from PIL import Image

from extractor.analysis.maps.thumbnails import ImageCounts, Thumbnails


def test_thumbnails_keep_the_aspect_ratio_and_the_color(tmp_path: Path) -> None:
    Image.new("RGB", (400, 100), (200, 10, 20)).save(tmp_path / "wide.png")
    Image.new("RGB", (10, 20), (0, 250, 20)).save(tmp_path / "high.png")
    reader = Thumbnails(tmp_path, 40)
    wide, high = reader.read(["wide.png", "high.png"], [None, b""])
    assert wide is not None
    assert high is not None
    assert (wide.shape, high.shape) == ((10, 40, 3), (40, 20, 3))
    assert np.unique(wide.reshape(-1, 3), axis=0).tolist() == [[200, 10, 20]]
    assert np.unique(high.reshape(-1, 3), axis=0).tolist() == [[0, 250, 20]]
    assert reader.counts == ImageCounts(shown=2)
    assert reader.counts.problems == ""


def test_moved_changed_and_hostile_files_are_counted(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "same.png")
    content = (tmp_path / "same.png").read_bytes()
    digest = hashlib.sha256(content).digest()
    Image.new("RGB", (9, 9)).save(tmp_path / "changed.png")
    (tmp_path / "broken.png").write_bytes(content[:40])
    bomb = b"P6 40000 40000 255\n" + bytes(100)  # 1,600 megapixels are announced
    (tmp_path / "bomb.ppm").write_bytes(bomb)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    names = ["same.png", "changed.png", "gone.png", "broken.png", "bomb.ppm", "pipe.png"]
    names.append("folder.png")
    reader = Thumbnails(tmp_path, 16)
    found = reader.read(names, [digest] * len(names))
    assert [pixels is not None for pixels in found] == [True] + [False] * 6
    assert reader.counts == ImageCounts(shown=1, unreadable=5, changed=1)
    assert reader.counts.problems == (
        "5 images moved or cannot be read, 1 image changed since extraction"
    )


def test_a_missing_folder_makes_all_images_unreadable(tmp_path: Path) -> None:
    reader = Thumbnails(tmp_path / "gone", 16)
    assert reader.read(["a.png"], [b""]) == [None]
    assert reader.counts == ImageCounts(unreadable=1)
