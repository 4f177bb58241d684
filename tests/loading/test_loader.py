"""Batches come in order and complete, whatever single images do."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.loading import only_hanging_images_are_late

from extractor.images.types import EncodedImage, Failure, ImageInfo, ImageSource
from extractor.loading import gate, image_decoder, read_ahead
from extractor.loading.buffers import MAX_BUFFERS, MIN_BUFFERS
from extractor.loading.loader import BatchLoader
from extractor.loading.options import LoaderOptions
from extractor.preprocess import Preprocess

SIZE = (8, 6)
PREPROCESS = Preprocess(SIZE, "squash", SIZE, "bilinear", (0, 0, 0), (1, 1, 1))


def gray(level: int) -> np.ndarray:
    return np.full((5, 5), level, np.uint8)


def batches_of(levels: Sequence[int], size: int) -> Iterator[list[ImageSource]]:
    for i in range(0, len(levels), size):
        yield [gray(level) for level in levels[i : i + size]]


def load(plan: Iterator[list[Any]], size: int, workers: int) -> list[tuple[np.ndarray, list[Any]]]:
    with BatchLoader(plan, [PREPROCESS], LoaderOptions(batch_size=size, workers=workers)) as loader:
        result = []
        for batch in loader:
            result.append((batch.pictures[0].numpy().copy(), list(batch.outcomes)))
            batch.release()
        return result


@pytest.mark.parametrize("workers", [1, 2, 7])
@pytest.mark.parametrize("size", [1, 4, 50])
@pytest.mark.parametrize("count", [0, 1, 4, 37])
def test_order_ignores_worker_count_and_batch_size(count: int, size: int, workers: int) -> None:
    levels = [(i * 7) % 256 for i in range(count)]
    seen = load(batches_of(levels, size), size, workers)
    assert len(seen) == -(-count // size)
    flat = [int(row[0, 0, 0]) for pixels, outcomes in seen for row in pixels[: len(outcomes)]]
    assert flat == levels


def test_every_batch_has_the_same_shape_and_unused_rows_are_black() -> None:
    seen = load(batches_of([9] * 13, 5), 5, 2)
    assert [pixels.shape for pixels, _ in seen] == [(5, *SIZE, 3)] * 3
    assert [len(outcomes) for _, outcomes in seen] == [5, 5, 3]
    assert (seen[-1][0][3:] == 0).all()
    assert (seen[-1][0][:3] == 9).all()


def test_order_ignores_slow_images(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = image_decoder.decode_into

    def slow(source: np.ndarray, *rest: object) -> ImageInfo:
        time.sleep(0.15 if source[0, 0] % 10 == 0 else 0)
        return decode(source, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(image_decoder, "decode_into", slow)
    seen = load(batches_of(range(40), 3), 3, 4)
    flat = [int(row[0, 0, 0]) for pixels, outcomes in seen for row in pixels[: len(outcomes)]]
    assert flat == list(range(40))


def test_failed_image_costs_only_its_own_row(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.effect_noise((300, 300), 90).save(stream, "JPEG")
    cut = EncodedImage(stream.getvalue()[:-3000])
    plan: Iterator[Any] = iter([[gray(1), cut, gray(3)], [str(tmp_path / "none.jpg"), gray(5)]])
    (first, first_outcomes), (second, second_outcomes) = load(plan, 3, 2)
    assert [type(o) for o in first_outcomes] == [ImageInfo, Failure, ImageInfo]
    assert [type(o) for o in second_outcomes] == [Failure, ImageInfo]
    assert first_outcomes[1].reason == "truncated"  # type: ignore[attr-defined]
    assert second_outcomes[0].reason == "unreadable"  # type: ignore[attr-defined]
    assert (first[0] == 1).all()
    assert (first[1] == 0).all()  # black, not half a picture
    assert (first[2] == 3).all()
    assert (second[0] == 0).all()
    assert (second[1] == 5).all()


def test_batch_of_failures_does_not_stop_the_loader() -> None:
    bad = EncodedImage(b"no image")
    plan: Iterator[Any] = iter([[bad, bad], [gray(7)]])
    (_, outcomes), (pixels, _) = load(plan, 2, 2)
    assert all(isinstance(o, Failure) for o in outcomes)
    assert (pixels[0] == 7).all()


@pytest.mark.parametrize(
    ("memory", "batches"), [(10**9, MAX_BUFFERS), (6 * 2 * (8 * 6 * 3), 6), (1, MIN_BUFFERS)]
)
def test_look_ahead_is_bounded_by_memory(
    monkeypatch: pytest.MonkeyPatch, memory: int, batches: int
) -> None:
    monkeypatch.setattr("extractor.loading.buffers.MAX_BUFFERS_BYTES", memory)
    asked = 0

    def plan() -> Iterator[list[ImageSource]]:
        nonlocal asked
        while True:
            asked += 1
            yield [gray(1), gray(2)]

    with BatchLoader(plan(), [PREPROCESS], LoaderOptions(batch_size=2, workers=3)) as loader:
        iterator = iter(loader)
        next(iterator)  # never released
        deadline = time.monotonic() + 5
        while asked < batches and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert asked == batches


def test_buffers_are_reused() -> None:
    with BatchLoader(
        batches_of([1] * 60, 2), [PREPROCESS], LoaderOptions(batch_size=2, workers=2)
    ) as loader:
        addresses = set()
        for batch in loader:
            addresses.add(batch.pictures[0].data_ptr())
            batch.release()
    assert len(addresses) <= MAX_BUFFERS


def test_leaving_early_stops_the_threads() -> None:
    before = threading.active_count()
    with BatchLoader(
        batches_of([1] * 999, 2), [PREPROCESS], LoaderOptions(batch_size=2, workers=4)
    ) as loader:
        next(iter(loader))
    assert threading.active_count() == before


def test_errors_of_the_plan_reach_the_caller() -> None:
    def plan() -> Iterator[list[ImageSource]]:
        yield [gray(1)]
        raise RuntimeError("the plan broke")

    with pytest.raises(RuntimeError, match="the plan broke"):
        load(plan(), 1, 2)


def test_errors_of_a_thread_reach_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> ImageInfo:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("extractor.loading.image_decoder.decode_into", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        load(batches_of([1, 2], 2), 2, 2)


@pytest.mark.parametrize("count", [0, 3])
def test_batch_of_the_wrong_size_is_an_error(count: int) -> None:
    with pytest.raises(ValueError, match=f"a batch of {count} images, expected 1 to 2"):
        load(iter([[gray(1)] * count]), 2, 1)


@pytest.mark.cuda
def test_pinned_buffers_are_pinned() -> None:
    with BatchLoader(
        batches_of([1], 1), [PREPROCESS], LoaderOptions(batch_size=1, workers=1, pin=True)
    ) as loader:
        assert next(iter(loader)).pictures[0].is_pinned()


def test_slow_files_are_read_ahead_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file cannot be read, and one cannot be decoded."""
    paths = [tmp_path / f"{i:03d}.png" for i in range(200)]
    for i, path in enumerate(paths):
        Image.new("L", (5, 5), i).save(path)
    paths[60].unlink()
    paths[150].write_bytes(b"no image")
    read = image_decoder.read_file
    at_a_time: set[int] = set()
    most = 0

    def slow(path: str, *rest: int) -> object:
        nonlocal most
        at_a_time.add(threading.get_ident())
        most = max(most, len(at_a_time))
        time.sleep(0.02)
        at_a_time.discard(threading.get_ident())
        return read(path, *rest)

    monkeypatch.setattr(image_decoder, "read_file", slow)
    plan: Iterator[Any] = iter([[str(path) for path in paths[i : i + 8]] for i in range(0, 200, 8)])
    with BatchLoader(plan, [PREPROCESS], LoaderOptions(batch_size=8, workers=2)) as loader:
        levels: list[int | str] = []
        for batch in loader:
            for index, outcome in enumerate(batch.outcomes):
                level = int(batch.pictures[0][index, 0, 0, 0])
                levels.append(outcome.reason if isinstance(outcome, Failure) else level)
            batch.release()
        assert 2 < loader.readers <= read_ahead.MAX_READERS
    assert 2 < most <= 2 + read_ahead.MAX_READERS
    expected: list[int | str] = list(range(200))
    expected[60], expected[150] = "unreadable", "not-an-image"
    assert levels == expected


def test_fast_disks_get_no_reading_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "SLOW_READ_SECONDS", 0.2)  # on a busy machine, too
    path = tmp_path / "a.png"
    Image.effect_noise((400, 300), 90).save(path)
    with BatchLoader(
        iter([[str(path)] * 64]), [PREPROCESS], LoaderOptions(batch_size=64, workers=2)
    ) as loader:
        (batch,) = loader
        assert all(isinstance(outcome, ImageInfo) for outcome in batch.outcomes)
        assert loader.readers == 0


def test_threads_that_wait_for_pythons_lock_are_no_slow_disk(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("L", (5, 5)).save(path)
    stop = threading.Event()

    def compute() -> None:
        while not stop.is_set():
            pass

    busy = [threading.Thread(target=compute, daemon=True) for _ in range(3)]
    for thread in busy:
        thread.start()
    try:
        with BatchLoader(
            iter([[str(path)] * 64]), [PREPROCESS], LoaderOptions(batch_size=64, workers=2)
        ) as loader:
            (batch,) = loader
            assert all(isinstance(outcome, ImageInfo) for outcome in batch.outcomes)
            assert loader.readers == 0
    finally:
        stop.set()


@pytest.mark.parametrize("last", ["reads", "hangs"])
def test_hanging_reader_costs_only_its_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    paths = [str(tmp_path / f"{i:02d}.png") for i in range(80)]
    for i, path in enumerate(paths):
        Image.new("L", (5, 5), i).save(path)
    bad = 79 if last == "hangs" else 50
    go_on = threading.Event()
    read = image_decoder.read_file
    only_hanging_images_are_late(monkeypatch, lambda source: source == paths[bad])

    def slow(path: str, *rest: int) -> object:
        if path == paths[bad]:
            go_on.wait(30)
        time.sleep(0.02)
        return read(path, *rest)

    monkeypatch.setattr(image_decoder, "read_file", slow)
    plan: Iterator[Any] = iter([paths[i : i + 8] for i in range(0, 80, 8)])
    seen: list[bool] = []
    with BatchLoader(
        plan, [PREPROCESS], LoaderOptions(batch_size=8, workers=2, image_timeout_seconds=0.5)
    ) as loader:
        for batch in loader:
            seen += [isinstance(outcome, ImageInfo) for outcome in batch.outcomes]
            batch.release()
        assert loader.readers
        go_on.set()
    assert seen == [index != bad for index in range(80)]


@pytest.mark.parametrize("cores", [0, 1, 2, 5])
def test_decoding_threads_rest_during_computation(
    monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    lock, busy, most = threading.Lock(), 0, 0

    def counted(source: np.ndarray, *rest: object) -> ImageInfo:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        time.sleep(0.02)  # so that there is work left all the while
        with lock:
            busy -= 1
        return decode(source, *rest)  # type: ignore[arg-type]

    decode = image_decoder.decode_into
    monkeypatch.setattr(image_decoder, "decode_into", counted)
    monkeypatch.setattr(gate, "MAX_WAIT_SECONDS", 5.0)
    seen = 0
    plan = batches_of([1] * 60, 6)
    with BatchLoader(plan, [PREPROCESS], LoaderOptions(batch_size=6, workers=3)) as loader:
        for batch in loader:
            with batch.alone_on(cores):
                most = busy  # those at an image came to its end
                time.sleep(0.05)
                assert most == 0 if cores >= 3 else most <= 3 - cores
                batch.release()
            seen += len(batch.outcomes)
    assert seen == 60


def test_computation_does_not_wait_long_for_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, go_on = threading.Event(), threading.Event()
    decode = image_decoder.decode_into

    def hang(source: np.ndarray, *rest: object) -> ImageInfo:
        if source[0, 0] == 3:
            slow.set()
            go_on.wait(30)
        return decode(source, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(image_decoder, "decode_into", hang)
    with BatchLoader(
        batches_of([0, 1, 2, 3], 2), [PREPROCESS], LoaderOptions(batch_size=2, workers=1)
    ) as loader:
        batch = next(iter(loader))
        assert slow.wait(30)
        started = time.monotonic()
        with batch.alone_on(1):
            assert gate.MAX_WAIT_SECONDS <= time.monotonic() - started < 10
        go_on.set()


def test_hanging_decoder_does_not_occupy_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    decode = image_decoder.decode_into

    def hang(source: np.ndarray, *rest: object) -> ImageInfo:
        if source[0, 0] == 3:
            go_on.wait(30)
        return decode(source, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(image_decoder, "decode_into", hang)
    only_hanging_images_are_late(monkeypatch, lambda source: source[0, 0] == 3)  # type: ignore[index,call-overload]
    seen = []
    with BatchLoader(
        batches_of(list(range(20)), 2),
        [PREPROCESS],
        LoaderOptions(batch_size=2, workers=2, image_timeout_seconds=0.3),
    ) as loader:
        for batch in loader:
            with batch.alone_on(1):  # one is left, though one hung
                time.sleep(0.02)
            seen += [isinstance(outcome, ImageInfo) for outcome in batch.outcomes]
            batch.release()
        go_on.set()
    assert seen == [index != 3 for index in range(20)]


def test_bytes_read_ahead_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "a.png")
    Image.effect_noise((100, 80), 90).save(path)
    size = (tmp_path / "a.png").stat().st_size
    read = image_decoder.read_file
    ahead, most = 0, 0

    def slow(*args: object) -> object:
        nonlocal ahead, most
        time.sleep(0.02)
        ahead += 1
        most = max(most, ahead)
        return read(*args)  # type: ignore[arg-type]

    def decoded(*args: object) -> ImageInfo:
        nonlocal ahead
        ahead -= 1
        time.sleep(0.002)
        return decode(*args)  # type: ignore[arg-type]

    decode = image_decoder.decode_into
    monkeypatch.setattr(image_decoder, "read_file", slow)
    monkeypatch.setattr(image_decoder, "decode_into", decoded)
    monkeypatch.setattr(read_ahead, "MAX_AHEAD_BYTES", 3 * size)
    monkeypatch.setattr(read_ahead, "MAX_READERS", 4)
    plan: Iterator[Any] = iter([[path] * 50 for _ in range(4)])
    with BatchLoader(plan, [PREPROCESS], LoaderOptions(batch_size=50, workers=1)) as loader:
        seen = 0
        for batch in loader:
            seen += sum(isinstance(outcome, ImageInfo) for outcome in batch.outcomes)
            batch.release()
        assert loader.readers
    assert seen == 200
    assert most <= 3 + 4 + 1  # what waits, what each reader has just read, and what is decoded


def test_threads_are_started_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("extractor.loading.read_ahead.SLOW_READ_SECONDS", 0.0)
    monkeypatch.setattr("extractor.loading.read_ahead.SLOW_READ_SHARE", 0.0)
    monkeypatch.setattr("extractor.loading.read_ahead.OBSERVED_IMAGES", 1)
    begin = threading.Thread.start

    def slowly(thread: threading.Thread) -> None:
        begin(thread)
        time.sleep(0.02)  # what began already gets to work before the next one begins

    monkeypatch.setattr(threading.Thread, "start", slowly)
    assert len(load(batches_of([1] * 60, 2), 2, 4)) == 30
