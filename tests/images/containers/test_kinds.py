"""Formats are told by their content, whatever the file is called."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features
from support.images import encoded, photo, pixels, unresized

from extractor.errors import DecodeError
from extractor.images import decode, plugins
from extractor.images.containers.kinds import KINDS, Kind, kind_of
from extractor.images.formats import (
    candidate_suffixes,
    has_decoder,
    looks_like_image,
    readable_suffixes,
)
from extractor.images.types import EncodedImage

KINDS_WITH_EXTRAS = [kind for kind in KINDS if kind.extra]
EXTRAS = [kind.extra for kind in KINDS_WITH_EXTRAS]

NOISE = np.random.default_rng(0).bytes(4000)


def ftyp(major: bytes, *others: bytes) -> bytes:
    brands = major + bytes(4) + b"".join(others)
    return struct.pack(">I4s", 8 + len(brands), b"ftyp") + brands


CONTENTS = {
    "HEIC of a phone": (ftyp(b"heic", b"mif1", b"heic"), "HEIC"),
    "HEIF": (ftyp(b"mif1", b"mif1", b"heic"), "HEIC"),
    "HEIC of 10 bits": (ftyp(b"heix", b"mif1", b"heix"), "HEIC"),
    "HEIC with a gain map": (ftyp(b"tmap", b"mif1", b"heic"), "HEIC"),
    "HEIC sequence": (ftyp(b"msf1", b"hevc"), "HEIC"),
    "AVIF": (ftyp(b"avif", b"mif1", b"miaf"), "AVIF"),
    "AVIF by its second brand": (ftyp(b"mif1", b"avif"), "AVIF"),
    "CR3": (ftyp(b"crx ", b"crx ", b"isom"), "camera raw"),
    "JPEG XL in boxes": (bytes.fromhex("0000000c4a584c200d0a870a"), "JPEG XL"),
    "JPEG XL": (b"\xff\x0a", "JPEG XL"),
    "RAF": (b"FUJIFILMCCD-RAW 0201", "camera raw"),
    "X3F": (b"FOVb\0\0\2\0", "camera raw"),
    "ORF": (b"IIRO\x08\0\0\0", "camera raw"),
    "RW2": (b"IIU\0\x18\0\0\0", "camera raw"),
    "MRW": (b"\0MRM", "camera raw"),
    "CRW": (b"II\x1a\0\0\0HEAPCCDR", "camera raw"),
    "CR2": (b"II*\0\x10\0\0\0CR\2\0", "camera raw"),
    "IIQ": (b"II*\0\x08\0\0\0IIII\x01waR", "camera raw"),
    "JPEG XR": (b"II\xbc\x01\x08\0\0\0", "JPEG XR"),
    "PSB": (b"8BPS\0\2", "PSB"),
    "OpenEXR": (b"v/1\x01\2\0\0\0", "OpenEXR"),
    "Radiance": (b"#?RADIANCE\n", "Radiance HDR"),
    "DICOM": (bytes(128) + b"DICM", "DICOM"),
    "XCF": (b"gimp xcf v011\0", "GIMP XCF"),
    "JPEG-LS": (b"\xff\xd8\xff\xf7", "JPEG-LS"),
    "BPG": (b"BPG\xfb", "BPG"),
    "FLIF": (b"FLIF", "FLIF"),
}

OTHERS = {
    "MP4": ftyp(b"isom", b"iso2", b"avc1", b"mp41"),
    "MP4 without brands": ftyp(b"mp42"),
    "MOV": ftyp(b"qt  ", b"qt  "),
    "M4A": ftyp(b"M4A ", b"M4A ", b"mp42", b"isom"),
    "3GP": ftyp(b"3gp4", b"isom", b"3gp4"),
    "text": b"some text",
    "short": b"\0\0",
    "empty box": bytes(8),
}


@pytest.fixture
def no_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the packages of all extras."""
    for kind in KINDS:
        if kind.module:
            monkeypatch.setitem(sys.modules, kind.module, None)
    plugins._import.cache_clear()


def error_of(content: bytes) -> DecodeError:
    with pytest.raises(DecodeError, match=r".") as caught:
        decode.decode_into(
            EncodedImage(content), [unresized(8, 8)], [np.zeros((8, 8, 3), np.uint8)]
        )
    return caught.value


@pytest.mark.parametrize("name", CONTENTS)
def test_known_format_without_a_suffix_is_a_candidate(name: str, tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(CONTENTS[name][0] + NOISE)
    assert looks_like_image(os.fsencode(path)) or (
        CONTENTS[name][1] == "AVIF" and features.check("avif")  # Pillow looks deeper
    )


@pytest.mark.usefixtures("no_plugins")
@pytest.mark.parametrize("name", [name for name in CONTENTS if "AVIF" not in name])
def test_known_format_without_its_decoder_fails_with_the_name_of_the_format(name: str) -> None:
    content, kind = CONTENTS[name]
    error = error_of(content + NOISE)
    assert error.reason == "no-decoder"
    assert str(error).startswith(kind)


@pytest.mark.usefixtures("no_plugins")
@pytest.mark.parametrize("kind", KINDS_WITH_EXTRAS, ids=EXTRAS)
def test_message_without_a_decoder_names_package_and_extra(kind: Kind) -> None:
    content = next(content for content, name in CONTENTS.values() if name == kind.name)
    message = str(error_of(content + NOISE))
    command = f"pip install 'backbone-extractor[{kind.extra}]'"
    assert message == f"{kind.name} needs {kind.package}: {command}"


@pytest.mark.parametrize("name", OTHERS)
def test_videos_and_other_files_are_no_images(name: str, tmp_path: Path) -> None:
    content = OTHERS[name]
    assert kind_of(content) is None
    path = tmp_path / "file"
    path.write_bytes(content + NOISE)
    assert not looks_like_image(os.fsencode(path))
    assert error_of(content + NOISE).reason == "not-an-image"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "PSD"])
def test_content_of_pillows_formats_is_no_other_kind(kind: str) -> None:
    content = b"8BPS\0\1" if kind == "PSD" else encoded(photo(16, 16), kind)
    assert kind_of(content[:512]) is None


def test_suffixes_of_known_formats_are_candidates() -> None:
    assert readable_suffixes() < candidate_suffixes()
    wanted = {".heic", ".heif", ".avif", ".jxl", ".cr2", ".cr3", ".nef", ".dng", ".arw", ".psb"}
    assert wanted | {".jxr", ".raf", ".orf", ".rw2", ".exr", ".dcm"} <= candidate_suffixes()
    assert not {".raw", ".ptx", ".hdr", ".mp4", ".mov", ".svg"} & candidate_suffixes()


def test_decoder_is_found_for_files_of_installed_extras_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.heic"
    path.write_bytes(CONTENTS["HEIC of a phone"][0])
    jpeg = tmp_path / "a.jpg"
    jpeg.write_bytes(encoded(photo(8, 8), "JPEG"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "pillow_heif")
    assert has_decoder(path)
    assert not has_decoder(jpeg)
    assert not has_decoder(tmp_path / "gone")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not has_decoder(path)


def test_broken_decoder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("libheif.so: cannot open shared object file")

    plugins._import.cache_clear()
    monkeypatch.setattr("importlib.import_module", broken)
    error = error_of(CONTENTS["HEIC of a phone"][0] + NOISE)
    assert error.reason == "no-decoder"
    assert "pillow-heif, which cannot be imported: libheif.so" in str(error)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_decoded_by_pillow_whatever_its_brands() -> None:
    image = Image.new("RGB", (16, 16), (200, 30, 40))
    content = encoded(image, "AVIF", quality=100)
    assert content[8:12] == b"avif"
    for data in (content, content.replace(b"avif", b"mif1", 1)):
        out = pixels(EncodedImage(data), 16, 16)
        assert np.abs(out.astype(int) - (200, 30, 40)).max() <= 4
