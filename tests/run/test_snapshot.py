"""A snapshot holds size and time of every image, however slow the file system is."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from extractor.images.listing import ImageList
from extractor.run import snapshot
from extractor.run.snapshot import take_snapshot


@pytest.fixture
def images(tmp_path: Path) -> ImageList:
    """Ten files of 0 to 9 bytes, of which the fifth is missing."""
    names = [f"{i}.jpg" for i in range(10)]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(b"x" * i)
        os.utime(tmp_path / name, ns=(0, 1000 + i))
    (tmp_path / names[4]).unlink()
    return ImageList(os.fsencode(tmp_path), [name.encode() for name in names])


@pytest.mark.parametrize(("slow", "threaded"), [(60.0, 0), (0.0, 7)])
def test_slow_file_system_is_asked_by_threads(
    images: ImageList, monkeypatch: pytest.MonkeyPatch, slow: float, threaded: int
) -> None:
    main, plain = threading.get_ident(), os.stat
    asked: list[bool] = []

    def noted(path: Any, **options: Any) -> os.stat_result:
        asked.append(threading.get_ident() == main)
        return plain(path, **options)

    monkeypatch.setattr(snapshot, "STATUS_BLOCK", 3)
    monkeypatch.setattr(snapshot, "SLOW_STATUS", slow)
    monkeypatch.setattr(os, "stat", noted)
    taken = take_snapshot(images, content=False)
    monkeypatch.undo()
    assert (len(asked), asked.count(False)) == (10, threaded)
    assert taken.sizes.tolist() == [0, 1, 2, 3, -1, 5, 6, 7, 8, 9]
    assert taken.mtimes.tolist() == [1000, 1001, 1002, 1003, -1, 1005, 1006, 1007, 1008, 1009]
