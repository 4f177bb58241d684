"""Image formats: which of them are decoded, their suffixes, and opening a file by its content."""

from __future__ import annotations

import functools
from typing import IO

from PIL import Image, UnidentifiedImageError

from extractor.errors import DecodeError
from extractor.images.budget import PixelBudget
from extractor.images.files import open_regular
from extractor.images.png import PNG_START
from extractor.images.types import FilePath

__all__ = ["looks_like_image", "open_image", "readable_suffixes"]

# Pillow names these formats but does not decode them by itself. It reads only the metadata of BUFR,
# GRIB, HDF5, MPEG and (outside Windows) WMF. For EPS it would run Ghostscript on an untrusted file.
# IPTC can hold any other file, of any size.
NOT_DECODED = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"})

USUAL_FORMATS = frozenset({"JPEG", "PNG", "WEBP"})  # most files; tried first

# First bytes of formats that contain images of other formats: Windows icons and cursors, Apple
# icons. Pillow decodes the inner image to find out its size.
_CONTAINERS = (b"\0\0\1\0", b"\0\0\2\0", b"icns")

JPEG2000_DATA = b"\xff\x93"  # starts the pixels of each tile; a file without it is cut


@functools.cache
def readable_suffixes() -> frozenset[str]:
    """Return the suffixes of all decoded formats, in lower case with the dot."""
    # MPO has a suffix but no opener of its own: the JPEG opener reads it.
    names = {*_formats(), "MPO"}
    return frozenset(
        suffix for suffix, name in Image.registered_extensions().items() if name in names
    )


def looks_like_image(path: FilePath) -> bool:
    """Return whether the content of a file, whatever its name, is an image of a decoded format."""
    try:
        with open_regular(path) as file, Image.open(file, formats=_signed_formats()):
            return True
    except ValueError:  # the texts of a PNG exceed Pillow's limits; see extractor.images.png
        return _starts_with(path, PNG_START)
    except Exception:  # not an image, for whatever reason
        return False


def _starts_with(path: FilePath, start: bytes) -> bool:
    with open_regular(path) as file:
        return file.read(len(start)) == start


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return the decoded formats in the order of trying: usual ones first, unsigned ones last."""
    Image.init()
    decoded = (name for name in Image.ID if name not in NOT_DECODED)
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
        DecodeError: The file is empty, not an image, or cut after its header.
    """
    head = file.read(4)
    file.seek(0)
    if head not in _CONTAINERS:
        return _open(file)
    budget.take(budget.max_pixels)
    try:
        image = _open(file)
        image.load()
        return image
    finally:
        budget.give_back(budget.max_pixels)


def _open(file: IO[bytes]) -> Image.Image:
    try:
        image = Image.open(file, formats=_formats())
        if image.format == "JPEG2000":
            _check_jpeg2000_data(file)
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
