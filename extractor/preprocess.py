"""The evaluation transform of a model as plain numbers: resize, center crop or pad, normalize."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from numbers import Integral
from typing import Any, Literal, NamedTuple, get_args

from extractor.errors import UsageError

__all__ = [
    "GRAY_BITS",
    "Geometry",
    "GrayBits",
    "PixelChanges",
    "Preprocess",
    "check_gray_bits",
    "parse_gray_bits",
    "plain_numbers",
]

RESIZE_MODES = ("shortest", "cover", "contain", "squash")
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)

# Choices of users: the words of timm's `crop_mode`, except that timm's "center" is "crop".
Fit = Literal["crop", "pad", "squash"]
FITS: tuple[Fit, ...] = get_args(Fit)

# Bits of gray values that take more than a byte, or "minmax" for the range of each image.
GrayBits = int | Literal["minmax"]
GRAY_BITS: GrayBits = 16
GRAY_BITS_RANGE = range(8, 17)

# Default fraction of the resized image that the center crop keeps, along each edge.
CROP_PCT = 0.875
MAX_CROP_PCT = 2.0  # the largest in timm is 1.15, of VOLO at 448 and 512 pixels
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class PixelChanges:
    """Changes of a user to a model's own evaluation transform. None keeps the model's value.

    Attributes:
        image_size: (height, width) of the model's input in pixels.
        crop_pct: Fraction of the resized image that the center crop keeps along each edge, above 0.
            Above 1 the resized image is smaller than the crop and is padded.
        interpolation: Name of the filter in Pillow, in lower case.
        mean: Mean of each RGB channel, for pixels scaled to 0..1.
        std: Standard deviation of each RGB channel, for pixels scaled to 0..1.
        fit: ``crop`` cuts off the longer edge, ``pad`` pads the shorter edge with the mean color,
            ``squash`` ignores the aspect ratio.
        gray_bits: As in :class:`Preprocess`.
    """

    image_size: tuple[int, int] | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    fit: str | None = None
    gray_bits: GrayBits | None = None

    def __bool__(self) -> bool:
        """Return whether anything changes."""
        return self != PixelChanges()


class Geometry(NamedTuple):
    """Position of the model's picture in one image. Sizes and positions are in pixels.

    There are two equivalent descriptions. The ``box`` of the image is resized to ``size``, and put
    at ``offset`` into the picture; the rest of the picture is padding. Or the whole image is
    resized to ``resized_size``, and ``size`` is cropped from it at ``crop_offset``.

    Attributes:
        box: Left, top, right and bottom in the image. May lie between pixels.
        size: Width and height of the visible part in the picture.
        offset: Left and top of the visible part in the picture.
        resized_size: Width and height of the whole image after the resize.
        crop_offset: Left and top of the visible part in the resized image.
    """

    box: tuple[float, float, float, float]
    size: tuple[int, int]
    offset: tuple[int, int]
    resized_size: tuple[int, int]
    crop_offset: tuple[int, int]


@dataclass(frozen=True)
class Preprocess:
    """Evaluation transform of one model: resize, center crop or pad, normalize.

    >>> Preprocess.standard(224).resize_size, Preprocess.standard(224).mean
    ((256, 256), (0.485, 0.456, 0.406))

    Attributes:
        input_size: (height, width) of the model's input in pixels.
        resize: ``shortest`` scales the shorter edge to ``resize_size[0]`` (torchvision's
            ``Resize(int)``). ``cover`` and ``contain`` keep the aspect ratio, and cover
            ``resize_size`` or fit into it (timm's ``ResizeKeepRatio``). ``squash`` ignores it.
        resize_size: (height, width) before the crop.
        interpolation: Name of the filter in Pillow, in lower case.
        mean: Mean of each RGB channel, for pixels scaled to 0..1.
        std: Standard deviation of each RGB channel, for pixels scaled to 0..1.
        fill: RGB color of the padding, 0..255.
        gray_bits: Number of bits that gray values of more than 8 bits take up, from 8 to 16.
            ``minmax`` stretches them from the smallest to the largest value of each image.

    Raises:
        UsageError: A value is out of range.
    """

    input_size: tuple[int, int]
    resize: str
    resize_size: tuple[int, int]
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fill: tuple[int, int, int] = (0, 0, 0)
    gray_bits: GrayBits = GRAY_BITS

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("input_size", "resize_size", "mean", "std", "fill"):
            object.__setattr__(self, name, plain_numbers(getattr(self, name)))
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
            if not _is_color(values):
                raise UsageError(f"{name}: got {values!r}, expected three numbers (R, G, B)")
        if min(self.std) <= 0:
            raise UsageError(f"std: got {self.std}, expected positive numbers")
        object.__setattr__(self, "gray_bits", check_gray_bits(self.gray_bits))

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
        """Return the usual evaluation transform, as ``timm.data.create_transform`` computes it.

        >>> Preprocess.standard(224).resize_size
        (256, 256)

        Args:
            image_size: Model's input in pixels: one number for a square, or (height, width).
            crop_pct: Fraction of the resized image that the center crop keeps along each edge.
            fit: ``crop``, ``pad`` or ``squash``; see :class:`PixelChanges`.
            interpolation: Name of the filter in Pillow, in lower case.
            mean: Mean of each RGB channel, for pixels scaled to 0..1.
            std: Standard deviation of each RGB channel, for pixels scaled to 0..1.

        Raises:
            UsageError: A value is out of range, or a name is unknown.
        """
        image_size, mean = plain_numbers(image_size), plain_numbers(mean)
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
                f"crop_pct: got {crop_pct!r}, expected a fraction above 0, at most {MAX_CROP_PCT}"
            )
        if not _is_color(mean):  # before the color of the padding is computed from it
            raise UsageError(f"mean: got {mean!r}, expected three numbers (R, G, B)")
        if max(mean) > 1:
            raise UsageError(
                f"mean: got {mean}, expected numbers for pixels of 0 to 1; divide mean and std by "
                "255"
            )
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
        """Return this transform with some values changed.

        Args:
            changes: Values to change.
            crop_pct: Fraction that the transform was made with; by default the ratio of its sizes.
        """
        recolored = replace(
            self,
            interpolation=changes.interpolation or self.interpolation,
            mean=changes.mean or self.mean,
            std=changes.std or self.std,
            gray_bits=changes.gray_bits or self.gray_bits,
        )
        own_fit = {"squash": "squash", "contain": "pad"}.get(self.resize, "crop")
        refit = changes.image_size or changes.crop_pct or changes.fit
        if not refit and not (changes.mean and own_fit == "pad"):
            return recolored
        refitted = Preprocess.standard(
            changes.image_size or self.input_size,
            crop_pct=changes.crop_pct
            or crop_pct
            or min(Fraction(2), Fraction(self.input_size[0], self.resize_size[0])),
            fit=changes.fit or own_fit,
            interpolation=recolored.interpolation,
            mean=recolored.mean,
            std=recolored.std,
        )
        return replace(refitted, gray_bits=recolored.gray_bits)

    @property
    def size_text(self) -> str:
        """Sizes of the model's input and of the resized image, (height x width) in pixels.

        >>> Preprocess.standard(224).size_text
        '224 x 224 (resize 256 x 256)'
        """
        height, width = self.input_size
        resized_height, resized_width = self.resize_size
        return f"{height} x {width} (resize {resized_height} x {resized_width})"

    @property
    def picture_key(self) -> tuple[object, ...]:
        """Values that the uint8 picture depends on. Models with equal keys share their pictures."""
        sizes = self.input_size, self.resize_size
        return *sizes, self.resize, self.interpolation, self.fill, self.gray_bits

    def resized_size(self, width: int, height: int) -> tuple[int, int]:
        """Return the (width, height) of an image after the resize, before the crop."""
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
        """Return the position of the model's picture in an image of ``width`` x ``height`` pixels.

        >>> p = Preprocess((224, 224), "shortest", (256, 256), "bilinear", (0,) * 3, (1,) * 3)
        >>> p.geometry(512, 256).box, p.geometry(512, 256).size
        ((144.0, 16.0, 368.0, 240.0), (224, 224))
        """
        resized_width, resized_height = self.resized_size(width, height)
        left, kept_width, offset_left = _crop_or_pad(resized_width, self.input_size[1])
        top, kept_height, offset_top = _crop_or_pad(resized_height, self.input_size[0])
        x, y = width / resized_width, height / resized_height
        right = min((left + kept_width) * x, width)  # rounding must not leave the image
        bottom = min((top + kept_height) * y, height)
        return Geometry(
            box=(left * x, top * y, right, bottom),
            size=(kept_width, kept_height),
            offset=(offset_left, offset_top),
            resized_size=(resized_width, resized_height),
            crop_offset=(left, top),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the values as JSON types, for the manifest.

        Leaves out ``gray_bits`` where it is the default. Stores made before this option lack it.
        """
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        if self.gray_bits == GRAY_BITS:
            del values["gray_bits"]
        return values


_EXPECTED_GRAY_BITS = "expected 8 to 16, or minmax"


def parse_gray_bits(text: str) -> GrayBits:
    """Return the bits of gray values, written as a number or as ``minmax``.

    Raises:
        ValueError: The text has another form.
    """
    bits = int(text) if re.fullmatch(r"\d{1,2}", text, re.ASCII) else text
    try:
        return check_gray_bits(bits)
    except UsageError:
        raise ValueError(f"got {text!r}, {_EXPECTED_GRAY_BITS}") from None


def check_gray_bits(value: object) -> GrayBits:
    """Return the bits of gray values.

    Raises:
        UsageError: The value is neither a number of bits nor ``minmax``.
    """
    if isinstance(value, str) and value == "minmax":
        return "minmax"
    if isinstance(value, Integral) and int(value) in GRAY_BITS_RANGE:
        return int(value)
    raise UsageError(f"gray bits: got {value!r}, {_EXPECTED_GRAY_BITS}")


def plain_numbers(value: Any) -> Any:
    """Return a list, an array or a number of any library as a tuple of numbers, or a number.

    >>> plain_numbers([224, 160])
    (224, 160)
    """
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, (tuple, list)):
        return tuple(each.item() if hasattr(each, "item") else each for each in value)
    return value


def _is_size(value: object) -> bool:
    """Return whether a value is (height, width), two positive integers."""
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and all(isinstance(edge, int) and edge is not True and edge > 0 for edge in value)
    )


def _is_color(value: object) -> bool:
    """Return whether a value is three finite numbers: R, G and B."""
    return (
        isinstance(value, tuple)
        and len(value) == 3
        and all(isinstance(level, (int, float)) and math.isfinite(level) for level in value)
    )


def _crop_or_pad(length: int, target: int) -> tuple[int, int, int]:
    """Center one axis; return the first pixel kept, the number of pixels kept, and their offset.

    Rounds as torchvision's ``center_crop``: half to even for a crop, down for a pad.
    """
    if length >= target:
        return round((length - target) / 2), target, 0
    return 0, length, (target - length) // 2
