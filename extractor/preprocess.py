"""What happens to an image between its file and the model, as plain numbers and pure arithmetic."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

__all__ = ["Geometry", "Preprocess"]

RESIZE_MODES = ("shortest", "cover", "contain", "squash")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


class Geometry(NamedTuple):
    """Where the model's picture lies in one image; sizes and positions in pixels.

    The part ``box`` (left, top, right, bottom; fractions of a pixel count) of the image, resized
    to ``size`` (width, height), goes to ``at`` (left, top) in the model's picture. What it does not
    cover is filled.
    """

    box: tuple[float, float, float, float]
    size: tuple[int, int]
    at: tuple[int, int]


@dataclass(frozen=True)
class Preprocess:
    """The evaluation transform of one model: resize, centre crop or pad, normalise.

    Attributes:
        input_size: (height, width) that the model takes.
        resize: ``shortest`` scales the shorter edge to ``resize_size[0]`` (torchvision's
            ``Resize(int)``); ``cover`` and ``contain`` keep the ratio and fill or fit
            ``resize_size`` (timm's ``ResizeKeepRatio``); ``squash`` gives it up.
        resize_size: (height, width) before the crop.
        interpolation: Pillow's name of the filter, in lower case.
        mean, std: of each RGB channel, for pixels scaled to 0..1.
        fill: RGB, 0..255, of what the image does not cover.
    """

    input_size: tuple[int, int]
    resize: str
    resize_size: tuple[int, int]
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fill: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        if self.resize not in RESIZE_MODES:
            raise ValueError(f"resize: got {self.resize!r}, expected one of {RESIZE_MODES}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"interpolation: got {self.interpolation!r}, expected one of {INTERPOLATIONS}"
            )
        if min(*self.input_size, *self.resize_size) < 1:
            raise ValueError(f"sizes must be positive: {self.input_size}, {self.resize_size}")
        if len(self.mean) != 3 or len(self.std) != 3 or len(self.fill) != 3:
            raise ValueError("mean, std and fill: expected three numbers each (R, G, B)")
        if min(self.std) <= 0:
            raise ValueError(f"std: got {self.std}, expected positive numbers")

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of a whole image after the resize, before the crop."""
        to_height, to_width = self.resize_size
        if self.resize == "squash":
            return to_width, to_height
        if self.resize == "shortest":
            if width <= height:
                return to_height, max(1, int(to_height * height / width))
            return max(1, int(to_height * width / height)), to_height
        ratios = height / to_height, width / to_width
        ratio = min(ratios) if self.resize == "cover" else max(ratios)
        return max(1, round(width / ratio)), max(1, round(height / ratio))

    def geometry(self, width: int, height: int) -> Geometry:
        """Where the model's picture lies in an image of ``width`` x ``height`` pixels.

        Only what the crop keeps is asked for: a very long image costs no more than a square one.

        >>> p = Preprocess((224, 224), "shortest", (256, 256), "bilinear", (0,) * 3, (1,) * 3)
        >>> p.geometry(512, 256)
        Geometry(box=(144.0, 16.0, 368.0, 240.0), size=(224, 224), at=(0, 0))
        """
        resized_width, resized_height = self.resized(width, height)
        left, kept_width, at_left = _crop_or_pad(resized_width, self.input_size[1])
        top, kept_height, at_top = _crop_or_pad(resized_height, self.input_size[0])
        x, y = width / resized_width, height / resized_height
        right = min((left + kept_width) * x, width)  # rounding must not lead out of the image
        bottom = min((top + kept_height) * y, height)
        return Geometry(
            (left * x, top * y, right, bottom), (kept_width, kept_height), (at_left, at_top)
        )

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON types, for the manifest."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def _crop_or_pad(length: int, wanted: int) -> tuple[int, int, int]:
    """(first pixel kept, pixels kept, place of the first) along one axis, centred.

    Rounds as torchvision's ``center_crop`` does, half to even for a crop and down for a pad.
    """
    if length >= wanted:
        return round((length - wanted) / 2), wanted, 0
    return 0, length, (wanted - length) // 2
