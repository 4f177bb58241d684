"""From decoded images on a device to the pictures of one model, many images at a time.

The images of a group lie in one block, padded to the largest of them. Two matrix products then
resize, crop and place all of them: one along the rows, one along the columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from extractor.images.orientation import flipped_axes
from extractor.preprocess import Preprocess

__all__ = ["block_of", "render_block", "turned_upright"]


def turned_upright(image: torch.Tensor, orientation: int) -> torch.Tensor:
    """Turn an image ``(3, H, W)`` upright, as a view where that is possible."""
    if orientation >= 5:
        image = image.transpose(1, 2)
    axes = [axis for axis, is_flipped in enumerate(flipped_axes(orientation), 1) if is_flipped]
    return image.flip(axes) if axes else image


def block_of(images: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return ``(N, H, 3, W)`` uint8, as large as the largest image; the rest is black.

    Args:
        images: Upright images, each ``(3, height, width)`` uint8.
    """
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    block = images[0].new_zeros(len(images), height, 3, width)
    for target, image in zip(block, images, strict=True):
        target[: image.shape[1], :, : image.shape[2]] = image.transpose(0, 1)
    return block


def render_block(
    block: torch.Tensor, sizes: Sequence[tuple[int, int]], preprocess: Preprocess
) -> torch.Tensor:
    """Render the pictures of one model.

    The arithmetic is Pillow's: rows first, rounded to levels, then columns. Only the weights are
    float32 instead of fixed-point numbers.

    Args:
        block: Images as :func:`block_of` returns them.
        sizes: Width and height of each image.
        preprocess: Transform of the model.

    Returns:
        ``(N, height, width, 3)`` uint8 of the model's input size.
    """
    count, rows, _, columns = block.shape
    height, width = preprocess.input_size
    geometries = [preprocess.geometry(*size) for size in sizes]
    along_x, along_y = (
        [
            (size[axis], g.resized_size[axis], g.crop_offset[axis], g.size[axis], g.offset[axis])
            for size, g in zip(sizes, geometries, strict=True)
        ]
        for axis in (0, 1)
    )
    filter_ = FILTERS[preprocess.interpolation]
    weights_x, seen_x = _weights(along_x, columns, width, filter_, block.device)
    weights_y, seen_y = _weights(along_y, rows, height, filter_, block.device)
    resized = block.view(count, rows * 3, columns).float() @ weights_x.transpose(1, 2)
    resized.round_().clamp_(0, 255)
    resized = weights_y @ resized.view(count, rows, 3 * width)
    pictures = resized.round_().clamp_(0, 255).view(count, height, 3, width).transpose(2, 3)
    fill = _on_device(torch.tensor(preprocess.fill, dtype=torch.float32), block.device)
    is_seen = seen_y[:, :, None, None] & seen_x[:, None, :, None]
    return torch.where(is_seen, pictures, fill).to(torch.uint8)


def _weights(
    axes: Sequence[tuple[int, int, int, int, int]],
    length: int,
    picture_length: int,
    filter_: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what each pixel of a picture takes of each pixel of its image, along one axis.

    Args:
        axes: For each image its size, its size after the resize, the start and the size of the
            part that is cropped from that, and the start of this part in the picture.
        length: Size of the block.
        picture_length: Size of the pictures.
        filter_: Weight at a distance from the center.
        device: Device of the result.

    Returns:
        ``(N, picture_length, length)`` float32, and whether the pixel is no padding,
        ``(N, picture_length)`` bool.
    """
    numbers = _on_device(torch.tensor(axes, dtype=torch.float64), device)
    size, resized, crop, visible, offset = numbers.T[..., None]
    at = torch.arange(picture_length, device=device) - offset
    is_seen = (at >= 0) & (at < visible)
    scale = size / resized
    # Rounded to float32 here: the error is under 1e-4 of a pixel of the picture.
    center = ((at + crop + 0.5) * scale).float()[..., None]
    pixel = torch.arange(length, dtype=torch.float32, device=device) + 0.5
    distance = (pixel - center) / scale.clamp(min=1).float()[..., None]
    weights = filter_(distance.abs_())
    weights *= (pixel < size)[:, None] & is_seen[..., None]
    weights /= weights.sum(2, keepdim=True).where(is_seen[..., None], torch.ones((), device=device))
    return weights, is_seen


def _on_device(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a few numbers without waiting for the work that a GPU still has."""
    return numbers.to(device, non_blocking=True)


def _triangle(distance: torch.Tensor) -> torch.Tensor:
    return (1 - distance).clamp_(min=0)


def _cubic(distance: torch.Tensor) -> torch.Tensor:
    """Return Keys' filter with a = -1/2, as Pillow's."""
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return near.where(distance < 1, far.where(distance < 2, torch.zeros_like(far)))


FILTERS = {"bilinear": _triangle, "bicubic": _cubic}  # those of extractor.images.resize
