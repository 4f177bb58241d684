"""Decoders share a limit on pixels, and wait for each other instead of exceeding it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from PIL import Image

from extractor.errors import DecodeError
from extractor.images.budget import PixelBudget, allow_pixels, pillow_allows


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


@pytest.mark.usefixtures("pillow_limit")
class TestPillowsLimit:
    """While threads decode, Pillow's limit is the largest that any of them or the program wants."""

    def test_it_is_raised_and_set_back(self) -> None:
        Image.MAX_IMAGE_PIXELS = 10
        with pillow_allows(100):
            assert Image.MAX_IMAGE_PIXELS == 50
        assert Image.MAX_IMAGE_PIXELS == 10

    def test_it_is_never_lowered(self) -> None:
        Image.MAX_IMAGE_PIXELS = 1000
        with pillow_allows(100):
            assert Image.MAX_IMAGE_PIXELS == 1000
        Image.MAX_IMAGE_PIXELS = None  # no limit at all
        with pillow_allows(100):
            assert Image.MAX_IMAGE_PIXELS is None
        assert Image.MAX_IMAGE_PIXELS is None

    def test_blocks_may_overlap(self) -> None:
        Image.MAX_IMAGE_PIXELS = 10
        small, large, again = pillow_allows(40), pillow_allows(100), pillow_allows(40)
        small.__enter__()
        large.__enter__()
        assert Image.MAX_IMAGE_PIXELS == 50
        again.__enter__()
        small.__exit__(None, None, None)
        assert Image.MAX_IMAGE_PIXELS == 50
        large.__exit__(None, None, None)
        assert Image.MAX_IMAGE_PIXELS == 20
        again.__exit__(None, None, None)
        assert Image.MAX_IMAGE_PIXELS == 10

    def test_the_program_may_set_it_meanwhile(self) -> None:
        Image.MAX_IMAGE_PIXELS = 10
        with pillow_allows(100):
            Image.MAX_IMAGE_PIXELS = 30
            with pillow_allows(40):
                assert Image.MAX_IMAGE_PIXELS == 50
        assert Image.MAX_IMAGE_PIXELS == 30

    def test_many_threads_leave_it_as_it_was(self) -> None:
        Image.MAX_IMAGE_PIXELS = 10
        seen: list[bool] = []

        def decode(max_pixels: int) -> None:
            for _ in range(200):
                with pillow_allows(max_pixels):
                    seen.append((Image.MAX_IMAGE_PIXELS or 0) >= max_pixels // 2)

        threads = [threading.Thread(target=decode, args=(20 * n,)) for n in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == [True] * 800
        assert Image.MAX_IMAGE_PIXELS == 10
