"""What happens to an image between its file and the model, as plain numbers and pure arithmetic."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any, NamedTuple

from extractor.errors import UsageError

__all__ = ["Geometry", "PixelChanges", "Preprocess"]

RESIZE_MODES = ("shortest", "cover", "contain", "squash")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


# What users ask for, in the words of timm's `crop_mode` less one: center is what all call a crop.
FITS = ("crop", "pad", "squash")

# Share of the resized picture's edge that the centre crop keeps, where nothing else is said.
CROP_PCT = 0.875
MAX_CROP_PCT = 2.0  # timm's VOLO at 448 and 512 pixels has 1.15
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class PixelChanges:
    """What a user wants otherwise than the model's own evaluation transform; None is as it is.

    Attributes:
        image_size: (height, width) of the model's input, in pixels.
        crop_pct: share of the resized picture's edge that the centre crop keeps, above 0; beyond 1
            the picture is smaller than the crop, and filled up.
        interpolation: Pillow's name of the filter, in lower case.
        mean, std: of each RGB channel, for pixels scaled to 0..1.
        fit: ``crop`` cuts what does not fit the model's shape, ``pad`` fills up to it with the
            mean colour, ``squash`` gives up the image's own ratio.
    """

    image_size: tuple[int, int] | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    fit: str | None = None

    def __bool__(self) -> bool:
        return self != PixelChanges()


class Geometry(NamedTuple):
    """Where the model's picture lies in one image; sizes and positions in pixels.

    The part ``box`` (left, top, right, bottom; fractions of a pixel count) of the image, resized
    to ``size`` (width, height), goes to ``at`` (left, top) in the model's picture. What it does not
    cover is filled. The same part, looked at otherwise: what lies from ``corner`` (left, top) on in
    the whole image resized to ``whole`` (width, height).
    """

    box: tuple[float, float, float, float]
    size: tuple[int, int]
    at: tuple[int, int]
    whole: tuple[int, int]
    corner: tuple[int, int]


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
            raise UsageError(f"resize: got {self.resize!r}, expected one of {RESIZE_MODES}")
        if self.interpolation not in INTERPOLATIONS:
            raise UsageError(
                f"interpolation: got {self.interpolation!r}, expected one of {INTERPOLATIONS}"
            )
        for name, size in (("input_size", self.input_size), ("resize_size", self.resize_size)):
            if not _is_size(size):
                raise UsageError(
                    f"{name}: got {size!r}, expected (height, width) in pixels, both positive"
                )
        for name, values in (("mean", self.mean), ("std", self.std), ("fill", self.fill)):
            if not _is_colour(values):
                raise UsageError(f"{name}: got {values!r}, expected three numbers (R, G, B)")
        if min(self.std) <= 0:
            raise UsageError(f"std: got {self.std}, expected positive numbers")

    @classmethod
    def standard(
        cls,
        image_size: int | tuple[int, int],
        *,
        crop_pct: float | Fraction = CROP_PCT,
        fit: str = "crop",
        interpolation: str = "bicubic",
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> Preprocess:
        """The usual evaluation transform, with timm's arithmetic (``timm.data.create_transform``).

        >>> Preprocess.standard(224).resize_size
        (256, 256)

        Args:
            image_size: of the model's input, in pixels; one number for a square, or
                (height, width).

        The other arguments are those of :class:`PixelChanges`.

        Raises:
            UsageError: a number out of its range, or a name that is none of those above.
        """
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        if not _is_size(size):
            raise UsageError(
                f"image_size: got {image_size!r}, expected a positive number of pixels, or "
                "(height, width)"
            )
        if fit not in FITS:
            raise UsageError(f"fit: got {fit!r}, expected one of {FITS}")
        if not (isinstance(crop_pct, (int, float, Fraction)) and 0 < crop_pct <= MAX_CROP_PCT):
            raise UsageError(
                f"crop_pct: got {crop_pct!r}, expected a share above 0, at most {MAX_CROP_PCT}"
            )
        if not _is_colour(mean):  # before the colour of the edges is worked out from it
            raise UsageError(f"mean: got {mean!r}, expected three numbers (R, G, B)")
        height, width = (math.floor(edge / crop_pct) for edge in size)
        resize, fill = "shortest" if height == width else "cover", (0, 0, 0)
        if fit == "squash":
            resize = "squash"
        elif fit == "pad":
            red, green, blue = (round(255 * level) for level in mean)
            resize, fill = "contain", (red, green, blue)
        return cls(size, resize, (height, width), interpolation, mean, std, fill)

    def changed(
        self, changes: PixelChanges, *, crop_pct: float | Fraction | None = None
    ) -> Preprocess:
        """The same transform but for ``changes``.

        Args:
            crop_pct: that the transform was made with; by default the ratio of its sizes.
        """
        same = replace(
            self,
            interpolation=changes.interpolation or self.interpolation,
            mean=changes.mean or self.mean,
            std=changes.std or self.std,
        )
        own_fit = {"squash": "squash", "contain": "pad"}.get(self.resize, "crop")
        refit = changes.image_size or changes.crop_pct or changes.fit
        if not refit and not (changes.mean and own_fit == "pad"):
            return same
        return Preprocess.standard(
            changes.image_size or self.input_size,
            crop_pct=changes.crop_pct
            or crop_pct
            or min(Fraction(2), Fraction(self.input_size[0], self.resize_size[0])),
            fit=changes.fit or own_fit,
            interpolation=same.interpolation,
            mean=same.mean,
            std=same.std,
        )

    @property
    def picture(self) -> tuple[object, ...]:
        """All that the uint8 picture depends on: equal for two models, one decoding serves both."""
        return self.input_size, self.resize, self.resize_size, self.interpolation, self.fill

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

        >>> p = Preprocess((224, 224), "shortest", (256, 256), "bilinear", (0,) * 3, (1,) * 3)
        >>> p.geometry(512, 256).box, p.geometry(512, 256).size
        ((144.0, 16.0, 368.0, 240.0), (224, 224))
        """
        resized_width, resized_height = self.resized(width, height)
        left, kept_width, at_left = _crop_or_pad(resized_width, self.input_size[1])
        top, kept_height, at_top = _crop_or_pad(resized_height, self.input_size[0])
        x, y = width / resized_width, height / resized_height
        right = min((left + kept_width) * x, width)  # rounding must not lead out of the image
        bottom = min((top + kept_height) * y, height)
        return Geometry(
            box=(left * x, top * y, right, bottom),
            size=(kept_width, kept_height),
            at=(at_left, at_top),
            whole=(resized_width, resized_height),
            corner=(left, top),
        )

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON types, for the manifest."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def _is_size(value: object) -> bool:
    """Whether it is (height, width), as whole positive numbers."""
    return (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and all(isinstance(edge, int) and edge is not True and edge > 0 for edge in value)
    )


def _is_colour(value: object) -> bool:
    """Whether it is one finite number for each of R, G and B."""
    return (
        isinstance(value, (tuple, list))
        and len(value) == 3
        and all(isinstance(level, (int, float)) and math.isfinite(level) for level in value)
    )


def _crop_or_pad(length: int, wanted: int) -> tuple[int, int, int]:
    """(first pixel kept, pixels kept, place of the first) along one axis, centred.

    Rounds as torchvision's ``center_crop`` does, half to even for a crop and down for a pad.
    """
    if length >= wanted:
        return round((length - wanted) / 2), wanted, 0
    return 0, length, (wanted - length) // 2
