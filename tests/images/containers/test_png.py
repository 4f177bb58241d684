"""Long texts and color profiles do no harm to the pixels of a PNG."""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from support.images import encoded, photo, pixels, reason, unresized

from extractor.images import decode, files
from extractor.images.containers.png import without_long_metadata
from extractor.images.formats import looks_like_image
from extractor.images.types import EncodedImage

LONG = b"node " * 400_000  # 2 MB
PICTURE = photo(24, 16)


def chunk(kind: bytes, content: bytes) -> bytes:
    checked = kind + content
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))


CHUNKS = {
    "zTXt": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(LONG)),
    "iTXt": chunk(b"iTXt", b"prompt\0\1\0en\0\0" + zlib.compress(LONG)),
    "XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(LONG)),
    "EXIF text": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(LONG)),
    "profile": chunk(b"iCCP", b"scanner\0\0" + zlib.compress(bytes(2_000_000))),
    "many texts": 70 * chunk(b"tEXt", b"a\0" + bytes([65]) * 2**20),  # 70 MB; the limit is 64
    "bad key": chunk(b"iTXt", b"\xff\0\0\0\xff\0\xff\0\xff"),
}


def with_chunk(content: bytes, *, before_pixels: bool, image: Image.Image = PICTURE) -> bytes:
    """Return the image as a PNG with one chunk behind the header, or before the end."""
    made = encoded(image, "PNG")
    offset = 33 if before_pixels else len(made) - 12
    return made[:offset] + content + made[offset:]


@pytest.mark.parametrize("before_pixels", [True, False])
@pytest.mark.parametrize("name", CHUNKS)
def test_long_metadata_leaves_the_pixels_as_they_are(name: str, before_pixels: bool) -> None:
    data = with_chunk(CHUNKS[name], before_pixels=before_pixels)
    assert np.array_equal(pixels(EncodedImage(data), 24, 16), np.asarray(PICTURE))


def test_long_metadata_of_a_large_file_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "READ_WHOLE_BYTES", 100)
    path = tmp_path / "a.png"
    path.write_bytes(with_chunk(CHUNKS["zTXt"], before_pixels=False))
    assert np.array_equal(pixels(path, 24, 16), np.asarray(PICTURE))


def test_file_with_long_metadata_and_no_suffix_is_an_image(tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(with_chunk(CHUNKS["zTXt"], before_pixels=True))
    assert looks_like_image(os.fsencode(path))


def test_orientation_survives_beside_a_long_text() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    hexadecimal = (b"Exif\0\0" + exif.tobytes()[6:]).hex().encode()
    text = b"\nexif\n%8d\n" % (len(hexadecimal) // 2) + hexadecimal
    oriented = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))
    for content in (oriented, oriented + CHUNKS["zTXt"]):
        out = pixels(EncodedImage(with_chunk(content, before_pixels=True)), 16, 24)
        assert np.array_equal(out, np.rot90(np.asarray(PICTURE), -1))


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_compressed_bomb_costs_little_memory(kind: bytes) -> None:
    bomb = zlib.compress(bytes(30_000_000), 1)
    head = b"prompt\0\1\0\0\0" if kind == b"iTXt" else b"name\0\0"
    source = EncodedImage(with_chunk(chunk(kind, head + bomb), before_pixels=True))
    del bomb
    out = np.empty((16, 24, 3), np.uint8)
    tracemalloc.start()
    decode.decode_into(source, [unresized(24, 16)], [out])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(out, np.asarray(PICTURE))
    assert peak < 8 * 2**20


def test_cut_png_with_a_long_text_is_truncated() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = with_chunk(CHUNKS["zTXt"], before_pixels=True, image=noise)
    assert reason(EncodedImage(data[:-2000])) == "truncated"


def test_file_without_long_metadata_has_nothing_to_leave_out() -> None:
    assert without_long_metadata(io.BytesIO(encoded(PICTURE, "PNG"))) is None
    assert without_long_metadata(io.BytesIO(encoded(PICTURE, "JPEG"))) is None


def test_number_of_parts_is_bounded() -> None:
    alternating = (chunk(b"tEXt", b"a\0b") + chunk(b"prVt", b"")) * 70_000
    data = with_chunk(alternating, before_pixels=True)
    assert without_long_metadata(io.BytesIO(data)) is None


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF", "PNG"])
def test_large_metadata_of_any_format_is_harmless(kind: str) -> None:
    exif = Image.Exif()
    exif[0x010E] = "a" * (2_000_000 if kind != "JPEG" else 60_000)
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(
        PICTURE, kind, exif=exif, icc_profile=np.random.default_rng(0).bytes(900_000), **options
    )
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB"))
    assert len(data) > 900_000
    assert np.array_equal(pixels(EncodedImage(data), 24, 16), expected)


def test_limits_of_pillow_are_those_that_the_tests_exceed() -> None:
    assert len(LONG) > PngImagePlugin.MAX_TEXT_CHUNK
    assert PngImagePlugin.MAX_TEXT_MEMORY < 70 * 2**20
