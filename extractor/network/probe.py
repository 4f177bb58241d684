"""One forward pass of blank images: learn a network's output shape before reading any image."""

from __future__ import annotations

import torch
from torch import nn

from extractor.errors import ModelError
from extractor.system.devices import is_broken_device, is_out_of_memory
from extractor.text import first_line

__all__ = ["PROBE_IMAGES", "describe_shapes", "probe"]

# Not 1 or 2: with so few images another axis, or the length of a tuple, could pass for the batch.
PROBE_IMAGES = 3


def probe(
    network: nn.Module, size: tuple[int, int], *, name: str, advice: str = ""
) -> tuple[int, ...]:
    """Return the shape of a network's output for one image, without the batch axis.

    Args:
        network: Maps ``(B, 3, H, W)`` float pixels to a tensor with one row per image.
        size: (height, width) of the blank images.
        name: The network's name for error messages.
        advice: What to try, at the end of the error message.

    Raises:
        ModelError: The network rejects this size or returns no tensor with one row per image.
        torch.OutOfMemoryError: The device is full.
        RuntimeError: The memory of the CPU is full, or the device is broken.
    """
    weight = next(network.parameters(), torch.zeros(()))
    pixels = torch.zeros(PROBE_IMAGES, 3, *size, device=weight.device, dtype=weight.dtype)
    try:
        with torch.inference_mode():
            output = network(pixels.to(memory_format=torch.channels_last))
    except Exception as error:  # networks reject a shape with all kinds of exceptions
        if is_out_of_memory(error) or is_broken_device(error):
            raise
        raise ModelError(
            f"{name} cannot take images of {size[0]} x {size[1]} pixels ({first_line(error)})"
            f"{advice and '; ' + advice}"
        ) from error
    if not isinstance(output, torch.Tensor) or output.ndim < 2 or len(output) != PROBE_IMAGES:
        raise ModelError(
            f"{name} returned {describe_shapes(output)} for {PROBE_IMAGES} images, "
            "expected one row per image"
        )
    return tuple(output.shape[1:])


def describe_shapes(value: object) -> str:
    """Describe the shapes of a tensor, or of a tuple, list or dict of tensors, for messages.

    >>> describe_shapes([torch.zeros(2, 3), None])
    '[(2, 3), NoneType]'
    """
    if isinstance(value, torch.Tensor):
        return str(tuple(value.shape))
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(describe_shapes, value))}]"
    if isinstance(value, dict):
        items = (f"{key}: {describe_shapes(item)}" for key, item in value.items())
        return f"{{{', '.join(items)}}}"
    return type(value).__name__
