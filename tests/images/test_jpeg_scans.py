"""A JPEG whose data end early is a failure, whatever stands behind them; a whole one never is."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.images import encoded, photo, pixels, reason

from extractor.errors import DecodeError
from extractor.images import decode, files
from extractor.images.jpeg_scans import END, find_scans
from extractor.images.types import EncodedImage
from extractor.preprocess import Preprocess

PAGE = b"<!DOCTYPE html><html><body>%s</body></html>" % (b"<p>502 Bad Gateway, sorry</p>\n" * 2000)
# libjpeg fetches this much in advance, so a cut inside the last bytes of a scan is not seen. Nor
# is the exact byte at which text or zeros begin.
UNSEEN_BYTES, UNSEEN_BYTES_BEFORE_OTHER_DATA = 8, 32

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "baseline": ("RGB", {}),
    "all colors": ("RGB", {"subsampling": 0}),
    "optimized": ("RGB", {"optimize": True}),
    "restarts": ("RGB", {"restart_marker_rows": 1}),
    "many restarts": ("RGB", {"restart_marker_blocks": 2}),
    "progressive": ("RGB", {"progressive": True}),
    "progressive restarts": ("RGB", {"progressive": True, "restart_marker_rows": 1}),
    "gray": ("L", {}),
    "progressive gray": ("L", {"progressive": True}),
    "cmyk": ("CMYK", {}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def jpeg(kind: str, image: Image.Image | None = None) -> bytes:
    mode, options = KINDS[kind]
    return encoded((image or photo(75, 50)).convert(mode), "JPEG", **{"quality": 60, **options})


def by_pillow(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def first_codes(content: bytes) -> int:
    """Return the offset of the first scan's codes."""
    start = content.index(b"\xff\xda") + 2
    return start + int.from_bytes(content[start : start + 2], "big")


@every_kind
def test_a_cut_is_seen_wherever_it_is(kind: str) -> None:
    content = jpeg(kind)
    start = first_codes(content)
    assert len(content) - start > 250
    for length in range(start + 1, len(content) - len(END) - UNSEEN_BYTES, 3):
        half = content[:length].rstrip(b"\xff")
        assert reason(EncodedImage(half + END)) == "truncated"
        if length % 5 == 0 and length < len(content) - UNSEEN_BYTES_BEFORE_OTHER_DATA:
            assert reason(EncodedImage(half)) == "truncated"
            assert reason(EncodedImage(half + PAGE)) == "truncated"
            assert reason(EncodedImage(half + END + PAGE)) == "truncated"
            assert reason(EncodedImage(half + bytes(5000))) == "truncated"


@every_kind
@pytest.mark.parametrize(
    "tail", [b"", b"\r\n", bytes(200), b"a few words", PAGE, b"\xff", b"\xff\xd8\xff", END]
)
def test_data_behind_a_whole_jpeg_are_harmless(kind: str, tail: bytes) -> None:
    content = jpeg(kind)
    expected = by_pillow(content)
    assert np.array_equal(pixels(EncodedImage(content + tail), 75, 50), expected)


@every_kind
def test_a_second_jpeg_behind_a_whole_one_is_harmless(kind: str) -> None:
    content = jpeg(kind)
    expected = by_pillow(content)
    for tail in (content, content[:300], jpeg("progressive")):
        assert np.array_equal(pixels(EncodedImage(content + tail), 75, 50), expected)


@every_kind
def test_a_whole_jpeg_without_end_marker_is_decoded_despite_a_page_behind_it(kind: str) -> None:
    content = jpeg(kind)
    data = EncodedImage(content.removesuffix(END) + PAGE)
    assert np.array_equal(pixels(data, 75, 50), by_pillow(content))


@every_kind
@pytest.mark.parametrize("color", ["white", "black", (128, 128, 128), (255, 0, 0)])
def test_flat_jpegs_are_whole(kind: str, color: Any) -> None:
    flat = Image.new("RGB", (260, 200), color)
    half_flat = flat.copy()
    half_flat.paste(photo(260, 90))
    for image in (flat, half_flat):
        content = jpeg(kind, image)
        assert np.array_equal(pixels(EncodedImage(content), 260, 200), by_pillow(content))


@pytest.mark.parametrize("kind", ["progressive", "progressive gray", "progressive restarts"])
def test_a_missing_scan_is_seen(kind: str) -> None:
    content = jpeg(kind)
    scans = find_scans(content)
    assert scans is not None
    assert len(scans.ends) > 4
    for scan in scans.ends[:-1]:
        assert reason(EncodedImage(content[: scan.end] + END)) == "truncated"


@pytest.mark.parametrize("first", [0, 1, 4])
def test_missing_restart_intervals_are_seen(first: int) -> None:
    content = jpeg("many restarts")
    restarts = [content.index(bytes((0xFF, 0xD0 + number))) for number in range(8)]
    for last in range(first + 1, 8):
        shorter = content[: restarts[first]] + content[restarts[last] :]
        assert reason(EncodedImage(shorter)) == "truncated"
    until_last = content[: content.rindex(b"\xff\xd0")]  # ends behind a whole interval
    assert reason(EncodedImage(until_last + END)) == "truncated"


def test_a_marker_inside_a_scan_ends_it() -> None:
    content = jpeg("baseline")
    comment = b"\xff\xfe\0\x04ab"
    middle = (first_codes(content) + len(content)) // 2
    inside = content[:middle].rstrip(b"\xff") + comment + content[middle:]
    assert reason(EncodedImage(inside)) == "truncated"
    behind = content.removesuffix(END) + comment + END
    assert np.array_equal(pixels(EncodedImage(behind), 75, 50), by_pillow(content))


@pytest.mark.parametrize("decode_mode", ["scaled", "exact"])
@pytest.mark.parametrize("kind", ["baseline", "progressive"])
def test_a_cut_is_seen_when_the_decoder_reduces(kind: str, decode_mode: str) -> None:
    content = jpeg(kind, photo(400, 300))
    half = EncodedImage(content[: len(content) // 2].rstrip(b"\xff") + END)
    out = np.empty((32, 32, 3), np.uint8)
    with pytest.raises(DecodeError, match="data of its picture are missing"):
        decode.decode_into(half, [Preprocess.standard(32)], [out], decode_mode=decode_mode)


@pytest.mark.parametrize("kind", ["baseline", "progressive"])
def test_a_cut_is_seen_in_large_files_and_in_opened_images(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = jpeg(kind)
    half = content[: (first_codes(content) + len(content)) // 2].rstrip(b"\xff") + END
    (tmp_path / "half.jpg").write_bytes(half)
    (tmp_path / "whole.jpg").write_bytes(content)
    with Image.open(tmp_path / "half.jpg") as image:
        assert reason(image) == "truncated"
    assert reason(tmp_path / "half.jpg") == "truncated"
    monkeypatch.setattr(files, "READ_WHOLE_BYTES", 100)
    assert reason(tmp_path / "half.jpg") == "truncated"
    assert np.array_equal(pixels(tmp_path / "whole.jpg", 75, 50), by_pillow(content))


def test_a_header_alone_is_no_picture() -> None:
    content = jpeg("baseline")
    for length in range(2, first_codes(content) + 1):
        found = reason(EncodedImage(content[:length] + END))
        assert found in {"truncated", "not-an-image", "corrupt"}
