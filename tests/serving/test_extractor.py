"""``Extractor`` as a server uses it: many threads, gathering, failures, and its end."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.networks import mean_pixel
from support.pictures import noise

from extractor import DecodeError, Extractor, UsageError


def gray(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (level, level, level)).save(file, "PNG")
    return file.getvalue()


def rows_by_hand(extractor: Extractor, levels: list[int]) -> np.ndarray:
    preprocess = extractor.backbones[0].preprocess
    pixels = [
        (level / 255 - np.array(preprocess.mean)) / np.array(preprocess.std) for level in levels
    ]
    return np.array(pixels, np.float32)


@pytest.mark.parametrize("window", [None, 0, 5])
def test_concurrent_calls_get_their_own_rows(window: float | None) -> None:
    with Extractor(mean_pixel("cpu"), batch_window_ms=window, workers=2) as extractor:

        def call(i: int) -> np.ndarray:
            return extractor([gray(i % 256)] * (1 + i % 3))

        with ThreadPoolExecutor(50) as callers:
            results = list(callers.map(call, range(1000)))
        for i, rows in enumerate(results):
            expected = rows_by_hand(extractor, [i % 256] * (1 + i % 3))
            np.testing.assert_allclose(rows, expected, atol=1e-5)


def test_failures_take_the_places_of_rows() -> None:
    extractor = Extractor(mean_pixel("cpu"))
    found = extractor([gray(9), b"no image", gray(7)], on_error="return")
    assert isinstance(found[1], DecodeError)
    assert (found[1].index, found[1].reason) == (1, "not-an-image")
    np.testing.assert_allclose(found[0], rows_by_hand(extractor, [9])[0], atol=1e-5)
    np.testing.assert_allclose(found[2], rows_by_hand(extractor, [7])[0], atol=1e-5)


def test_all_images_may_fail() -> None:
    found = Extractor(mean_pixel("cpu"))([b"a", b"b"], on_error="return")
    assert [error.index for error in found if isinstance(error, DecodeError)] == [0, 1]


def test_first_error_is_raised_with_its_index() -> None:
    with pytest.raises(DecodeError, match="image 1: ") as caught:
        Extractor(mean_pixel("cpu"))([gray(1), b"a", b"b"])
    assert caught.value.index == 1


def test_no_batch_is_computed_after_a_failure() -> None:
    extractor = Extractor(mean_pixel("cpu"), batch_size=1)
    with pytest.raises(DecodeError, match="image 0: "):
        extractor([b"a", gray(1)])


def test_unknown_treatment_of_errors_is_refused() -> None:
    with pytest.raises(UsageError, match="on_error: got 'skip', expected 'raise' or 'return'"):
        Extractor(mean_pixel("cpu"))([gray(1)], on_error="skip")


@pytest.mark.parametrize("wrap", [io.BytesIO, bytearray, memoryview, lambda content: content])
def test_encoded_image_may_be_any_buffer_or_binary_file(wrap: object) -> None:
    extractor = Extractor(mean_pixel("cpu"))
    np.testing.assert_allclose(
        extractor([wrap(gray(80))]), rows_by_hand(extractor, [80]), atol=1e-5
    )


def test_file_that_cannot_be_read_is_an_image_that_fails() -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise OSError("the disk is gone")

    closed = io.BytesIO(gray(1))
    closed.close()
    extractor = Extractor(mean_pixel("cpu"))
    with pytest.raises(DecodeError, match="image 1: the file cannot be read: the disk is gone"):
        extractor([gray(1), Broken()])
    first, *others = extractor([gray(80), closed, Broken()], on_error="return")
    np.testing.assert_allclose(first, rows_by_hand(extractor, [80])[0], atol=1e-5)
    assert [(e.reason, e.index) for e in others] == [("unreadable", 1), ("unreadable", 2)]


def test_text_file_is_refused_with_advice() -> None:
    file: Any = io.StringIO("x")
    with pytest.raises(UsageError, match="image 0: got a file that returns str, expected bytes"):
        Extractor(mean_pixel("cpu"))([file])


@pytest.mark.parametrize("window", [-1, float("nan"), "5", True, 1e9])
def test_window_out_of_range_is_refused(window: object) -> None:
    with pytest.raises(UsageError, match=r"batch_window_ms: got .*, expected None or a number"):
        Extractor(mean_pixel("cpu"), batch_window_ms=window)


def test_closed_extractor_is_an_error() -> None:
    extractor = Extractor(mean_pixel("cpu"))
    extractor.close()
    extractor.close()  # once more does no harm
    with pytest.raises(UsageError, match="this Extractor is closed; make a new one"):
        extractor([gray(1)])


def test_threads_end_with_the_extractor() -> None:
    before = set(threading.enumerate())
    extractor = Extractor(mean_pixel("cpu"), workers=2)
    extractor([gray(1), gray(2)])
    assert len(set(threading.enumerate()) - before) == 3
    collected = weakref.ref(extractor)
    del extractor
    gc.collect()
    assert collected() is None
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


def test_close_waits_for_the_threads() -> None:
    before = set(threading.enumerate())
    extractor = Extractor(mean_pixel("cpu"), workers=2)
    extractor([gray(1), gray(2)])
    extractor.close()
    assert set(threading.enumerate()) <= before


def test_close_during_calls_loses_no_answer() -> None:
    for _ in range(5):
        extractor = Extractor(mean_pixel("cpu"), workers=2, batch_size=2)

        def call(extractor: Extractor = extractor) -> str:
            try:
                return str(len(extractor([gray(1)] * 5)))
            except UsageError as error:
                return str(error)

        with ThreadPoolExecutor(8) as callers:
            futures = [callers.submit(call) for _ in range(20)]
            extractor.close()
            answers = {future.result(30) for future in futures}
        assert answers <= {"5", "this Extractor is closed; make a new one"}


def test_close_lets_a_call_of_many_batches_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("extractor.serving.service.PATIENCE_SECONDS", 0.05)
    before = set(threading.enumerate())
    extractor = Extractor(mean_pixel("cpu"), workers=2, batch_size=1)
    is_computing, may_go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        is_computing.set()
        assert may_go_on.wait(30)

    extractor.backbones[0].module.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as callers:
        call = callers.submit(extractor, [gray(level) for level in range(4)])
        assert is_computing.wait(30)
        extractor.close()  # while the first of four batches is computed
        may_go_on.set()
        np.testing.assert_allclose(
            call.result(30), rows_by_hand(extractor, [0, 1, 2, 3]), atol=1e-5
        )
    assert set(threading.enumerate()) <= before  # the call ended the threads


def test_calls_change_no_setting_of_the_process() -> None:
    before = torch.get_num_threads(), torch.is_grad_enabled()
    extractor = Extractor(mean_pixel("cpu"), threads=before[0] + 1)
    seen: list[tuple[int, bool]] = []

    def watch() -> None:
        for _ in range(50):
            seen.append((torch.get_num_threads(), torch.is_grad_enabled()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(20):
        extractor([gray(3)])
    watcher.join()
    assert set(seen) == {before}


def test_lists_longer_than_a_batch_keep_their_order() -> None:
    extractor = Extractor(mean_pixel("cpu"), batch_size=3)
    levels = list(range(0, 200, 10))
    rows = extractor([gray(level) for level in levels])
    np.testing.assert_allclose(rows, rows_by_hand(extractor, levels), atol=1e-5)


def test_decoding_by_a_gpu_is_refused_before_a_model_is_loaded() -> None:
    with pytest.raises(UsageError, match=r"decode: got gpu, .* try scaled or exact"):
        Extractor("no_such_model", decode="gpu")


def test_one_image_of_pillow_may_be_in_several_places(tmp_path: Path) -> None:
    noise(0, 300, 200).save(tmp_path / "a.jpg", quality=95)
    with Extractor(mean_pixel("cpu"), workers=8) as extractor, ThreadPoolExecutor(4) as callers:
        expected = extractor([tmp_path / "a.jpg"])
        for _ in range(10):
            image = Image.open(tmp_path / "a.jpg")  # reads the pixels when they are needed
            for rows in callers.map(extractor, [[image] * 4] * 4):
                np.testing.assert_allclose(rows, expected[[0] * 4], atol=0.02)


def test_copy_of_an_extractor_is_refused() -> None:
    extractor = Extractor(mean_pixel("cpu"))
    for copy_of in (pickle.dumps, copy.deepcopy):
        with pytest.raises(UsageError, match=r"cannot be pickled or copied.*one in each process"):
            copy_of(extractor)
