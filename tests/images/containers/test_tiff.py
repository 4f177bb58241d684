"""The picture of a TIFF is its full image, never a preview."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.images import encoded, photo, pixels, reason
from support.tiffs import LONG, SHORT, Tags, TiffFile

from extractor.images import files
from extractor.images.containers.tiff import RAW_FILE, main_picture
from extractor.images.formats import looks_like_image
from extractor.images.types import EncodedImage

FULL, PREVIEW = photo(48, 32, seed=1), photo(12, 8, seed=2)

FORMS = [("<", False), (">", False), ("<", True)]  # Pillow reads no big-endian BigTIFF


def two_pages(
    first: int | None, second: int | None, order: str = "<", *, big: bool = False
) -> bytes:
    """Return a small image and a large one behind it, with their NewSubfileType."""
    file = TiffFile(order, big=big)
    large = file.directory(file.picture(FULL, second))
    return file.finish(file.directory(file.picture(PREVIEW, first), large))


def with_inner(
    first: int | None, inner: int | None, order: str = "<", *, big: bool = False
) -> bytes:
    """Return a small image whose SubIFD is a large one."""
    file = TiffFile(order, big=big)
    large = file.directory(file.picture(FULL, inner))
    return file.finish(file.directory(file.picture(PREVIEW, first, {330: (LONG, [large])})))


def is_full(data: bytes) -> bool:
    return np.array_equal(pixels(EncodedImage(data), 48, 32), np.asarray(FULL))


@pytest.mark.parametrize(("order", "big"), FORMS)
def test_full_image_behind_a_reduced_one_is_the_picture(order: str, big: bool) -> None:
    assert is_full(two_pages(1, 0, order, big=big))
    assert is_full(with_inner(1, 0, order, big=big))
    assert is_full(two_pages(1, None, order, big=big))


def test_full_image_of_a_big_endian_bigtiff_is_found() -> None:
    data = two_pages(1, 0, ">", big=True)
    assert main_picture(io.BytesIO(data)) not in (0, RAW_FILE)


@pytest.mark.parametrize("kind", [4, 5, 8])
def test_mask_or_depth_map_is_not_the_picture(kind: int) -> None:
    assert is_full(two_pages(kind, 0))


def test_old_tag_of_reduced_images_counts() -> None:
    file = TiffFile()
    large = file.directory(file.picture(FULL, None))
    first = file.directory(file.picture(PREVIEW, None, {255: (SHORT, [2])}), large)
    assert is_full(file.finish(first))


@pytest.mark.parametrize("kind", [None, 0, 2])
def test_first_page_of_a_document_is_the_picture(kind: int | None) -> None:
    for data in (two_pages(kind, 0), with_inner(kind, 1), with_inner(kind, 0)):
        assert np.array_equal(pixels(EncodedImage(data), 12, 8), np.asarray(PREVIEW))


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_compressed_image_behind_a_reduced_one_is_decoded(
    compression: str, on_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"save_all": True, "append_images": [FULL], "tiffinfo": {254: 1}}
    content = encoded(PREVIEW, "TIFF", compression=compression, **options)
    with Image.open(io.BytesIO(content)) as image:
        image.seek(1)
        expected = np.asarray(image.convert("RGB"))
    both = [struct.pack("<HHII", 254, LONG, 1, kind) for kind in (1, 0)]
    assert content.count(both[0]) == 2
    second = content.rindex(both[0])
    data = content[:second] + both[1] + content[second + 12 :]
    source: Path | EncodedImage = EncodedImage(data)
    if on_disk:
        monkeypatch.setattr(files, "READ_WHOLE_BYTES", 100)
        source = tmp_path / "a.tif"
        source.write_bytes(data)
    assert np.array_equal(pixels(source, 48, 32), expected)


def test_preview_alone_is_no_picture(tmp_path: Path) -> None:
    file = TiffFile()
    data = file.finish(file.directory(file.picture(PREVIEW, 1)))
    assert reason(EncodedImage(data)) == "no-picture"
    assert reason(EncodedImage(two_pages(1, 1))) == "no-picture"
    path = tmp_path / "scan"
    path.write_bytes(data)
    assert looks_like_image(os.fsencode(path))


@pytest.mark.parametrize(
    "more",
    [{262: (SHORT, [32803])}, {262: (SHORT, [34892])}, {259: (SHORT, [34713])}],
    ids=["mosaic", "linear", "NEF"],
)
def test_raw_values_anywhere_make_a_raw_file(more: Tags) -> None:
    for first in (None, 0, 1):
        file = TiffFile()
        raw = file.directory(file.picture(FULL, 0, more))
        inner = file.finish(file.directory(file.picture(PREVIEW, first, {330: (LONG, [raw])})))
        assert main_picture(io.BytesIO(inner)) == RAW_FILE
        file = TiffFile()
        raw = file.directory(file.picture(FULL, 0, more))
        behind = file.finish(file.directory(file.picture(PREVIEW, first), raw))
        assert main_picture(io.BytesIO(behind)) == RAW_FILE
    file = TiffFile()
    data = file.finish(file.directory(file.picture(FULL, 0, more)))
    assert main_picture(io.BytesIO(data)) == RAW_FILE


def test_preview_with_a_dng_version_makes_a_raw_file() -> None:
    file = TiffFile()
    version: Tags = {50706: (1, [1, 4, 0, 0])}
    assert (
        main_picture(io.BytesIO(file.finish(file.directory(file.picture(PREVIEW, 1, version)))))
        == -1
    )


def test_pages_that_link_in_a_circle_end() -> None:
    file = TiffFile()
    first, second = (file.directory(file.picture(PREVIEW, 1)) for _ in range(2))
    for here, there in ((first, second), (second, first)):
        following = here + 2 + 12 * int.from_bytes(file.data[here : here + 2], "little")
        struct.pack_into("<I", file.data, following, there)
    assert reason(EncodedImage(file.finish(first))) == "no-picture"


def test_file_that_ends_before_its_full_image_is_truncated() -> None:
    file = TiffFile()
    data = file.finish(file.directory(file.picture(PREVIEW, 1, {330: (LONG, [100_000])})))
    assert reason(EncodedImage(data)) == "truncated"


@pytest.mark.filterwarnings("ignore")  # of Pillow, about the tags
def test_cut_file_never_gives_its_preview() -> None:
    data = with_inner(1, 0)
    for end in range(8, len(data), 13):
        assert reason(EncodedImage(data[:end])) in ("truncated", "not-an-image", "no-picture")


def test_hostile_offsets_do_no_harm() -> None:
    for big in (False, True):
        data = bytearray(with_inner(1, 0, big=big))
        start = 8 if big else 4
        data[start : start + (8 if big else 4)] = b"\xff" * (8 if big else 4)
        assert main_picture(io.BytesIO(bytes(data))) == 0
