"""Decoders of the extras: HEIC, JPEG XL and camera raw. Imported when the first such file comes."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import re
from collections.abc import Iterator
from types import ModuleType
from typing import IO, Any

import numpy as np
from PIL import Image, features

from extractor.errors import DecodeError
from extractor.images.budget import PixelBudget
from extractor.images.containers.boxes import ends_early
from extractor.images.containers.kinds import AVIF, HEIF, JXL, RAW, Kind
from extractor.text import first_line

__all__ = ["is_decodable", "open_kind"]

# Pixels of the budget that LibRaw's buffers are worth: 14 bytes per pixel instead of 4.
RAW_COST = 4

# Ratios of width to height in the header of JPEG XL (ISO/IEC 18181-1, SizeHeader).
JXL_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
JXL_BITS = (9, 13, 18, 30)
JXL_CODESTREAM = b"\xff\x0a"
MAX_JXL_BOXES = 1000

ENDS_EARLY = re.compile("end of file|premature|incomplete|input/output|not enough", re.IGNORECASE)


def is_decodable(kind: Kind) -> bool:
    """Return whether files of a format can be decoded, without importing the decoder."""
    if kind == AVIF:
        return bool(features.check("avif"))
    with contextlib.suppress(ImportError, ValueError):
        return bool(kind.module) and importlib.util.find_spec(kind.module) is not None
    return False


def open_kind(kind: Kind, file: IO[bytes], budget: PixelBudget) -> Image.Image:
    """Open an image of a format that Pillow does not decode by itself.

    Raises:
        DecodeError: Its decoder is not installed, or refuses the file.
    """
    if kind == AVIF:
        raise DecodeError("no-decoder", "AVIF needs another build of Pillow: pip install -U pillow")
    if not kind.module:
        raise DecodeError(
            "no-decoder", f"{kind.name} has no decoder here; convert the file to PNG or TIFF"
        )
    module = _import(kind)
    opened = {HEIF: _open_heif, JXL: _open_jxl, RAW: _open_raw}[kind]
    file.seek(0)
    with _with_reasons(kind):
        return opened(module, file, budget)


@functools.cache
def _import(kind: Kind) -> ModuleType:
    """Return the module that decodes a format. Python lets one thread import it."""
    advice = f"pip install 'backbone-extractor[{kind.extra}]'"
    try:
        return importlib.import_module(kind.module)
    except ModuleNotFoundError as error:
        if error.name != kind.module:
            raise _broken(kind, error) from error
        raise DecodeError("no-decoder", f"{kind.name} needs {kind.package}: {advice}") from None
    except Exception as error:  # a library is missing, or has another version
        raise _broken(kind, error) from error


def _broken(kind: Kind, error: Exception) -> DecodeError:
    return DecodeError(
        "no-decoder",
        f"{kind.name} needs {kind.package}, which cannot be imported: {first_line(error)}",
    )


@contextlib.contextmanager
def _with_reasons(kind: Kind) -> Iterator[None]:
    """Turn the errors of a decoder into a ``DecodeError`` with a documented reason."""
    try:
        yield
    except (DecodeError, MemoryError, Image.DecompressionBombError):
        raise
    except Exception as error:  # each decoder has errors of its own
        message = f"{kind.package}: {_text_of(error)}"
        name = type(error).__name__
        if name in ("LibRawUnsufficientMemoryError", "LibRawMemPoolOverflowError"):
            raise DecodeError("out-of-memory", message) from error
        if name in ("LibRawFileUnsupportedError", "LibRawNotImplementedError"):
            raise DecodeError("unsupported", f"{message}; a newer version may know it") from error
        if "ecurity limit" in message:  # of libheif
            raise DecodeError("too-large", message) from error
        reason = "truncated" if ENDS_EARLY.search(str(error)) else "corrupt"
        raise DecodeError(reason, message) from error


def _text_of(error: Exception) -> str:
    """Return the message of an error; LibRaw's are bytes, and libjxl's is advice for builders."""
    if error.args and isinstance(error.args[0], bytes):
        return error.args[0].decode("ascii", "replace")
    text = first_line(error)
    return "the data is damaged or cut" if text.startswith("Generic Error") else text


def _open_heif(module: Any, file: IO[bytes], budget: PixelBudget) -> Image.Image:
    """Decode the primary image of a HEIC file, upright; its EXIF orientation reads 1."""
    if ends_early(file):  # libheif leaves tiles gray that lie behind the end
        raise DecodeError("truncated", "the file ends before its image data")
    file.seek(0)
    image: Image.Image = module.HeifImageFile(file)
    with budget.claim(image.width, image.height):
        image.load()
    return image


def _open_jxl(module: Any, file: IO[bytes], budget: PixelBudget) -> Image.Image:
    """Decode a JPEG XL file, or open the JPEG that it was made of."""
    content = file.read()
    header = _JxlHeader(content)
    if header.is_animated:  # the plugin decodes all frames and returns the last one
        raise DecodeError("unsupported", f"{JXL.package} cannot decode the first frame alone")
    with budget.claim(*header.size):
        jpeg, info, data, *_ = module.Decoder(num_threads=0)(content)
    if jpeg:
        return Image.open(io.BytesIO(data), formats=["JPEG"])
    size, mode = (info.width, info.height), info.mode
    if mode == "F;16":
        return Image.fromarray(
            np.frombuffer(data, np.float16).reshape(size[::-1]).astype(np.float32)
        )
    return Image.frombytes(mode, size, data)


class _JxlHeader:
    """Start of a JPEG XL codestream (ISO/IEC 18181-1, annex D).

    Args:
        content: Content of the file, with boxes or without.

    Attributes:
        size: Width and height as stored; the orientation may swap them.
        is_animated: Whether the file may hold several frames.
    """

    def __init__(self, content: bytes) -> None:
        if not content.startswith(JXL_CODESTREAM):
            content = _jxl_codestream(content)
        self._bits = int.from_bytes(content[2:64], "little")
        self.size = self._read_size()
        self.is_animated = False
        if not self._read(1) and self._read(1):  # not all default, and with extra fields
            self._read(3)  # orientation
            if self._read(1):  # intrinsic size
                self._read_size()
            if self._read(1):  # a preview comes before the animation
                self._read_preview()
            self.is_animated = bool(self._read(1))

    def _read(self, count: int) -> int:
        value = self._bits & (1 << count) - 1
        self._bits >>= count
        return value

    def _read_size(self) -> tuple[int, int]:
        def read_length() -> int:
            return 8 * (self._read(5) + 1) if small else self._read(JXL_BITS[self._read(2)]) + 1

        small = self._read(1)
        height = read_length()
        if ratio := self._read(3):
            across, down = JXL_RATIOS[ratio - 1]
            return height * across // down, height
        return read_length(), height

    def _read_preview(self) -> None:
        # Each length is one of two values, or of a few bits.
        bits = (0, 0, 5, 9) if self._read(1) else (6, 8, 10, 12)
        self._read(bits[self._read(2)])
        if not self._read(3):
            self._read(bits[self._read(2)])


def _jxl_codestream(content: bytes) -> bytes:
    """Return the start of the codestream in the boxes of a JPEG XL file (ISO/IEC 18181-2)."""
    offset = 0
    for _ in range(MAX_JXL_BOXES):
        length, kind = (
            int.from_bytes(content[offset : offset + 4], "big"),
            content[offset + 4 :][:4],
        )
        start = offset + (16 if length == 1 else 8)
        if length == 1:
            length = int.from_bytes(content[offset + 8 : offset + 16], "big")
        if kind == b"jxlc":
            return content[start : start + 64]
        if kind == b"jxlp":  # a part, behind its number
            return content[start + 4 : start + 68]
        if length < 8:  # zero: to the end of the file
            break
        offset += length
    raise DecodeError("truncated", "the JPEG XL file ends before its codestream")


def _open_raw(module: Any, file: IO[bytes], budget: PixelBudget) -> Image.Image:
    """Develop a camera's raw file: its own white balance, sRGB, 8 bits, upright."""
    with module.RawPy() as raw:
        raw.open_buffer(file)
        sizes = raw.sizes
        pixels = max(sizes.raw_width, sizes.width) * max(sizes.raw_height, sizes.height)
        with budget.claim(sizes.width, sizes.height):
            pass  # larger than the limit: refused
        cost = min(RAW_COST * pixels, budget.max_pixels)
        budget.take(cost)
        try:
            raw.unpack()
            picture = raw.postprocess(use_camera_wb=True, output_bps=8)
        finally:
            budget.give_back(cost)
    return Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
