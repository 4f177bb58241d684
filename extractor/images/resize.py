"""The filter that makes pictures smaller: torch's, on bytes, which uses the processor's vectors.

The same convolution as Pillow's, with the same fixed-point weights, at a quarter of its time.
"""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

if TYPE_CHECKING:
    import torch

__all__ = ["FILTERS", "is_fast", "resize"]

FILTERS = ("bilinear", "bicubic")  # that torch has; with antialias, as Pillow always does it

PYBUF_WRITE = 0x200  # of memory that may be written to, memoryobject.h


def is_fast() -> bool:
    """Whether the filter has vectors for this processor: else it takes longer than Pillow's.

    It has them for AVX2 alone (torch 2.11 to 2.15). Without them it took 4.2 ms for a photo where
    Pillow took 1.6, and would start threads of its own in every thread that decodes.
    """
    from extractor.system.cpu import has_avx2

    return has_avx2()


def resize(
    rgb: Image.Image, size: tuple[int, int], shares: tuple[float, float], interpolation: str
) -> npt.NDArray[np.uint8]:
    """Resize a picture.

    Args:
        rgb: in mode RGB.
        size: (width, height) of what comes of it.
        shares: pixels of ``rgb`` that go into one, along its width and its height.
        interpolation: one of :data:`FILTERS`.

    Returns:
        ``(height, width, 3)`` uint8.

    Raises:
        MemoryError: there is none for it.
    """
    import torch  # here: what only looks at files must not wait for it

    across, down = shares
    filter_ = getattr(torch.ops.aten, f"_upsample_{interpolation}2d_aa")
    pixels, memory = _pixels(rgb)
    # Channels last in, channels last out: the way that is vectorised.
    try:
        resized = filter_(pixels.permute(0, 3, 1, 2), size[::-1], False, 1 / down, 1 / across)
    except RuntimeError as error:
        if "allocate memory" in str(error):
            raise MemoryError from error
        raise
    del memory  # until now it was read
    picture: npt.NDArray[np.uint8] = resized.numpy()[0, :3].transpose(1, 2, 0)
    return picture


def _pixels(rgb: Image.Image) -> tuple[torch.Tensor, object]:
    """``(1, H, W, C)`` uint8 whose first three channels are the image, and what owns its memory.

    That is Pillow's own, of four bytes a pixel, where it lies in one piece; else a copy.
    """
    import torch

    found = _memory_of(rgb)
    owner: Any
    if found is not None:
        (address, owner), channels = found, 4
    else:
        owner = np.asarray(rgb)
        address, channels = owner.ctypes.data, 3
    shape = (1, rgb.height, rgb.width, channels)
    # As if it could be written to, since torch warns of what cannot; here it is only read.
    memory = _memory_at(address, math.prod(shape), PYBUF_WRITE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(shape), owner


class _ArrowArray(ctypes.Structure):
    """Of the Arrow C data interface, https://arrow.apache.org/docs/format/CDataInterface.html."""


_ArrowArray._fields_ = [
    ("length", ctypes.c_int64),
    ("null_count", ctypes.c_int64),
    ("offset", ctypes.c_int64),
    ("n_buffers", ctypes.c_int64),
    ("n_children", ctypes.c_int64),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_ArrowArray))),
    ("dictionary", ctypes.c_void_p),
    ("release", ctypes.c_void_p),
    ("private_data", ctypes.c_void_p),
]

# Not an array of ctypes, which would be a new type for every number of pixels.
_memory_at = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    ("PyMemoryView_FromMemory", ctypes.pythonapi)
)

_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _memory_of(rgb: Image.Image) -> tuple[int, object] | None:
    """(address, owner) of an image's memory, where Pillow gives it away as one piece."""
    if rgb.readonly:  # mapped from a file, or of someone else
        return None
    try:
        owner = rgb.__arrow_c_array__()
        array = _ArrowArray.from_address(_pointer_of(owner[1], b"arrow_array"))
        values = array.children[0].contents
        address = values.buffers[1]
    except Exception:  # it lies in several pieces, or this Pillow does it in another way
        return None
    pixels = rgb.width * rgb.height
    whole = (array.length, array.offset, values.length, values.offset) == (pixels, 0, 4 * pixels, 0)
    return (address, owner) if whole and address else None
