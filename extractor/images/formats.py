"""Image formats: which of them are decoded, their suffixes, and opening a file by its content."""

from __future__ import annotations

import functools
from typing import IO

from PIL import Image, UnidentifiedImageError

from extractor.errors import DecodeError
from extractor.images.budget import PixelBudget
from extractor.images.containers import tiff
from extractor.images.containers.kinds import AVIF, HEAD_BYTES, KINDS, RAW, Kind, kind_of
from extractor.images.containers.png import PNG_START
from extractor.images.files import open_regular
from extractor.images.jpeg import JPEG_START
from extractor.images.plugins import is_decodable, open_kind
from extractor.images.types import FilePath

__all__ = [
    "candidate_suffixes",
    "has_decoder",
    "looks_like_image",
    "open_image",
    "pillow_suffixes",
    "readable_suffixes",
]

# Pillow names these formats but does not decode them by itself. It reads only the metadata of BUFR,
# GRIB, HDF5, MPEG and (outside Windows) WMF. For EPS it would run Ghostscript on an untrusted file.
# IPTC can hold any other file, of any size.
NOT_DECODED = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"})

# Plugins that register themselves with Pillow when they are imported. See extractor.images.plugins.
PLUGIN_FORMATS = frozenset({"HEIF", "JXL"})

USUAL_FORMATS = frozenset({"JPEG", "PNG", "WEBP"})  # most files; tried first

# First bytes of formats that contain images of other formats: Windows icons and cursors, Apple
# icons. Pillow decodes the inner image to find out its size.
_CONTAINERS = (b"\0\0\1\0", b"\0\0\2\0", b"icns")

JPEG_LS_MARKER = b"\xf7"

# Photoshop writes a blank picture if it may not write the real one (resource 1057, VersionInfo).
PSD_VERSION_INFO, PSD_HAS_PICTURE = 1057, 4

JPEG2000_DATA = b"\xff\x93"  # starts the pixels of each tile; a file without it is cut


@functools.cache
def readable_suffixes() -> frozenset[str]:
    """Return the suffixes of all decoded formats, in lower case with the dot."""
    return frozenset(suffix for found in pillow_suffixes().values() for suffix in found)


def pillow_suffixes() -> dict[str, list[str]]:
    """Return the suffixes of each format that Pillow decodes, with the suffixes in order."""
    # MPO has a suffix but no opener of its own: the JPEG opener reads it.
    suffixes: dict[str, list[str]] = {name: [] for name in sorted({*_formats(), "MPO"})}
    for suffix, name in sorted(Image.registered_extensions().items()):
        if name in suffixes:
            suffixes[name].append(suffix)
    return suffixes


def candidate_suffixes() -> frozenset[str]:
    """Return the suffixes of all known formats, also of those whose decoder is not installed."""
    return readable_suffixes().union(*(kind.suffixes for kind in (*KINDS, AVIF)))


def looks_like_image(path: FilePath) -> bool:
    """Return whether the content of a file, whatever its name, is an image of a known format."""
    try:
        with open_regular(path) as file:
            if _kind_of(file) is not None:
                return True
            with Image.open(file, formats=_signed_formats()):
                return True
    except DecodeError as error:
        return error.reason == "no-picture"
    except ValueError:  # the texts of a PNG exceed Pillow's limits; see containers.png
        return _starts_with(path, PNG_START)
    except Image.DecompressionBombError:
        return True
    except Exception:  # not an image, for whatever reason
        return False


def has_decoder(path: FilePath) -> bool:
    """Return whether a file has a format beyond Pillow's own, and its decoder is installed."""
    try:
        with open_regular(path) as file:
            kind = _kind_of(file)
    except (OSError, DecodeError):
        return False
    return kind is not None and is_decodable(kind)


def _kind_of(file: IO[bytes]) -> Kind | None:
    """Return the format of a file that Pillow does not decode by itself, or None. Seeks to 0."""
    head = file.read(HEAD_BYTES)
    kind = RAW if _picture_offset(file, head) == tiff.RAW_FILE else kind_of(head)
    file.seek(0)
    return None if kind == AVIF and is_decodable(AVIF) else kind


def _starts_with(path: FilePath, start: bytes) -> bool:
    with open_regular(path) as file:
        return file.read(len(start)) == start


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return the decoded formats in the order of trying: usual ones first, unsigned ones last."""
    Image.init()
    decoded = (name for name in Image.ID if name not in NOT_DECODED | PLUGIN_FORMATS)
    return tuple(
        sorted(decoded, key=lambda name: (Image.OPEN[name][1] is None, name not in USUAL_FORMATS))
    )


@functools.cache
def _signed_formats() -> tuple[str, ...]:
    """Return the formats with a signature. The others mistake many binary files for images."""
    return tuple(name for name in _formats() if Image.OPEN[name][1] is not None)


def open_image(file: IO[bytes], budget: PixelBudget) -> Image.Image:
    """Open the image in a file. A container that must be decoded for that claims the whole budget.

    Raises:
        DecodeError: The file is empty, not an image, or cut after its header. It has no decoder
            here, or holds no more than a preview.
    """
    head = file.read(HEAD_BYTES)
    if head.startswith(JPEG_START) and not head.startswith(JPEG_LS_MARKER, 3):
        return _open(file)
    offset = _picture_offset(file, head)
    kind = RAW if offset == tiff.RAW_FILE else kind_of(head)
    if kind is not None and not (kind == AVIF and is_decodable(AVIF)):
        return open_kind(kind, file, budget)
    if offset:
        return _open(tiff.open_at(file, offset))
    if not head.startswith(_CONTAINERS):
        return _open(file)
    budget.take(budget.max_pixels)
    try:
        image = _open(file)
        image.load()
        return image
    finally:
        budget.give_back(budget.max_pixels)


def _picture_offset(file: IO[bytes], head: bytes) -> int:
    """Return the directory of a TIFF's picture; see :func:`.tiff.main_picture`."""
    return tiff.main_picture(file) if head[:4] in tiff.TIFF_STARTS else 0


def _open(file: IO[bytes]) -> Image.Image:
    file.seek(0)
    try:
        image = Image.open(file, formats=_formats())
        if image.format == "JPEG2000":
            _check_jpeg2000_data(file)
        elif image.format == "PSD":
            _check_psd_picture(image)
        return image
    except UnidentifiedImageError:
        file.seek(0)
        head = file.read(16)
        if not head:
            raise DecodeError("empty", "the file is empty") from None
        raise DecodeError(
            "not-an-image", f"no image format matches; the file starts with {head!r}"
        ) from None


def _check_jpeg2000_data(file: IO[bytes]) -> None:
    """Refuse a JPEG 2000 file cut after its header, which would be decoded to a gray picture."""
    offset = file.tell()
    file.seek(0)
    tail = b""
    while block := file.read(2**20):
        if JPEG2000_DATA in tail + block:
            file.seek(offset)
            return
        tail = block[-1:]
    raise DecodeError("truncated", "the file ends after its header")


def _check_psd_picture(image: Image.Image) -> None:
    """Refuse a PSD file that was saved without the picture of all layers together."""
    for number, _, content in getattr(image, "resources", ()):
        if number == PSD_VERSION_INFO and content[PSD_HAS_PICTURE : PSD_HAS_PICTURE + 1] == b"\0":
            raise DecodeError(
                "no-picture",
                "the file holds layers only; save it in Photoshop with maximized compatibility",
            )
