"""Any bytes decode to a picture or fail with a documented reason."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, features
from support.tiffs import LONG, TiffFile, dng

from extractor.errors import DecodeError
from extractor.images.budget import PixelBudget, allow_pixels
from extractor.images.decode import decode_into
from extractor.images.types import EncodedImage, ImageInfo
from extractor.preprocess import Preprocess

PIL_MAJOR = int(PIL.__version__.partition(".")[0])

EXAMPLES = int(os.environ.get("EXTRACTOR_TEST_EXAMPLES", "15"))
PROMPT_SECONDS = 30  # for one image of a few hundred bytes
MAX_PIXELS = 500_000  # sizes that a mutation makes up cost no time

FORMAT = Path(__file__).parents[2] / "docs/store-format.md"
DOCUMENTED = set(re.findall(r"^\| `([a-z-]+)` \|", FORMAT.read_text(), re.M))
REASONS = {  # the others come from a run: not-finite, timeout, crashed
    "unreadable",
    "not-a-file",
    "empty",
    "not-an-image",
    "truncated",
    "corrupt",
    "too-large",
    "out-of-memory",
    "no-decoder",
    "no-picture",
    "unsupported",
}

PREPROCESSES = [
    Preprocess((8, 8), "squash", (8, 8), "bilinear", (0, 0, 0), (1, 1, 1)),
    Preprocess((9, 7), "contain", (9, 7), "bicubic", (0, 0, 0), (1, 1, 1), (1, 2, 3)),
]

pytestmark = pytest.mark.filterwarnings("ignore")
law = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module", autouse=True)
def _few_pixels() -> Iterator[None]:
    before = Image.MAX_IMAGE_PIXELS
    allow_pixels(MAX_PIXELS)
    yield
    Image.MAX_IMAGE_PIXELS = before


def grain(mode: str = "RGB", size: tuple[int, int] = (19, 13)) -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), np.uint8)
    return Image.fromarray(levels, "RGBA").convert("RGB").convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return an encoded image, or no bytes if this Pillow cannot write the format."""
    file = io.BytesIO()
    try:
        image.save(file, kind, **options)
    except (OSError, KeyError, ValueError):
        return b""
    return file.getvalue()


def tiff_with_preview() -> bytes:
    """Return a TIFF whose first page is a reduced image, and whose SubIFD is the picture."""
    file = TiffFile()
    inner = file.directory(file.picture(grain(), 0))
    return file.finish(file.directory(file.picture(grain("L", (6, 4)), 1, {330: (LONG, [inner])})))


def _files_of_extras() -> dict[str, bytes]:
    """Return files that the installed extras decode."""
    files = {}
    if importlib.util.find_spec("pillow_heif"):
        import pillow_heif

        content = io.BytesIO()
        pillow_heif.from_pillow(grain()).save(content)
        files["heic"] = content.getvalue()
    if importlib.util.find_spec("pillow_jxl"):
        import pillow_jxl  # noqa: F401  # registers itself with Pillow

        files["jxl"] = encoded(grain(), "JXL")
        files["jxl-boxes"] = encoded(grain(), "JXL", use_container=True)
    if importlib.util.find_spec("rawpy"):
        levels = np.random.default_rng(0).integers(0, 65536, (24, 24, 3)).astype(float)
        files["dng"] = dng(levels, grain(size=(8, 6)))
    return files


def _files() -> dict[str, bytes]:
    image, exif = grain(), Image.Exif()
    exif[0x0112] = 6
    icon = encoded(grain(size=(16, 16)), "PNG")
    icon_length = struct.pack(">L", len(icon) + 8)
    files = {
        "jpeg": encoded(image, "JPEG", exif=exif),
        "jpeg-progressive": encoded(image, "JPEG", progressive=True),
        "jpeg-gray": encoded(grain("L"), "JPEG"),
        "jpeg-cmyk": encoded(grain("CMYK"), "JPEG"),
        "jpeg-restarts": encoded(grain(size=(60, 40)), "JPEG", restart_marker_blocks=2),
        "png": encoded(image, "PNG"),
        "png-palette": encoded(grain("P"), "PNG"),
        "png-alpha": encoded(grain("RGBA"), "PNG", exif=exif),
        "png-bits": encoded(grain("1"), "PNG"),
        "png-animated": encoded(image, "PNG", save_all=True, append_images=[grain()]),
        "webp": encoded(image, "WEBP"),
        "webp-lossless": encoded(image, "WEBP", lossless=True),
        "webp-alpha": encoded(grain("RGBA"), "WEBP", exif=exif),
        "webp-animated": encoded(image, "WEBP", save_all=True, append_images=[grain("L")]),
        "gif": encoded(image, "GIF"),
        "gif-animated": encoded(image, "GIF", save_all=True, append_images=[grain("L")]),
        "mpo": encoded(image, "MPO", save_all=True, append_images=[grain()]),
        "bmp": encoded(image, "BMP"),
        "bmp-palette": encoded(grain("P"), "BMP"),
        "dib": encoded(image, "DIB"),
        "ppm": encoded(image, "PPM"),
        "pgm": encoded(grain("L"), "PPM"),
        "pbm": encoded(grain("1"), "PPM"),
        "tga": encoded(image, "TGA"),
        "tga-rle": encoded(image, "TGA", compression="tga_rle"),
        "ico": encoded(grain(size=(16, 16)), "ICO"),
        "ico-bmp": encoded(grain(size=(16, 16)), "ICO", bitmap_format="bmp"),
        "icns": b"icns" + struct.pack(">L", len(icon) + 16) + b"icp4" + icon_length + icon,
        "dds": encoded(image, "DDS"),
        "dds-dxt1": encoded(grain(size=(16, 16)), "DDS", pixel_format="DXT1"),
        "sgi": encoded(image, "SGI"),
        "pcx": encoded(image, "PCX"),
        "qoi": encoded(image, "QOI"),
        "blp": encoded(grain("P"), "BLP"),
        "im": encoded(image, "IM"),
        "msp": encoded(grain("1"), "MSP"),
        "spider": encoded(grain("F"), "SPIDER"),
        "xbm": encoded(grain("1"), "XBM"),
    }
    compressions = ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"]
    if PIL_MAJOR >= 12:  # older wheels lack it, and writing it may crash the process
        compressions.append("zstd")
    for compression in compressions:
        files[f"tiff-{compression}"] = encoded(image, "TIFF", compression=compression)
    for compression in ("group3", "group4"):
        files[f"tiff-{compression}"] = encoded(grain("1"), "TIFF", compression=compression)
    files["tiff-float"] = encoded(grain("F"), "TIFF")
    files["tiff-16"] = encoded(grain("I;16"), "TIFF", compression="tiff_lzw")
    files["tiff-preview"] = tiff_with_preview()
    files |= _files_of_extras()
    if features.check("jpg_2000"):
        files["jp2"] = encoded(image, "JPEG2000")
        files["j2k"] = encoded(image, "JPEG2000", no_jp2=True)
    if features.check("avif"):
        files["avif"] = encoded(image, "AVIF")
    return {kind: data for kind, data in files.items() if data}


FILES = _files()
assert len(FILES) > 35
# First bytes of files, also of formats that Pillow reads but does not write.
SIGNATURES = [
    *sorted({data[:size] for data in FILES.values() for size in (4, 12, 30)}),
    b"8BPS\0\1" + bytes(6),
    b"\0\0\2\0\1\0",
    b"\x59\xa6\x6a\x95",
    b"SIMPLE  =                    T",
    b"\0\0\0\0\0\0\0\4",
    b"\x80\xe8\0\0",
    b"P7 332",
    b"\x1c\x03\x0a\0",
    b"/* XPM */",
    b"\xb1\x68\xde\x3a",
    b"FTEX",
    b"\0\0\0\x1c\0\0\0\2",
    bytes(4) + b"\x11\xaf\1\0",
    bytes(2048) + b"PCD_",
]


def attempt(data: bytes) -> ImageInfo | DecodeError:
    """Decode bytes twice over different backgrounds, and check that the results are equal."""
    ends: list[ImageInfo | BaseException] = []
    rendered = []

    def decode() -> None:
        for background in (0, 255):
            outs = [np.full((*one.input_size, 3), background, np.uint8) for one in PREPROCESSES]
            try:
                ends.append(
                    decode_into(EncodedImage(data), PREPROCESSES, outs, PixelBudget(MAX_PIXELS))
                )
                rendered.append(outs)
            except BaseException as error:
                ends.append(error)

    thread = threading.Thread(target=decode, daemon=True)
    thread.start()
    thread.join(PROMPT_SECONDS)
    assert not thread.is_alive(), f"still decoding after {PROMPT_SECONDS} s: {data!r}"
    first, second = ends
    if isinstance(first, ImageInfo):
        assert first == second
        assert first.size == len(data)
        assert first.width * first.height in range(1, MAX_PIXELS + 1)
        for one, other in zip(*rendered, strict=True):
            assert np.array_equal(one, other), "a part of the picture was not written"
        return first
    if not isinstance(first, DecodeError):
        raise first
    assert isinstance(second, DecodeError)
    assert first.reason == second.reason
    assert first.reason in REASONS
    assert str(first)
    return first


def picture(data: bytes) -> np.ndarray | None:
    out = np.zeros((13, 19, 3), np.uint8)
    whole = Preprocess((13, 19), "squash", (13, 19), "bilinear", (0, 0, 0), (1, 1, 1))
    try:
        decode_into(EncodedImage(data), [whole], [out], PixelBudget(MAX_PIXELS))
    except DecodeError:
        return None
    return out


@st.composite
def mutated(draw: st.DrawFn, data: bytes) -> bytes:
    """Return a file with a few changes, half of them in the header with its sizes and offsets."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        reach = draw(st.sampled_from([64, len(changed)]))
        index = draw(st.integers(0, max(min(reach, len(changed)) - 1, 0)))
        deed = draw(st.sampled_from(["set", "set", "flip", "insert", "delete", "copy", "cut"]))
        if deed == "set":
            changed[index : index + 1] = bytes([draw(st.sampled_from([0, 1, 127, 128, 254, 255]))])
        elif deed == "flip":
            changed[index : index + 1] = bytes([draw(st.integers(0, 255))])
        elif deed == "insert":
            changed[index:index] = draw(st.binary(min_size=1, max_size=9))
        elif deed == "delete":
            del changed[index : index + draw(st.integers(1, 40))]
        elif deed == "copy":
            source = draw(st.integers(0, len(changed)))
            block = changed[source : source + 24]
            changed[index : index + len(block)] = block
        elif draw(st.booleans()):  # a file cut short has little left that could go wrong
            del changed[index:]
    return bytes(changed)


def test_reasons_are_documented() -> None:
    assert REASONS <= DOCUMENTED


@pytest.mark.parametrize("kind", FILES)
def test_unchanged_files_are_decodable(kind: str) -> None:
    assert isinstance(attempt(FILES[kind]), ImageInfo)


@law
@given(st.binary(max_size=300))
def test_any_bytes_give_a_picture_or_a_documented_reason(data: bytes) -> None:
    attempt(data)


@pytest.mark.parametrize("signature", SIGNATURES, ids=lambda data: repr(data[-12:]))
@settings(law, max_examples=max(EXAMPLES // 4, 1))
@given(rest=st.binary(max_size=300))
def test_any_bytes_after_a_signature_give_a_picture_or_a_documented_reason(
    signature: bytes, rest: bytes
) -> None:
    attempt(signature + rest)


@pytest.mark.parametrize("kind", FILES)
@law
@given(choice=st.data())
def test_any_changed_file_gives_a_picture_or_a_documented_reason(
    kind: str, choice: st.DataObject
) -> None:
    attempt(choice.draw(mutated(FILES[kind])))


# A cut file must not give a picture whose rest is gray, black or made up. A file that still gives a
# picture lacks only data after its pixels.
@pytest.mark.parametrize("kind", FILES)
def test_cut_files_fail_or_give_the_complete_picture(kind: str) -> None:
    data = FILES[kind]
    expected = picture(data)
    assert expected is not None
    different = [
        length
        for length in range(len(data))
        if (rendered := picture(data[:length])) is not None
        and not np.array_equal(rendered, expected)
    ]
    assert not different, f"of {len(data)} bytes, so many give another picture: {different}"
