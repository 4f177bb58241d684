"""One forward pass of blank images, to learn what a network gives before any image is read."""

from __future__ import annotations

import torch
from torch import nn

from extractor.errors import ModelError

__all__ = ["BATCH", "trial"]

# With one image, or as many as a tuple often has members, something else could pass for the batch.
BATCH = 3


def trial(
    module: nn.Module, size: tuple[int, int], *, what: str, advice: str = ""
) -> tuple[int, ...]:
    """The shape of what a network gives for one image of ``size`` (height, width).

    Args:
        what: the network, for the error message; ``advice`` ends it.

    Raises:
        ModelError: it cannot take such images, or gives no tensor with a row for each.
        torch.OutOfMemoryError: as it comes.
    """
    some = next(module.parameters(), torch.zeros(()))
    pixels = torch.zeros(BATCH, 3, *size, device=some.device, dtype=some.dtype)
    try:
        with torch.inference_mode():
            output = module(pixels.to(memory_format=torch.channels_last))
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a network says of a shape that it cannot take
        raise ModelError(
            f"{what} cannot take images of {size[0]} x {size[1]} pixels ({first_line(error)})"
            f"{advice and '; ' + advice}"
        ) from error
    if not isinstance(output, torch.Tensor) or output.ndim < 2 or len(output) != BATCH:
        raise ModelError(f"{what} gives {shapes(output)} for {BATCH} images, expected a row each")
    return tuple(output.shape[1:])


def shapes(value: object) -> str:
    """The shapes of a tensor, or of what a tuple, a list or a dict holds, for messages.

    >>> shapes([torch.zeros(2, 3), None])
    '[(2, 3), NoneType]'
    """
    if isinstance(value, torch.Tensor):
        return str(tuple(value.shape))
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(shapes(one) for one in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {shapes(one)}' for key, one in value.items())}}}"
    return type(value).__name__


def first_line(error: BaseException) -> str:
    """What an exception says, in one line of bounded length."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
