"""Conversion of every color mode of Pillow to 8-bit RGB."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from extractor.errors import DecodeError

__all__ = ["to_rgb"]


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image in mode RGB, 8 bits per channel. Alpha is dropped.

    Raises:
        DecodeError: The colors cannot be converted.
    """
    mode = image.mode
    if mode == "RGB":
        return image
    if mode.startswith("I;16"):
        # Keep the high byte, as Pillow does for 16-bit RGB. `convert` would clip at 255 instead.
        return _gray(np.asarray(image) >> 8)
    if mode in ("I", "F"):
        return _gray(_to_levels(np.asarray(image)))
    if mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        if converted is None:
            raise DecodeError("corrupt", "the LAB colors cannot be converted to sRGB")
        return converted
    return image.convert("RGB")


def _to_levels(values: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
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


def _gray(levels: npt.NDArray[np.generic]) -> Image.Image:
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
