"""Time limit of images that are shown: a decoder that hangs costs its image only."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.pictures import noise

from extractor.errors import DecodeError
from extractor.images import time_limit
from extractor.images.decode import decode_into
from extractor.images.time_limit import decode_within
from extractor.images.types import EncodedImage
from extractor.preprocess import Preprocess

HALF = (0.5, 0.5, 0.5)
TRANSFORM = Preprocess((20, 30), "squash", (20, 30), "hamming", HALF, HALF, (0, 0, 0))


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let images whose name holds ``hang`` hang until the test ends; the list counts them."""
    release = threading.Event()
    begun: list[str] = []

    def decode(source: Any, *arguments: Any) -> Any:
        if "hang" in str(source):
            begun.append(str(source))
            release.wait(20)
            arguments[1][0][...] = 255
        return decode_into(source, *arguments)

    monkeypatch.setattr(time_limit, "decode_into", decode)
    monkeypatch.setattr(time_limit, "_hanging", [])
    yield begun
    release.set()


def picture(source: Any, seconds: float | None = None) -> np.ndarray[Any, Any]:
    out = np.zeros((20, 30, 3), np.uint8)
    decode_within(source, [TRANSFORM], [out], seconds=seconds)
    return out


def test_picture_is_that_of_the_decoder(tmp_path: Path) -> None:
    noise(0, 60, 90).save(tmp_path / "a.png")
    expected = np.zeros((20, 30, 3), np.uint8)
    info = decode_into(tmp_path / "a.png", [TRANSFORM], [expected])
    out = np.zeros_like(expected)
    assert decode_within(tmp_path / "a.png", [TRANSFORM], [out]) == info
    assert (out == expected).all()
    assert (picture(EncodedImage((tmp_path / "a.png").read_bytes())) == expected).all()


def test_errors_are_those_of_the_decoder(tmp_path: Path) -> None:
    with pytest.raises(DecodeError, match="No such file"):
        picture(tmp_path / "gone.png")
    with pytest.raises(TypeError, match="expected a path or an image"):
        picture(7)


def test_image_that_hangs_has_no_picture_and_one_thread(hanging: list[str]) -> None:
    out = np.zeros((20, 30, 3), np.uint8)
    for _ in range(3):
        with pytest.raises(DecodeError, match=r"not decoded within 0\.05 s") as caught:
            decode_within("hang.png", [TRANSFORM], [out], seconds=0.05)
        assert caught.value.reason == "timeout"
    assert hanging == ["hang.png"]
    assert not out.any()


def test_disk_that_hangs_costs_no_further_threads(
    hanging: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time_limit, "MAX_HANGING", 2)
    noise(0, 60, 90).save(tmp_path / "a.png")
    for name in ("hang1", "hang2", "hang3"):
        with pytest.raises(DecodeError, match=r"not decoded|2 other images hang"):
            picture(name, seconds=0.02)
    assert hanging == ["hang1", "hang2"]
    with pytest.raises(DecodeError, match="2 other images hang; check that their disk responds"):
        picture(tmp_path / "a.png")


def test_process_ends_while_an_image_hangs() -> None:
    code = """
        import threading
        import numpy as np
        from extractor.errors import DecodeError
        from extractor.images import time_limit
        from extractor.preprocess import Preprocess

        time_limit.decode_into = lambda *_: threading.Event().wait()
        half = (0.5, 0.5, 0.5)
        transform = Preprocess((1, 1), "squash", (1, 1), "hamming", half, half, (0, 0, 0))
        try:
            time_limit.decode_within("a", [transform], [np.zeros((1, 1, 3), np.uint8)], seconds=0.1)
        except DecodeError as error:
            print(error.reason)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "timeout\n"
