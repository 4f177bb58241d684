"""Decoders share a limit on pixels, and wait for each other instead of exceeding it."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from extractor.errors import DecodeError
from extractor.images.budget import LargeImageSlot, PixelBudget, allow_pixels, pillow_allows


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


def in_thread(budget: PixelBudget, pixels: int) -> threading.Event:
    """Take pixels in another thread; the event says that it has them."""
    has_them = threading.Event()

    def take() -> None:
        budget.take(pixels)
        has_them.set()

    threading.Thread(target=take, daemon=True).start()
    return has_them


def test_image_above_the_share_takes_all_of_it() -> None:
    budget = PixelBudget(100, share=20)
    with budget.claim(10, 10):
        small = in_thread(budget, 1)
        assert not small.wait(0.05)
    assert small.wait(10)
    assert budget._left == 19


def test_share_does_not_change_the_limit_of_an_image() -> None:
    budget = PixelBudget(100, share=20)
    with pytest.raises(DecodeError, match="the limit is 100"), budget.claim(101, 1):
        pass


def test_share_above_the_limit_is_the_limit() -> None:
    budget = PixelBudget(100, share=500)
    with budget.claim(10, 10):
        assert budget._left == 0


def test_smaller_images_do_not_overtake_one_that_waits_for_the_share() -> None:
    budget = PixelBudget(100, share=20)
    budget.take(5)
    large = in_thread(budget, 30)
    while not budget._is_draining:
        time.sleep(0.001)
    small = in_thread(budget, 5)
    assert not small.wait(0.05)
    budget.give_back(5)
    assert large.wait(10)
    assert not small.wait(0.05)
    budget.give_back(30)
    assert small.wait(10)


def test_image_above_the_share_waits_for_the_slot_and_smaller_ones_do_not(tmp_path: Path) -> None:
    here, there = (PixelBudget(100, 20, LargeImageSlot(tmp_path / "slot")) for _ in range(2))
    here.take(30)
    large = in_thread(there, 30)
    assert not large.wait(0.05)
    with there.claim(4, 5):
        pass
    here.give_back(30)
    assert large.wait(10)


def test_processes_together_exceed_their_shares_by_one_image(tmp_path: Path) -> None:
    """Every budget has a lock of its own on the file, like a process."""
    budgets = [PixelBudget(100, 20, LargeImageSlot(tmp_path / "slot")) for _ in range(3)]
    lock, now, large, most = threading.Lock(), 0, 0, [0, 0]

    def decode(budget: PixelBudget, seed: int) -> None:
        nonlocal now, large
        rng = random.Random(seed)
        for _ in range(30):
            pixels = rng.choice([1, 7, 20, 21, 100])
            with budget.claim(pixels, 1):
                with lock:
                    now += pixels
                    large += pixels > 20
                    most[:] = max(most[0], now), max(most[1], large)
                time.sleep(0.0002)
                with lock:
                    now -= pixels
                    large -= pixels > 20

    threads = [
        threading.Thread(target=decode, args=(budget, 4 * i + j), daemon=True)
        for i, budget in enumerate(budgets)
        for j in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (now, large, most[1]) == (0, 0, 1)
    assert 100 <= most[0] <= 2 * 20 + 100
    assert [budget._left for budget in budgets] == [20] * 3


HOLDER = """
import sys, time
from extractor.images.budget import LargeImageSlot
slot = LargeImageSlot(sys.argv[1])
slot.take()
print("has it", flush=True)
time.sleep(60)
"""


def test_killed_process_frees_the_slot(tmp_path: Path) -> None:
    path = str(tmp_path / "slot")
    command = [sys.executable, "-c", HOLDER, path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "has it\n"
        budget = PixelBudget(100, 20, LargeImageSlot(path))
        large = in_thread(budget, 30)
        assert not large.wait(0.05)
        holder.kill()
        assert large.wait(10)


def test_slot_that_cannot_be_locked_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No such file"):
        LargeImageSlot(tmp_path / "none" / "slot")


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
