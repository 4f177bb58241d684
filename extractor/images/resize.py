"""Fast downscaling with torch's filter, which works on bytes with the vector unit of the CPU.

It is the same convolution as Pillow's, with the same fixed-point weights, in a quarter of the time.
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

FILTERS = ("bilinear", "bicubic")  # filters of torch with antialiasing, which Pillow always applies

PYBUF_WRITE = 0x200  # flag for writable memory, memoryobject.h


def is_fast() -> bool:
    """Return whether torch's filter is faster than Pillow's on this CPU.

    Only its AVX2 version is vectorized (torch 2.11 to 2.15). Without it a photo took 4.2 ms instead
    of 1.6 ms with Pillow, and every decoding thread would start threads of its own.
    """
    from extractor.system.cpu import has_avx2

    return has_avx2()


def resize(
    rgb: Image.Image, size: tuple[int, int], scale: tuple[float, float], interpolation: str
) -> npt.NDArray[np.uint8]:
    """Resize an image with antialiasing.

    Args:
        rgb: Image in mode RGB.
        size: (width, height) of the result.
        scale: Pixels of ``rgb`` per pixel of the result, along the width and the height.
        interpolation: One of :data:`FILTERS`.

    Returns:
        ``(height, width, 3)`` uint8, RGB.

    Raises:
        MemoryError: There is not enough memory.
    """
    import torch  # here, because programs that only list files must not wait for it

    scale_x, scale_y = scale
    filter_ = getattr(torch.ops.aten, f"_upsample_{interpolation}2d_aa")
    pixels, owner = _as_tensor(rgb)
    # Channels last in and out: only this layout is vectorized.
    try:
        resized = filter_(pixels.permute(0, 3, 1, 2), size[::-1], False, 1 / scale_y, 1 / scale_x)
    except RuntimeError as error:
        if "allocate memory" in str(error):
            raise MemoryError from error
        raise
    del owner  # its memory was read until here
    picture: npt.NDArray[np.uint8] = resized.numpy()[0, :3].transpose(1, 2, 0)
    return picture


def _as_tensor(rgb: Image.Image) -> tuple[torch.Tensor, object]:
    """Return ``(1, H, W, C)`` uint8, whose first three channels are RGB, and the memory's owner.

    The memory is Pillow's own, with four bytes per pixel, if it is contiguous. Else it is a copy.
    """
    import torch

    contiguous = _memory_of(rgb)
    owner: Any
    if contiguous is not None:
        (address, owner), channels = contiguous, 4
    else:
        owner = np.asarray(rgb)
        address, channels = owner.ctypes.data, 3
    shape = (1, rgb.height, rgb.width, channels)
    # Declared writable, because torch warns about read-only memory. It is only read.
    memory = _memory_at(address, math.prod(shape), PYBUF_WRITE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(shape), owner


class _ArrowArray(ctypes.Structure):
    """Arrow C data interface, https://arrow.apache.org/docs/format/CDataInterface.html."""


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

# A ctypes array would define a new type for every number of pixels.
_memory_at = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    ("PyMemoryView_FromMemory", ctypes.pythonapi)
)

_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _memory_of(rgb: Image.Image) -> tuple[int, object] | None:
    """Return address and owner of an image's memory, or None if it is not contiguous."""
    if rgb.readonly:  # mapped from a file, or owned by another object
        return None
    try:
        owner = rgb.__arrow_c_array__()
        array = _ArrowArray.from_address(_pointer_of(owner[1], b"arrow_array"))
        values = array.children[0].contents
        address = values.buffers[1]
    except Exception:  # several blocks, or a Pillow that lays out images in another way
        return None
    count = rgb.width * rgb.height
    layout = (array.length, array.offset, values.length, values.offset)
    return (address, owner) if layout == (count, 0, 4 * count, 0) and address else None
