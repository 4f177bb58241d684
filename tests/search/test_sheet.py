"""The contact sheet: what lies where, and which files it may be written to."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from extractor.errors import UsageError
from extractor.images import time_limit
from extractor.images.decode import decode_into
from extractor.search.sheet import (
    EMPTY,
    FRAME,
    Tile,
    check_new_file,
    check_sheet,
    draw_sheet,
    write_new_file,
    write_sheet,
)
from extractor.store import atomic

RED, BLUE = (200, 0, 0), (0, 0, 200)
COLUMN, ROW = 160, 194  # pixels from one tile to the next


@pytest.fixture
def red(tmp_path: Path) -> Path:
    Image.new("RGB", (300, 100), RED).save(tmp_path / "red.png")
    return tmp_path / "red.png"


def test_tiles_stand_in_rows_and_the_query_in_a_frame(red: Path, tmp_path: Path) -> None:
    Image.new("RGB", (60, 60), BLUE).save(tmp_path / "blue.png")
    rows = [[Tile(red, "query\na"), Tile(tmp_path / "blue.png", "0.5\nb")], [Tile(red, "c")]]
    sheet = draw_sheet(rows)
    assert sheet.size == (2 * COLUMN + 20, 2 * ROW + 10)
    assert sheet.getpixel((85, 85)) == RED
    assert sheet.getpixel((85, 20)) == (255, 255, 255)  # 300 x 100 keeps its shape
    assert sheet.getpixel((COLUMN + 95, 85)) == BLUE
    assert sheet.getpixel((85, ROW + 85)) == RED
    assert sheet.getpixel((8, 85)) == FRAME
    label = sheet.crop((10, 164, 160, 194)).convert("L")
    darkest, lightest = label.getextrema()
    assert darkest < 64
    assert lightest == 255


def test_an_image_that_cannot_be_read_is_an_empty_tile(tmp_path: Path) -> None:
    sheet = draw_sheet([[Tile(tmp_path / "gone.jpg", "query\n\udcff é \u4e2d")]])
    assert sheet.getpixel((85, 20)) == EMPTY


def test_an_image_that_hangs_is_an_empty_tile(
    red: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()

    def hang(source: Any, *arguments: Any) -> Any:
        if str(source).endswith("stuck.png"):
            release.wait(20)
        return decode_into(source, *arguments)

    monkeypatch.setattr(time_limit, "decode_into", hang)
    monkeypatch.setattr(time_limit, "IMAGE_SECONDS", 0.1)
    sheet = draw_sheet([[Tile(tmp_path / "stuck.png", "query"), Tile(red, "a")]])
    release.set()
    assert sheet.getpixel((85, 20)) == EMPTY
    assert sheet.getpixel((COLUMN + 95, 85)) == RED


def test_an_existing_file_is_kept_without_overwrite(red: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"red\.png exists; replace it with --overwrite"):
        check_sheet(red, overwrite=False)
    check_sheet(red, overwrite=True)
    with pytest.raises(UsageError, match=r"got .*hits\.txt, expected a file that ends with \.png"):
        check_sheet(tmp_path / "hits.txt", overwrite=False)
    with pytest.raises(UsageError, match="there is no folder"):
        check_sheet(tmp_path / "no" / "hits.png", overwrite=False)


@pytest.mark.parametrize("suffix", [".png", ".JPG", ".webp"])
def test_the_suffix_chooses_the_format(red: Path, tmp_path: Path, suffix: str) -> None:
    write_sheet(tmp_path / f"hits{suffix}", [[Tile(red, "a")]])
    with Image.open(tmp_path / f"hits{suffix}") as image:
        assert image.size == (COLUMN + 20, ROW + 10)
    assert not list(tmp_path.glob("*.partial"))


def test_too_many_tiles_are_refused(red: Path) -> None:
    with pytest.raises(UsageError, match="1,000 queries with 1 tile each are too many"):
        draw_sheet([[Tile(red, "a")]] * 1000)


def test_a_full_disk_leaves_no_part_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "sync", full)
    with pytest.raises(UsageError, match=r"picture: cannot write .*a.png: No space left on device"):
        write_new_file(tmp_path / "a.png", "picture", b"content")
    assert list(tmp_path.iterdir()) == []


def test_a_file_inside_a_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store" / "derived").mkdir(parents=True)
    (tmp_path / "store" / "store.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "store" / "derived")
    for folder in ("store", "store/derived", "link"):
        with pytest.raises(UsageError, match=r"a.png is in the store .*store; name a file beside"):
            check_new_file(tmp_path / folder / "a.png", "picture", [".png"], overwrite=True)
    check_new_file(tmp_path / "a.png", "picture", [".png"], overwrite=False)
