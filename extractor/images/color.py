"""Conversion of every color mode of Pillow to 8-bit RGB."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from extractor.errors import DecodeError
from extractor.preprocess import GRAY_BITS, GrayBits

__all__ = ["to_rgb"]

Values: TypeAlias = "npt.NDArray[Any]"


BITS_PER_SAMPLE = 258  # tag of TIFF


def to_rgb(image: Image.Image, gray_bits: GrayBits = GRAY_BITS) -> Image.Image:
    """Return an image in mode RGB, 8 bits per channel. Alpha is dropped.

    Colors that are multiplied by alpha are divided by it first.

    Args:
        image: A loaded image of any mode.
        gray_bits: Bits that gray values of more than 8 bits take up, or ``minmax``; see
            :class:`~extractor.preprocess.Preprocess`.

    Raises:
        DecodeError: The colors cannot be converted.
    """
    mode = image.mode
    if mode == "RGB":
        return image
    if mode.startswith("I;16") or mode in ("I", "F"):
        if gray_bits == GRAY_BITS:
            gray_bits = _declared_bits(image)
        return _gray(_to_levels(np.asarray(image), gray_bits))
    if mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        if converted is None:
            raise DecodeError("corrupt", "the LAB colors cannot be converted to sRGB")
        return converted
    if mode == "La":  # premultiplied; Pillow converts it to LA only, and RGBa to RGB by itself
        return image.convert("LA").convert("RGB")
    return image.convert("RGB")


def _declared_bits(image: Image.Image) -> GrayBits:
    """Return 12 for a TIFF that packs its values into 12 bits, which Pillow unpacks unscaled."""
    tags = getattr(image, "tag_v2", {})
    return 12 if tags.get(BITS_PER_SAMPLE) == (12,) else GRAY_BITS


def _to_levels(values: Values, gray_bits: GrayBits) -> Values:
    """Return gray values of more than 8 bits as levels 0..255."""
    if gray_bits == "minmax":
        return _stretched(values)
    if values.dtype.kind == "u":
        # Keep the highest 8 bits, as Pillow does for 16-bit RGB. `convert` would clip at 255.
        return np.asarray(np.minimum(values >> (gray_bits - 8), 255))
    if gray_bits == GRAY_BITS:
        return _guessed_range(values)
    if values.dtype.kind == "f":
        values = np.nan_to_num(values, nan=0.0)
        if values.min() >= 0 and values.max() <= 1:
            return np.asarray(values * np.float32(255))
    return np.asarray(np.clip(values / np.float32(2 ** (gray_bits - 8)), 0, 255))


def _stretched(values: Values) -> Values:
    """Return values scaled from their finite minimum and maximum to 0..255."""
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    lowest, highest = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    levels = (values - np.float64(lowest)) * (255 / (highest - lowest or 1))
    return np.asarray(np.rint(np.clip(np.nan_to_num(levels, nan=0.0), 0, 255)))


def _guessed_range(values: Values) -> Values:
    """Return 32-bit gray values as levels 0..255.

    The file does not say its range, so the usual ones are tried: 0..1 (floats only), 0..255 (floats
    only), 0..65535. Values outside of these are stretched from their minimum to their maximum.
    """
    levels = values.astype(np.float32)
    np.nan_to_num(levels, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    lowest, highest = float(levels.min()), float(levels.max())
    floating = values.dtype.kind == "f"
    if lowest >= 0 and floating and highest <= 1:
        levels *= 255
    elif lowest >= 0 and floating and highest <= 255:
        pass
    elif lowest >= 0 and highest <= 65_535:
        levels /= 256
    else:
        levels -= lowest
        levels *= 255 / (highest - lowest or 1)
    return levels


def _gray(levels: Values) -> Image.Image:
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
