"""One image, from whatever holds it, to RGB uint8 pixels at the model's input size."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import math
import os
import re
import stat
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageFile, UnidentifiedImageError

from extractor.errors import DecodeError
from extractor.images.render import Stored, can_resize_whole, draw
from extractor.options import DECODE, MAX_PIXELS
from extractor.preprocess import Preprocess

__all__ = [
    "EncodedImage",
    "EncodedJpeg",
    "Failure",
    "ImageInfo",
    "ImageSource",
    "PixelBudget",
    "ReadFile",
    "allow_pixels",
    "decode_into",
    "digest_of",
    "looks_like_image",
    "open_regular",
    "plain_jpeg",
    "read_file",
    "readable_suffixes",
]

FilePath: TypeAlias = "str | bytes | os.PathLike[str]"
"""As ``bytes``, too: not every name is text."""

ImageSource: TypeAlias = "FilePath | ReadFile | EncodedImage | Image.Image | npt.NDArray[np.uint8]"
"""A path, what :func:`read_file` read there, an encoded or a decoded image."""

# Formats that Pillow names but does not decode by itself: metadata only (BUFR, GRIB, HDF5, MPEG,
# WMF outside Windows), and EPS, for which it would run Ghostscript on a file of unknown origin.
# IPTC holds any other file, of whatever size.
NOT_DECODED = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"})

USUAL = frozenset({"JPEG", "PNG", "WEBP"})  # the formats of most files
LIBJPEG = frozenset({"JPEG", "MPO"})  # those that libjpeg decodes

# Begin files that hold images in other formats, which Pillow decodes to see how large they are:
# Windows icons and cursors, Apple icons.
_HOLD_OTHERS = (b"\0\0\1\0", b"\0\0\2\0", b"icns")

# How the decoders say that a file ends too early.
_ENDS_EARLY = re.compile("trunca|not enough", re.IGNORECASE)

JPEG2000_DATA = b"\xff\x93"  # begins the pixels of each tile; a file without any is cut

# Of a JPEG file (ITU-T T.81), and the sampling of its brightness and its two colours that every
# decoder knows: 4:4:4, 4:2:2 and 4:2:0.
JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
JPEG_CODES, JPEG_STEPS, JPEG_SCAN = 0xC4, 0xDB, 0xDA
JPEG_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
PLAIN_SAMPLINGS = [[(across, down), (1, 1), (1, 1)] for across, down in ((1, 1), (2, 1), (2, 2))]

# Larger files are read by Pillow piece by piece and not into memory first.
READ_WHOLE_BYTES = 64 * 2**20

# Of the pixels that a picture has, along each edge, so many at least are decoded of a larger JPEG.
# The mean difference to the whole is under 1 of 255 levels then (docs/performance.md).
SHRINK_TO = 2

EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class EncodedImage:
    """The bytes of an image file, told apart from a path given as bytes."""

    data: bytes


@dataclass(frozen=True)
class ReadFile:
    """The bytes of an image file with its size and time of modification."""

    path: FilePath
    content: bytes
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class EncodedJpeg:
    """A file that another decoder may decode, and how the image lies in it."""

    file: ReadFile
    stored: Stored


@dataclass(frozen=True)
class ImageInfo:
    """What was seen while one image was decoded.

    ``size`` in bytes, ``mtime_ns`` and ``sha256`` are those of the open file (-1, -1 and nothing
    where there is none); ``width`` and ``height`` in pixels as the image is looked at, after its
    EXIF orientation.
    """

    size: int
    mtime_ns: int
    width: int
    height: int
    sha256: bytes = b""


@dataclass(frozen=True)
class Failure:
    """Why one image has no row: a short word for programs and a sentence for people.

    A value and not the exception itself, which would keep the decoder's frames, and with them
    whole images, alive. ``size`` and ``mtime_ns`` are those of the file, -1 where there is none.
    """

    reason: str
    message: str
    size: int = -1
    mtime_ns: int = -1


class PixelBudget:
    """How many pixels may be in decoders at a time, over all threads that share it.

    So the memory of a run is bounded, whatever the files say and however many threads there are.
    """

    def __init__(self, max_pixels: int) -> None:
        self.max_pixels = max_pixels
        self._left = max_pixels
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def claim(self, width: int, height: int) -> Iterator[None]:
        """Wait until an image fits in with those that are being decoded.

        Raises:
            DecodeError: it never will.
        """
        pixels = width * height
        if pixels > self.max_pixels:
            raise DecodeError(
                "too-large",
                f"{width} x {height} are {pixels} pixels, more than the {self.max_pixels} that are "
                "allowed; see --max-pixels",
            )
        self.take(pixels)
        try:
            yield
        finally:
            self.give_back(pixels)

    def take(self, pixels: int) -> None:
        """Wait until there is room for so many, and take it."""
        with self._changed:
            self._changed.wait_for(lambda: self._left >= pixels)
            self._left -= pixels

    def give_back(self, pixels: int) -> None:
        """Let others have what was taken."""
        with self._changed:
            self._left += pixels
            self._changed.notify_all()


def allow_pixels(max_pixels: int) -> None:
    """Let Pillow itself refuse what declares more, also inside of formats that hold others.

    Its own limit is lower than our default. It is a setting of the whole process, so a program
    decides it, not a library.
    """
    Image.MAX_IMAGE_PIXELS = (max_pixels + 1) // 2  # Pillow refuses what is more than twice as much


_Pictures: TypeAlias = Sequence[tuple[Preprocess, npt.NDArray[np.uint8]]]


def decode_into(
    source: ImageSource,
    preprocesses: Sequence[Preprocess],
    outs: Sequence[npt.NDArray[np.uint8]],
    budget: PixelBudget | None = None,
    how: str = DECODE,
) -> ImageInfo:
    """Decode one image once, orient, resize and crop it into each of ``outs``; say what it was.

    Args:
        source: a path or what was read there, :class:`EncodedImage`, a PIL image, or a uint8 array
            ``(H, W)`` or ``(H, W, 1 | 3 | 4)`` in RGB order.
        preprocesses: how each of the pictures is made.
        outs: for each, ``(height, width, 3)`` uint8 of its ``input_size``, written in place, RGB.
        budget: what images may hold before they are resized; one that declares more is not
            decoded. Calls that share one wait for each other where they would exceed it together.
        how: ``scaled`` lets libjpeg shrink what is much larger than all pictures, all else decodes
            every pixel.

    Raises:
        DecodeError: this image has no pixels to give; ``outs`` may have been touched.
        TypeError, ValueError: ``source`` or ``outs`` is not as it says above.
    """
    for preprocess, out in zip(preprocesses, outs, strict=True):
        if out.shape != (*preprocess.input_size, 3) or out.dtype != np.uint8:
            raise ValueError(
                f"out: got {out.dtype} {out.shape}, expected uint8 {(*preprocess.input_size, 3)}"
            )
    pictures = tuple(zip(preprocesses, outs, strict=True))
    budget = budget or PixelBudget(MAX_PIXELS)
    if isinstance(source, (str, bytes, os.PathLike)):
        source = read_file(source)
    if isinstance(source, ReadFile):
        return _decode_read(source, pictures, budget, how)
    if isinstance(source, (str, bytes, os.PathLike)):
        return _decode_large(source, pictures, budget, how)
    if not isinstance(source, (EncodedImage, Image.Image, np.ndarray)):
        raise TypeError(f"source: got {type(source).__name__}, expected a path or an image")
    with _decode_errors():
        if isinstance(source, EncodedImage):
            shown = _decode_held(source.data, pictures, budget, how)
            return ImageInfo(len(source.data), -1, *shown)
        image = source if isinstance(source, Image.Image) else _from_array(source)
        # Every pixel: to have it decoded smaller would change the caller's image.
        return ImageInfo(-1, -1, *_place(image, pictures, budget, "exact"))


def read_file(path: FilePath, most: int = READ_WHOLE_BYTES) -> ReadFile | FilePath:
    """The bytes of an image file; the path itself where they are more than ``most``.

    Raises:
        DecodeError: it cannot be read.
    """
    with _stat_known(path), _decode_errors(), open_regular(path) as file:
        status = os.fstat(file.fileno())
        if status.st_size > min(most, READ_WHOLE_BYTES):
            return path
        return ReadFile(path, file.read(), status.st_size, status.st_mtime_ns)


def _decode_read(file: ReadFile, pictures: _Pictures, budget: PixelBudget, how: str) -> ImageInfo:
    try:
        with _decode_errors():
            width, height = _decode_held(file.content, pictures, budget, how)
    except DecodeError as error:
        error.size, error.mtime_ns = file.size, file.mtime_ns
        raise
    digest = hashlib.sha256(file.content).digest()
    return ImageInfo(file.size, file.mtime_ns, width, height, digest)


def _decode_held(
    content: bytes, pictures: _Pictures, budget: PixelBudget, how: str
) -> tuple[int, int]:
    """Decode a file in memory; returns the width and the height of the image as it is looked at."""
    try:
        with _identified(io.BytesIO(content), budget) as image:
            if isinstance(image, ImageFile.ImageFile) and image.format in LIBJPEG:
                # All at once: of the pieces of 64 KiB that Pillow takes by default, libjpeg decodes
                # the end of each with its slower way for data that may end at any bit.
                image.decodermaxblock = max(len(content), image.decodermaxblock)
            return _place(image, pictures, budget, how)
    except OSError:
        if not content.startswith(JPEG_START):
            raise
    # In pieces, Pillow takes an image whose end is missing and has something else in its place.
    with _identified(io.BytesIO(content), budget) as image:
        return _place(image, pictures, budget, how)


def plain_jpeg(
    file: ReadFile, preprocesses: Sequence[Preprocess], max_pixels: int
) -> tuple[ImageInfo, EncodedJpeg] | None:
    """What a JPEG is, where any decoder would make the same pictures of it; None for all others.

    That is: sequential, whole to its last marker, grey or in the usual colours and sampling, and
    resized by a filter that torch has.
    """
    content = file.content
    if not _is_sequential(content) or not content.rstrip(b"\0").endswith(JPEG_END):
        return None
    try:
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
            if image.format != "JPEG" or not _is_plain(image.info, getattr(image, "layer", ())):
                return None
            stored = Stored(image.width, image.height, _orientation(image))
    except Exception:  # whatever it is, the one who decodes it will say
        return None
    width, height = stored.upright
    fast = all(
        can_resize_whole(one.geometry(width, height), one.interpolation) for one in preprocesses
    )
    if not fast or width * height > max_pixels:
        return None
    digest = hashlib.sha256(content).digest()
    return ImageInfo(file.size, file.mtime_ns, width, height, digest), EncodedJpeg(file, stored)


def _is_sequential(content: bytes) -> bool:
    """Whether a file is one image of one sequential frame with Huffman codes and its own tables."""
    place, seen = 2, []
    if not content.startswith(JPEG_START):
        return False
    while content[place : place + 1] == b"\xff" and place + 4 <= len(content):
        marker = content[place + 1]
        seen.append(marker)
        place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
        if marker == JPEG_SCAN:
            frames = [one for one in seen if one in JPEG_FRAMES]
            whole = {JPEG_CODES, JPEG_STEPS} <= set(seen) and len(frames) == 1
            # Inside of the scan 0xff is followed by a zero, or by the marker of a restart.
            return whole and frames[0] in (0xC0, 0xC1) and JPEG_START[:2] not in content[place:]
    return False


def _is_plain(info: Mapping[str | tuple[int, int], Any], layers: Sequence[Sequence[int]]) -> bool:
    """Whether a JPEG is sequential and grey or YCbCr, its colours halved along no or some edges."""
    names, sampling = [one[0] for one in layers], [tuple(one[1:3]) for one in layers]
    if info.get("adobe_transform", 1) != 1:
        return False
    if len(layers) == 1:
        return sampling == [(1, 1)]
    return names == [1, 2, 3] and sampling in PLAIN_SAMPLINGS


def _decode_large(path: FilePath, pictures: _Pictures, budget: PixelBudget, how: str) -> ImageInfo:
    """Decode a file that Pillow reads piece by piece."""
    with _stat_known(path), _decode_errors(), open_regular(path) as file:
        status = os.fstat(file.fileno())
        digest = _digest_of(file).digest()
        with _identified(file, budget) as image:
            width, height = _place(image, pictures, budget, how)
        return ImageInfo(status.st_size, status.st_mtime_ns, width, height, digest)


@contextlib.contextmanager
def _stat_known(path: FilePath) -> Iterator[None]:
    """Let an error say which file it was that could not be decoded."""
    try:
        yield
    except DecodeError as error:
        with contextlib.suppress(OSError, ValueError):
            status = os.stat(path)
            error.size, error.mtime_ns = status.st_size, status.st_mtime_ns
        raise


@contextlib.contextmanager
def _decode_errors() -> Iterator[None]:
    try:
        yield
    except DecodeError:
        raise
    except OSError as error:
        if error.errno is not None:
            raise DecodeError("unreadable", error.strerror or str(error)) from error
        reason = "truncated" if _ENDS_EARLY.search(str(error)) else "corrupt"
        raise DecodeError(reason, str(error)) from error
    except Image.DecompressionBombError as error:
        raise DecodeError("too-large", str(error)) from error
    except MemoryError as error:
        raise DecodeError("out-of-memory", "the decoded image does not fit in memory") from error
    except Exception as error:  # decoders meet hostile bytes and raise whatever they like
        raise DecodeError("corrupt", f"{type(error).__name__}: {error}") from error


def digest_of(path: bytes) -> bytes:
    """SHA-256 of a regular file; nothing where it cannot be read."""
    try:
        with open_regular(path) as file:
            return _digest_of(file).digest()
    except (OSError, DecodeError):
        return b""


def _digest_of(file: IO[bytes]) -> hashlib._Hash:
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    file.seek(0)
    return digest


@functools.cache
def readable_suffixes() -> frozenset[str]:
    """Every file ending, in lower case with its dot, of a format that is decoded here."""
    formats = _formats()
    named = Image.registered_extensions().items()
    # MPO has an ending but no entry of its own: the JPEG reader takes it.
    return frozenset(suffix for suffix, name in named if name in {*formats, "MPO"})


def looks_like_image(path: bytes) -> bool:
    """Whether the content of a file, whatever its name, is an image that can be decoded here."""
    try:
        with open_regular(path) as file, Image.open(file, formats=_signed_formats()):
            return True
    except Exception:  # no image, for whatever reason
        return False


@functools.cache
def _formats() -> tuple[str, ...]:
    """In the order in which they are tried: the usual ones, and last those without a signature."""
    Image.init()
    every = (name for name in Image.ID if name not in NOT_DECODED)
    return tuple(sorted(every, key=lambda name: (Image.OPEN[name][1] is None, name not in USUAL)))


@functools.cache
def _signed_formats() -> tuple[str, ...]:
    """Formats that are told by a signature; the others take many a binary file for an image."""
    return tuple(name for name in _formats() if Image.OPEN[name][1] is not None)


def open_regular(path: str | bytes | os.PathLike[str]) -> IO[bytes]:
    """Open a regular file; a pipe, a device or a folder is refused without waiting for it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError as error:  # no path can hold a zero byte
        raise DecodeError("unreadable", str(error)) from error
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        kind = _kind(os.stat(path).st_mode)
        raise DecodeError("not-a-file", f"expected a regular file, got {kind}") from error
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise DecodeError("not-a-file", f"expected a regular file, got {_kind(mode)}")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")


def _identified(file: IO[bytes], budget: PixelBudget) -> Image.Image:
    """The image in a file, not yet decoded; what has to be decoded for that claims its pixels."""
    head = file.read(4)
    file.seek(0)
    if head not in _HOLD_OTHERS:
        return _identify(file)
    budget.take(budget.max_pixels)
    try:
        image = _identify(file)
        image.load()
        return image
    finally:
        budget.give_back(budget.max_pixels)


def _identify(file: IO[bytes]) -> Image.Image:
    try:
        image = Image.open(file, formats=_formats())
        if image.format == "JPEG2000":
            _check_data(file)
        return image
    except UnidentifiedImageError:
        file.seek(0)
        head = file.read(16)
        if not head:
            raise DecodeError("empty", "the file is empty") from None
        raise DecodeError(
            "not-an-image", f"no image format that is decoded here starts with {head!r}"
        ) from None


def _check_data(file: IO[bytes]) -> None:
    """The decoder makes a grey picture of a JPEG 2000 file that is cut behind its header."""
    place = file.tell()
    file.seek(0)
    tail = b""
    while block := file.read(2**20):
        if JPEG2000_DATA in tail + block:
            file.seek(place)
            return
        tail = block[-1:]
    raise DecodeError("truncated", "the file ends behind its header")


def _from_array(array: npt.NDArray[np.uint8]) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or 0 in array.shape:
        raise DecodeError(
            "not-an-image",
            f"expected a uint8 array (H, W) or (H, W, 1|3|4), got {array.dtype} {array.shape}",
        )
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4):
        raise DecodeError("not-an-image", f"expected 1, 3 or 4 channels last, got {array.shape}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(array))


def _place(
    image: Image.Image, pictures: _Pictures, budget: PixelBudget, how: str
) -> tuple[int, int]:
    """Draw all pictures of an image; returns its width and height, the right way up."""
    with budget.claim(image.width, image.height):
        shrunk = 1
        if image.format in LIBJPEG:
            stored = Stored(*image.size, _orientation(image))
            if how == "scaled":
                shrunk = _shrink(image, pictures, stored)
            image.load()
        else:
            image.load()  # where some formats turn themselves, or find how they are to be turned
            stored = Stored(*image.size, _orientation(image))
        rgb = _to_rgb(image)
        for preprocess, out in pictures:
            draw(rgb, preprocess, out, stored, shrunk)
    return stored.upright


def _shrink(image: Image.Image, pictures: _Pictures, stored: Stored) -> int:
    """Let libjpeg decode a JPEG at a half, a quarter or an eighth of its size; says by how much.

    No picture is made of less than :data:`SHRINK_TO` times its pixels along each edge.
    """
    width, height = stored.upright
    spare = math.inf
    for preprocess, _ in pictures:
        if preprocess.interpolation == "nearest":
            return 1
        (left, top, right, bottom), size = preprocess.geometry(width, height)[:2]
        spare = min(spare, (right - left) / size[0], (bottom - top) / size[1])
    scale = next((n for n in (8, 4, 2) if n * SHRINK_TO <= spare), 1)
    if scale == 1:
        return 1
    drafted = image.draft(image.mode, (stored.width // scale, stored.height // scale))
    return 1 if drafted is None else round(stored.width / drafted[1][2])


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(EXIF_ORIENTATION, 1)
    except (SyntaxError, ValueError, TypeError, KeyError, OSError, EOFError, struct.error):
        return 1  # a photo with a broken EXIF block is still a photo
    return value if value in range(1, 9) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """The image in mode RGB, 8 bits a channel, alpha dropped, looking like itself."""
    mode = image.mode
    if mode == "RGB":
        return image
    if mode.startswith("I;16"):
        # The high byte, as Pillow takes it of 16-bit RGB; `convert` would clip at 255 instead.
        return _grey(np.asarray(image) >> 8)
    if mode in ("I", "F"):
        return _grey(_to_levels(np.asarray(image)))
    if mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        if converted is None:
            raise DecodeError("corrupt", "the LAB colours cannot be converted to sRGB")
        return converted
    return image.convert("RGB")


def _to_levels(values: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    """32-bit grey values as levels 0..255.

    The range is not in the file, so the usual ones are tried: 0..1 (floats only), 0..255 (floats
    only), 0..65535; whatever lies outside is stretched from its least to its greatest value.
    """
    levels = values.astype(np.float32)
    np.nan_to_num(levels, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    least, greatest = float(levels.min()), float(levels.max())
    floating = values.dtype.kind == "f"
    if least >= 0 and floating and greatest <= 1:
        levels *= 255
    elif least >= 0 and floating and greatest <= 255:
        pass
    elif least >= 0 and greatest <= 65_535:
        levels /= 256
    else:
        levels -= least
        levels *= 255 / (greatest - least or 1)
    return levels


def _grey(levels: npt.NDArray[np.generic]) -> Image.Image:
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
