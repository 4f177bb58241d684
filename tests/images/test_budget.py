"""Decoders share a limit on pixels, and wait for each other instead of exceeding it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from PIL import Image

from extractor.errors import DecodeError
from extractor.images.budget import PixelBudget, allow_pixels


@pytest.fixture
def pillow_limit() -> Iterator[None]:
    before = Image.MAX_IMAGE_PIXELS
    yield
    Image.MAX_IMAGE_PIXELS = before


def test_image_of_exactly_the_limit_fits() -> None:
    budget = PixelBudget(20)
    with budget.claim(5, 4):
        assert budget._left == 0
    assert budget._left == 20


def test_larger_image_is_too_large() -> None:
    budget = PixelBudget(20)
    with (
        pytest.raises(DecodeError, match="7 x 3 are 21 pixels, and the limit is 20") as caught,
        budget.claim(7, 3),
    ):
        pass
    assert caught.value.reason == "too-large"
    assert budget._left == 20


def test_failed_decoding_frees_its_pixels() -> None:
    budget = PixelBudget(20)
    with pytest.raises(ValueError, match="broken"), budget.claim(5, 4):
        raise ValueError("broken")
    assert budget._left == 20


def test_image_waits_until_enough_pixels_are_free() -> None:
    budget = PixelBudget(20)
    order: list[str] = []

    def decode() -> None:
        with budget.claim(4, 4):
            order.append("second")

    with budget.claim(5, 1):
        thread = threading.Thread(target=decode)
        thread.start()
        time.sleep(0.05)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


@pytest.mark.usefixtures("pillow_limit")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("max_pixels", [99, 100])
def test_pillow_refuses_more_than_the_allowed_pixels(max_pixels: int) -> None:
    allow_pixels(max_pixels)
    Image._decompression_bomb_check((max_pixels, 1))
    with pytest.raises(Image.DecompressionBombError, match="exceeds limit"):
        Image._decompression_bomb_check((max_pixels + 2, 1))
