"""The picture of a model equals the result of its own library's transform."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import ResizeKeepRatio, str_to_interp_mode
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from extractor.errors import UsageError
from extractor.images import decode
from extractor.models import from_timm, from_torchvision
from extractor.preprocess import INTERPOLATIONS, RESIZE_MODES, Preprocess

Pixels = npt.NDArray[np.uint8]
Reference = Callable[[Image.Image], torch.Tensor]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Name: input size, crop share, crop mode, interpolation.
TIMM: dict[str, tuple[tuple[int, int], float, str, str]] = {
    "center-224": ((224, 224), 0.875, "center", "bicubic"),
    "center-224-bilinear": ((224, 224), 0.95, "center", "bilinear"),
    "center-299": ((299, 299), 0.875, "center", "bicubic"),
    "center-160x256": ((160, 256), 0.875, "center", "bicubic"),
    "center-256x160": ((256, 160), 0.95, "center", "bilinear"),
    "center-160x256-whole": ((160, 256), 1.0, "center", "bicubic"),
    "squash-224": ((224, 224), 1.0, "squash", "bicubic"),
    "squash-224-crop": ((224, 224), 0.875, "squash", "bilinear"),
    "squash-160x256": ((160, 256), 0.95, "squash", "bicubic"),
    "border-224": ((224, 224), 1.0, "border", "bicubic"),
    "border-299-crop": ((299, 299), 0.875, "border", "bilinear"),
    "border-160x256": ((160, 256), 0.95, "border", "bicubic"),
}
# Name: input size, size of the shorter edge, interpolation.
TORCHVISION: dict[str, tuple[int, int, InterpolationMode]] = {
    "torchvision-224": (224, 256, InterpolationMode.BILINEAR),
    "torchvision-299": (299, 342, InterpolationMode.BICUBIC),
    "torchvision-384-whole": (384, 384, InterpolationMode.BICUBIC),
    # The crop is larger than the resized image: the preset pads with black.
    "torchvision-224-200": (224, 200, InterpolationMode.BILINEAR),
}
CASES = [*TIMM, *TORCHVISION]

SHAPES = [  # (width, height)
    (500, 375),
    (375, 500),
    (101, 333),
    (1, 1),
    (3, 200),
    (200, 3),
    (225, 223),
]


@functools.cache
def make(case: str) -> tuple[Preprocess, Reference]:
    """Return our transform for a case, and the library's."""
    if case in TIMM:
        (height, width), share, mode, interpolation = TIMM[case]
        config: dict[str, Any] = {
            "input_size": (3, height, width),
            "interpolation": interpolation,
            "mean": MEAN,
            "std": STD,
            "crop_pct": share,
            "crop_mode": mode,
        }
        transform = create_transform(**config)
        for step in transform.transforms:
            if isinstance(step, ResizeKeepRatio):  # older timm forgets the filter here
                step.interpolation = str_to_interp_mode(interpolation)
        return from_timm._preprocess(config), transform
    crop, edge, filter_ = TORCHVISION[case]
    preset = ImageClassification(
        crop_size=crop, resize_size=edge, mean=MEAN, std=STD, interpolation=filter_
    )
    return from_torchvision._preprocess(preset), preset


@functools.cache
def photo(width: int, height: int) -> Image.Image:
    """Return smooth colors with a little grain, as a photo has. The size fixes them."""
    random = np.random.default_rng([width, height])
    coarse = random.integers(0, 256, (max(2, height // 12), max(2, width // 12), 3), np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    grain = random.normal(0, 4, (height, width, 3))
    return Image.fromarray((np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8))


def levels(normalized: torch.Tensor) -> npt.NDArray[np.float32]:
    """Return the levels 0..255, ``(H, W, 3)``, of a normalized picture ``(3, H, W)``."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return ((normalized * std + mean) * 255).round_().permute(1, 2, 0).numpy()


def picture(preprocess: Preprocess, image: Image.Image) -> Pixels:
    out = np.full((*preprocess.input_size, 3), 201, np.uint8)
    decode.decode_into(image, [preprocess], [out])
    return out


def by_axes(reference: Reference, image: Image.Image, first: str) -> npt.NDArray[np.float32]:
    """Return the library's picture, with one axis resized before the other."""
    resize = Image.Image.resize

    def in_two(image: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
        half = (size[0], image.height) if first == "width" else (image.width, size[1])
        return resize(resize(image, half, resample), size, resample)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", in_two)
        return levels(reference(image))


def assert_same_as_library(ours: Pixels, reference: Reference, image: Image.Image) -> None:
    """Assert equal pixels, for either order of the axes.

    The filter resizes one axis, rounds to whole levels, and resizes the other. Pillow 13 and later
    chooses the order by the sizes, and torch starts with the width.
    """
    expected = levels(reference(image))
    assert ours.shape == expected.shape
    difference = np.abs(ours - expected)
    if difference.max() > 2 or difference.mean() >= 0.1:
        pictures = [by_axes(reference, image, first) for first in ("width", "height")]
        difference = min((np.abs(ours - one) for one in pictures), key=np.mean)
    assert difference.max() <= 2
    assert difference.mean() < 0.1


@pytest.mark.parametrize("shape", SHAPES, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("case", CASES)
def test_picture_equals_the_librarys_transform(case: str, shape: tuple[int, int]) -> None:
    preprocess, reference = make(case)
    image = photo(*shape)
    assert_same_as_library(picture(preprocess, image), reference, image)


@pytest.mark.parametrize("case", CASES)
def test_picture_equals_the_librarys_transform_at_random_sizes(case: str) -> None:
    preprocess, reference = make(case)
    random = np.random.default_rng(CASES.index(case))
    for _ in range(2):
        width, height = (int(side) for side in random.integers(40, 420, 2))
        image = photo(width, height)
        assert_same_as_library(picture(preprocess, image), reference, image)


@pytest.mark.parametrize("case", CASES)
def test_picture_equals_the_librarys_transform_at_the_input_size(case: str) -> None:
    preprocess, reference = make(case)
    height, width = preprocess.input_size
    image = photo(width, height)
    assert_same_as_library(picture(preprocess, image), reference, image)


@pytest.mark.parametrize(
    "case", [case for case, (_, share, *_) in TIMM.items() if share == 1.0 and "whole" not in case]
)
def test_image_of_the_input_size_is_unchanged(case: str) -> None:
    preprocess = make(case)[0]
    height, width = preprocess.input_size
    image = photo(width, height)
    assert np.array_equal(picture(preprocess, image), np.asarray(image))


@pytest.mark.parametrize("case", CASES)
def test_mean_and_std_equal_the_librarys(case: str) -> None:
    preprocess = make(case)[0]
    assert preprocess.mean == MEAN
    assert preprocess.std == STD


@pytest.mark.parametrize("upright", [False, True])
def test_only_the_crop_of_a_very_long_image_is_resized(
    upright: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocess, reference = make("torchvision-224")
    middle = photo(2000, 20)  # its resized sizes are whole multiples: crops line up
    long = Image.new("RGB", (60_000, 20), (255, 0, 255))
    long.paste(middle, (29_000, 0))
    if upright:
        middle = middle.transpose(Image.Transpose.TRANSPOSE)
        long = long.transpose(Image.Transpose.TRANSPOSE)

    made: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def recording(image: Image.Image, size: tuple[int, int], *args: Any, **kw: Any) -> Image.Image:
        made.append(size)
        return resize(image, size, *args, **kw)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "resize", recording)
        ours = picture(preprocess, long)
    assert_same_as_library(ours, reference, middle)
    assert made  # else nothing was watched
    assert max(width * height for width, height in made) <= 224 * 224


@pytest.mark.parametrize("case", CASES)
def test_geometry_stays_inside_the_image_and_the_picture(case: str) -> None:
    preprocess = make(case)[0]
    height, width = preprocess.input_size
    random = np.random.default_rng(8)
    sizes = [(1, 1), (1, 50_000), (50_000, 1), *random.integers(1, 6000, (500, 2)).tolist()]
    for image_width, image_height in sizes:
        (left, top, right, bottom), size, at = preprocess.geometry(image_width, image_height)[:3]
        assert 0 <= left < right <= image_width
        assert 0 <= top < bottom <= image_height
        assert 1 <= size[0] <= width
        assert 1 <= size[1] <= height
        assert 0 <= at[0] <= width - size[0]
        assert 0 <= at[1] <= height - size[1]
        if preprocess.resize != "contain" and case != "torchvision-224-200":
            assert size == (width, height)  # nothing to pad


def test_geometry_turns_with_the_image() -> None:
    upright = Preprocess((160, 256), "cover", (182, 292), "bicubic", MEAN, STD)
    lying = Preprocess((256, 160), "cover", (292, 182), "bicubic", MEAN, STD)
    for width, height in [(500, 375), (31, 900), (8, 8)]:
        (left, top, right, bottom), size, at = upright.geometry(width, height)[:3]
        assert lying.geometry(height, width)[:3] == (
            (top, left, bottom, right),
            size[::-1],
            at[::-1],
        )


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("shape", "rows", "columns"),
    [
        ((100, 50), slice(25, 75), slice(0, 100)),  # bars above and below
        ((50, 100), slice(0, 100), slice(25, 75)),  # bars on both sides
        ((200, 6), slice(48, 51), slice(0, 100)),  # 97 rows to fill: the smaller part is above
        ((5000, 1), slice(49, 50), slice(0, 100)),  # at least one row is left of a thin image
    ],
)
def test_padding_overwrites_the_previous_picture_with_the_fill_color(
    shape: tuple[int, int], rows: slice, columns: slice, seed: int
) -> None:
    fill = (12, 200, 77)
    preprocess = Preprocess((100, 100), "contain", (100, 100), "bilinear", MEAN, STD, fill)
    expected = np.empty((100, 100, 3), np.uint8)
    expected[:] = fill
    expected[rows, columns] = (250, 3, 130)
    out = np.random.default_rng(seed).integers(0, 256, (100, 100, 3), np.uint8)
    decode.decode_into(Image.new("RGB", shape, (250, 3, 130)), [preprocess], [out])
    assert np.array_equal(out, expected)


def test_border_has_the_mean_color() -> None:
    preprocess = make("border-224")[0]
    assert preprocess.fill == (124, 116, 104)  # round(255 * mean)
    black = picture(preprocess, Image.new("RGB", (400, 100)))
    assert (black[:80] == (124, 116, 104)).all()
    assert (black[100:120] == 0).all()


VALID: dict[str, Any] = {
    "input_size": (224, 224),
    "resize": "shortest",
    "resize_size": (256, 256),
    "interpolation": "bicubic",
    "mean": MEAN,
    "std": STD,
}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"resize": "longest"}, r"resize: got 'longest', expected one of .*'shortest'"),
        (
            {"interpolation": "BICUBIC"},
            r"interpolation: got 'BICUBIC', expected one of .*'bicubic'",
        ),
        ({"interpolation": "random"}, r"interpolation: got 'random'"),
        ({"input_size": (0, 224)}, r"input_size: got \(0, 224\), expected \(height, width\)"),
        ({"input_size": (224, -1)}, r"input_size: got \(224, -1\), expected .* positive"),
        ({"resize_size": (256, 0)}, r"resize_size: got \(256, 0\), expected .* positive"),
        ({"input_size": 224}, r"input_size: got 224, expected \(height, width\)"),
        ({"resize_size": (256,)}, r"resize_size: got \(256,\), expected \(height, width\)"),
        ({"resize_size": (256.0, 256)}, r"resize_size: got \(256\.0, 256\), expected"),
        ({"mean": (0.5,)}, r"mean: got \(0\.5,\), expected three numbers"),
        ({"mean": 0.5}, r"mean: got 0\.5, expected three numbers"),
        ({"std": (0.5, 0.5)}, r"std: got \(0\.5, 0\.5\), expected three numbers"),
        ({"std": (0.5, 0.5, math.nan)}, r"std: got \(0\.5, 0\.5, nan\), expected three numbers"),
        ({"fill": (0, 0, 0, 0)}, r"fill: got \(0, 0, 0, 0\), expected three numbers"),
        ({"std": (0.2, 0.0, 0.2)}, r"std: got \(0\.2, 0\.0, 0\.2\), expected positive"),
        ({"std": (0.2, 0.2, -0.2)}, r"std: got .*, expected positive"),
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Preprocess(**{**VALID, **wrong})


@pytest.mark.parametrize("size", [0, -3, "x", None, 2.5, True, (8, 0), (8,), (8, 8, 8), (8, "x")])
def test_invalid_image_sizes_are_refused(size: Any) -> None:
    match = f"image_size: got {size!r}, expected a positive number of pixels, or (height, width)"
    with pytest.raises(UsageError, match=f"^{re.escape(match)}$"):
        Preprocess.standard(size)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"crop_pct": 0}, r"crop_pct: got 0, expected a fraction above 0, at most 2\.0"),
        ({"crop_pct": "x"}, r"crop_pct: got 'x', expected a fraction"),
        ({"crop_pct": math.nan}, r"crop_pct: got nan, expected a fraction"),
        ({"fit": "x"}, r"fit: got 'x', expected one of .*'crop'"),
        ({"interpolation": 3}, r"interpolation: got 3, expected one of .*'bicubic'"),
        ({"mean": 0.5, "fit": "pad"}, r"mean: got 0\.5, expected three numbers"),
        ({"std": "abc"}, r"std: got 'abc', expected three numbers"),
    ],
)
def test_standard_refuses_values_out_of_range(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Preprocess.standard(224, **wrong)


@pytest.mark.parametrize("resize", RESIZE_MODES)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_every_accepted_mode_and_filter_gives_a_picture(resize: str, interpolation: str) -> None:
    preprocess = Preprocess(**{**VALID, "resize": resize, "interpolation": interpolation})
    gray = picture(preprocess, Image.new("RGB", (300, 300), (90, 91, 92)))
    assert (gray == (90, 91, 92)).all()


def test_as_dict_survives_json() -> None:
    preprocess = Preprocess(**VALID)
    again = json.loads(json.dumps(preprocess.as_dict()))
    rebuilt: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in again.items()}
    assert again["resize_size"] == [256, 256]
    assert Preprocess(**rebuilt) == preprocess


def test_numbers_of_any_kind_make_the_same_transform() -> None:
    expected = Preprocess.standard((224, 160), mean=(0.5, 0.25, 0.125), std=(0.5, 0.5, 0.25))
    sizes: list[Any] = [[224, 160], np.array([224, 160]), (np.int64(224), torch.tensor(160))]
    for size, kind in zip(sizes, (list, np.float32, torch.tensor), strict=True):
        mean, std = kind([0.5, 0.25, 0.125]), kind([0.5, 0.5, 0.25])
        preprocess = Preprocess.standard(size, mean=mean, std=std)
        assert preprocess == expected
        assert hash(preprocess.picture_key) == hash(expected.picture_key)
    assert Preprocess.standard(np.int64(224)) == Preprocess.standard(224)


def test_statistics_of_levels_are_refused_with_advice() -> None:
    with pytest.raises(UsageError, match=r"mean: got .*123.*, expected .* 0 to 1.*divide.* by 255"):
        Preprocess.standard(224, mean=(123.675, 116.28, 103.53))
