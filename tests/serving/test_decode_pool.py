"""Decoding for many callers: order, limits, and decoders that hang."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from extractor.errors import SourceError
from extractor.images.types import EncodedImage, Failure, ImageInfo, ImageSource
from extractor.preprocess import Preprocess
from extractor.serving import decode_pool
from extractor.serving.decode_pool import DecodeOptions, DecodePool

SIZE = 8


def gray(level: int) -> EncodedImage:
    file = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (level, level, level)).save(file, "PNG")
    return EncodedImage(file.getvalue())


def make_pool(workers: int = 2, timeout: float = 30.0) -> DecodePool:
    options = DecodeOptions(workers, 10**6, timeout, "exact")
    return DecodePool([Preprocess.standard(SIZE)], options)


@pytest.fixture
def pool() -> Iterator[DecodePool]:
    pool = make_pool()
    yield pool
    pool.close()


class Hanging:
    """Stands in for the decoder: images with a red pixel hang until the end of the test."""

    def __init__(self) -> None:
        self.end = threading.Event()
        self.running = 0
        self.most = 0
        self.lock = threading.Lock()

    def __call__(
        self, source: ImageSource, _: object, outs: list[np.ndarray], *__: object
    ) -> ImageInfo:
        assert isinstance(source, EncodedImage)
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        if source.data == b"hang":
            self.end.wait(30)
            outs[0][...] = 99
        else:
            time.sleep(0.01)
            outs[0][...] = source.data[0]
        with self.lock:
            self.running -= 1
        return ImageInfo(1, -1, 1, 1)


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hanging]:
    decoder = Hanging()
    monkeypatch.setattr(decode_pool, "decode_into", decoder)
    yield decoder
    decoder.end.set()


@pytest.mark.parametrize("count", [1, 2, 7])
def test_pictures_are_in_the_order_of_the_images(pool: DecodePool, count: int) -> None:
    decoded = pool.decode([gray(10 * i) for i in range(count)])
    (rows,) = decoded.pictures
    assert rows.shape == (count, SIZE, SIZE, 3)
    assert [int(row[0, 0, 0]) for row in rows] == [10 * i for i in range(count)]
    assert all(isinstance(outcome, ImageInfo) for outcome in decoded.outcomes)


@pytest.mark.parametrize("count", [1, 3])
def test_undecodable_image_is_a_black_picture(pool: DecodePool, count: int) -> None:
    sources = [EncodedImage(b"no image"), *(gray(200) for _ in range(count - 1))]
    decoded = pool.decode(sources)
    assert isinstance(decoded.outcomes[0], Failure)
    assert not decoded.pictures[0][0].any()
    assert [int(row.min()) for row in decoded.pictures[0][1:]] == [200] * (count - 1)


def test_no_image_gives_no_picture(pool: DecodePool) -> None:
    decoded = pool.decode([])
    assert decoded.outcomes == ()
    assert decoded.pictures[0].shape == (0, SIZE, SIZE, 3)


def test_single_image_is_decoded_in_the_calling_thread(
    pool: DecodePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []

    def note(*_: object) -> ImageInfo:
        threads.append(threading.current_thread())
        return ImageInfo(1, -1, 1, 1)

    monkeypatch.setattr(decode_pool, "decode_into", note)
    pool.decode([gray(1)])
    assert threads == [threading.current_thread()]
    pool.decode([gray(1), gray(2)])
    assert threading.current_thread() not in threads[1:]


def test_threads_live_on_between_calls(pool: DecodePool) -> None:
    pool.decode([gray(1), gray(2), gray(3)])
    before = set(threading.enumerate())
    pool.decode([gray(4), gray(5), gray(6)])
    assert set(threading.enumerate()) <= before


def test_callers_share_the_limit_on_decoders(hanging: Hanging) -> None:
    pool = make_pool(workers=2)
    threads = [
        threading.Thread(target=pool.decode, args=([EncodedImage(b"\x05")] * n,))
        for n in (1, 3, 1, 2, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert hanging.most == 2
    pool.close()


def test_hanging_decoder_fails_its_image_alone(hanging: Hanging) -> None:
    pool = make_pool(workers=2, timeout=0.2)
    decoded = pool.decode([EncodedImage(b"\x05"), EncodedImage(b"hang"), EncodedImage(b"\x07")])
    assert [isinstance(outcome, Failure) for outcome in decoded.outcomes] == [False, True, False]
    failure = decoded.outcomes[1]
    assert isinstance(failure, Failure)
    assert failure.reason == "timeout"
    hanging.end.set()
    time.sleep(0.05)  # the late decoder writes its picture
    assert [int(row.max()) for row in decoded.pictures[0]] == [5, 0, 7]
    pool.close()


def test_pool_keeps_its_size_after_hanging_decoders(hanging: Hanging) -> None:
    pool = make_pool(workers=2, timeout=0.1)
    for _ in range(3):
        pool.decode([EncodedImage(b"hang"), EncodedImage(b"hang")])
    decoded = pool.decode([EncodedImage(bytes([i])) for i in range(6)])
    assert [int(row.max()) for row in decoded.pictures[0]] == list(range(6))
    hanging.end.set()
    pool.close()


def test_many_hanging_decoders_are_an_error(
    hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_pool, "MAX_ABANDONED", 1)
    pool = make_pool(workers=2, timeout=0.05)
    with pytest.raises(SourceError, match="2 images were not decoded in time"):
        pool.decode([EncodedImage(b"hang"), EncodedImage(b"hang")])


def test_unexpected_error_is_raised_where_the_caller_waits(
    pool: DecodePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> ImageInfo:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(decode_pool, "decode_into", fail)
    for count in (1, 2):
        with pytest.raises(ZeroDivisionError, match="a fault"):
            pool.decode([gray(1)] * count)


def test_closed_pool_still_decodes_for_calls_in_progress(pool: DecodePool) -> None:
    pool.decode([gray(1), gray(2)])
    pool.close()
    decoded = pool.decode([gray(3), gray(4)])
    assert [int(row.max()) for row in decoded.pictures[0]] == [3, 4]
