"""The filter reads Pillow's own memory if it is contiguous, with the same result as from a copy."""

from __future__ import annotations

import gc
import io
import warnings
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from support.pictures import noise

from extractor import Preprocess
from extractor.images import resize
from extractor.images.decode import decode_into
from extractor.system import cpu

SIZE = (20, 30)


def from_file(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    opened = Image.open(buffer)
    opened.load()
    return opened


def resized(image: Image.Image) -> np.ndarray:
    return resize.resize(image, SIZE, (image.width / 20, image.height / 30), "bicubic")


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (61, 40), (500, 375)])
@pytest.mark.parametrize(
    "kind",
    [
        lambda image: image,
        from_file,
        lambda image: image.convert("RGBA").convert("RGB"),
        lambda image: image.crop((0, 0, image.width, max(image.height // 2, 1))),
    ],
)
def test_pillows_memory_and_a_copy_give_the_same_picture(
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int],
    kind: Callable[[Image.Image], Image.Image],
) -> None:
    image = kind(noise(3, *size))
    assert resize._memory_of(image) is not None
    picture = resized(image)
    monkeypatch.setattr(resize, "_memory_of", lambda _: None)
    assert np.array_equal(picture, resized(image))


def test_images_in_several_blocks_are_copied() -> None:
    large = Image.new("RGB", (2500, 2000), (10, 20, 30))
    assert resize._memory_of(large) is None
    assert (resized(large) == (10, 20, 30)).all()


def test_mapped_images_are_copied() -> None:
    image = noise(1, 40, 30)
    image.readonly = 1
    assert resize._memory_of(image) is None
    assert resized(image).shape == (30, 20, 3)


@pytest.mark.parametrize("change", ["length", "offset"])
def test_memory_of_unexpected_layout_is_copied(
    monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    image = noise(1, 40, 30)
    real = resize._ArrowArray.from_address

    class Other:
        @staticmethod
        def from_address(address: int) -> object:
            array = real(address)
            setattr(array, change, getattr(array, change) + 1)
            return array

    monkeypatch.setattr(resize, "_ArrowArray", Other)
    assert resize._memory_of(image) is None


def test_image_is_not_kept_alive() -> None:
    image = noise(1, 40, 30)
    gone = weakref.ref(image)
    picture = resized(image)
    del image
    gc.collect()
    assert gone() is None
    assert picture.shape == (30, 20, 3)


@pytest.mark.parametrize("readonly", [0, 1])
def test_read_only_memory_gives_no_warning(readonly: int) -> None:
    image = noise(1, 40, 30)
    image.readonly = readonly
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # by default torch says it once in a process
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert resized(image).shape == (30, 20, 3)
    finally:
        torch.set_warn_always(before)


def test_cpus_without_avx2_resize_with_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    image, preprocess = noise(0, 300, 400), Preprocess.standard(64)
    rendered = []
    for has_avx2 in (True, False):
        monkeypatch.setattr(cpu, "has_avx2", lambda has=has_avx2: has)
        if not has_avx2:
            monkeypatch.setattr(resize, "resize", None)  # calling it would be an error
        rendered.append(np.empty((64, 64, 3), np.uint8))
        decode_into(image, [preprocess], [rendered[-1]])
    difference = np.abs(rendered[0].astype(int) - rendered[1].astype(int))
    assert difference.max() <= 1
    assert difference.mean() < 0.1
