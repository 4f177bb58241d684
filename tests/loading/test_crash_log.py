"""What takes the process down is noted, remembered, and decoded in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.hostile_decoder import hostile_python, write_hostile
from support.pictures import noise

from extractor.errors import DecodeError
from extractor.images.decode import decode_into
from extractor.images.types import ImageInfo
from extractor.loading import crash_log as isolation
from extractor.loading.crash_log import SLOT_BYTES, InFlight, decode_apart
from extractor.preprocess import Preprocess

PREPROCESSES = [
    Preprocess((8, 6), "squash", (8, 6), "bilinear", (0, 0, 0), (1, 1, 1)),
    Preprocess((12, 12), "contain", (12, 12), "bicubic", (0, 0, 0), (1, 1, 1), (1, 2, 3)),
]


@pytest.fixture
def hostile_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Children have it; this process does not. Returns the file in which they tell."""
    monkeypatch.setenv("PYTHONPATH", hostile_python(tmp_path / "hostile"))
    monkeypatch.setenv("HOSTILE_TOLD", str(tmp_path / "told"))
    return tmp_path / "told"


def blank() -> list[np.ndarray]:
    return [np.full((*one.input_size, 3), 201, np.uint8) for one in PREPROCESSES]


def apart(path: bytes, timeout: float = 30, max_pixels: int = 10**6) -> Any:
    outs = blank()
    info = decode_apart(path, PREPROCESSES, outs, max_pixels=max_pixels, timeout_seconds=timeout)
    return info, outs


def waited_for(ready: Callable[[], bool], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until, f"not so after {seconds} s"
        time.sleep(0.01)


# ---------------------------------------------------------------------------------------------
# Images in flight

NAMES = [
    b"/a/b.jpg",
    b"/new\nline.png",
    b"/\xff\xfe.png",
    "/\N{GRINNING FACE}.png".encode(),
    b"/" + b"n" * 4094,
]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:12]))
def test_what_is_noted_is_left_byte_by_byte(tmp_path: Path, name: bytes) -> None:
    with InFlight(tmp_path / "f", 3) as in_flight:
        in_flight.note(1, name)
        assert InFlight.left(tmp_path / "f") == [name]


def test_every_slot_is_kept_apart_and_told_once_in_order(tmp_path: Path) -> None:
    with InFlight(tmp_path / "f", 4) as in_flight:
        assert InFlight.left(tmp_path / "f") == []
        for slot, name in enumerate((b"/c", b"/a", b"/b" * 2000, b"/a")):
            in_flight.note(slot, name)
        assert InFlight.left(tmp_path / "f") == [b"/a", b"/b" * 2000, b"/c"]
        in_flight.note(2, b"/d")  # shorter than what it follows
        in_flight.note(0, b"")
        assert InFlight.left(tmp_path / "f") == [b"/a", b"/d"]


def test_a_slot_too_many_and_a_path_too_long_are_passed_over(tmp_path: Path) -> None:
    with InFlight(tmp_path / "f", 2) as in_flight:
        in_flight.note(1, b"/a")
        in_flight.note(2, b"/b")
        in_flight.note(1, b"/" * (SLOT_BYTES - 1))
        assert InFlight.left(tmp_path / "f") == [b"/a"]


def test_leaving_in_order_leaves_nothing_and_a_late_thread_does_no_harm(tmp_path: Path) -> None:
    with InFlight(tmp_path / "f", 1) as in_flight:
        in_flight.note(0, b"/a")
    assert list(tmp_path.iterdir()) == []
    in_flight.note(0, b"")
    assert InFlight.left(tmp_path / "f") == []


def test_the_room_for_names_is_taken_at_once_so_that_a_full_disk_kills_nobody(
    tmp_path: Path,
) -> None:
    with InFlight(tmp_path / "f", 40):
        status = (tmp_path / "f").stat()
        assert status.st_blocks * 512 >= status.st_size == 40 * SLOT_BYTES


def test_an_error_leaves_nothing_either(tmp_path: Path) -> None:
    def fail() -> None:
        with InFlight(tmp_path / "f", 1) as in_flight:
            in_flight.note(0, b"/a")
            raise RuntimeError("an error")

    with pytest.raises(RuntimeError, match="an error"):
        fail()
    assert InFlight.left(tmp_path / "f") == []


def test_a_process_that_is_killed_leaves_its_images(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from extractor.loading.crash_log import InFlight\n"
        "with InFlight(Path(sys.argv[1]), 2) as in_flight:\n"
        "    in_flight.note(0, b'/done'); in_flight.note(0, b''); in_flight.note(1, b'/at hand')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path / "f")], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert InFlight.left(tmp_path / "f") == [b"/at hand"]


# ---------------------------------------------------------------------------------------------
# A process of its own


def test_an_image_comes_out_as_it_does_here(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/a \xff\n'\".png"
    with open(path, "wb") as file:
        noise(3, 40, 30).save(file, "PNG")
    here = blank()
    expected = decode_into(path, PREPROCESSES, here)
    info, outs = apart(path)
    assert info == expected
    assert info.sha256
    assert all(np.array_equal(one, other) for one, other in zip(outs, here, strict=True))


@pytest.mark.parametrize("max_pixels", [1199, 10**6])
def test_a_reason_comes_through_with_size_and_time(tmp_path: Path, max_pixels: int) -> None:
    path = tmp_path / "a.png"
    noise(3, 40, 30).save(path)
    if max_pixels == 10**6:
        os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(DecodeError, match=r"are 1200 pixels|exceeds limit|truncated") as caught:
        apart(os.fsencode(path), max_pixels=max_pixels)
    status = path.stat()
    assert caught.value.reason == ("too-large" if max_pixels == 1199 else "truncated")
    assert (caught.value.size, caught.value.mtime_ns) == (status.st_size, status.st_mtime_ns)


def test_a_file_that_is_gone_is_unreadable_there_too(tmp_path: Path) -> None:
    with pytest.raises(DecodeError, match="No such file") as caught:
        apart(os.fsencode(tmp_path / "gone.png"))
    assert (caught.value.reason, caught.value.size) == ("unreadable", -1)


@pytest.mark.parametrize(
    ("deed", "how"),
    [
        (f"signal {int(signal.SIGSEGV)}", "SIGSEGV"),
        (f"signal {int(signal.SIGKILL)}", "SIGKILL"),
        ("exit 7", "exit code 7"),
        ("exit 0", "."),
        (f"signal {signal.SIGRTMIN + 5}", "."),
    ],
)
def test_a_decoder_that_ends_its_process_has_crashed(
    tmp_path: Path, hostile_decoder: Path, deed: str, how: str
) -> None:
    path = write_hostile(tmp_path / "a.png", deed)
    with pytest.raises(DecodeError, match=how) as caught:
        apart(path)
    status = os.stat(path)
    assert caught.value.reason == "crashed"
    assert (caught.value.size, caught.value.mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert deed in hostile_decoder.read_text()  # it was the image, and no fault of the start


def test_a_decoder_that_hangs_is_ended(
    tmp_path: Path, hostile_decoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_hostile(tmp_path / "a.png", "hang")
    monkeypatch.setattr(isolation, "START_SECONDS", 0.5)
    begun = time.monotonic()
    with pytest.raises(DecodeError, match=r"not decoded within 1\.5 s") as caught:
        apart(path, timeout=1.5)
    assert time.monotonic() - begun < 10
    assert caught.value.reason == "timeout"
    assert caught.value.size == os.stat(path).st_size
    child = int(hostile_decoder.read_text().split()[0])
    with pytest.raises(ProcessLookupError, match="No such process"):
        os.kill(child, 0)


@pytest.mark.usefixtures("hostile_decoder")
def test_a_decoder_that_prints_does_not_disturb_the_answer(tmp_path: Path) -> None:
    here = blank()
    path = write_hostile(tmp_path / "a.png", "print")
    expected = decode_into(path, PREPROCESSES, here)
    info, outs = apart(path)
    assert info == expected
    assert all(np.array_equal(one, other) for one, other in zip(outs, here, strict=True))


def test_modules_in_the_current_folder_are_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numpy.py").write_text("open('run', 'w').close()\n")
    noise(3, 40, 30).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    info, _ = apart(os.fsencode(tmp_path / "a.png"))
    assert isinstance(info, ImageInfo)
    assert not (tmp_path / "run").exists()


PARENT = """
import os, signal, sys
import numpy as np
from extractor.loading.crash_log import decode_apart
from extractor.preprocess import Preprocess

signal.signal(signal.SIGINT, lambda *_: print("Ctrl-C", flush=True))
one = Preprocess((8, 6), "squash", (8, 6), "bilinear", (0, 0, 0), (1, 1, 1))
out = np.zeros((8, 6, 3), np.uint8)
told = decode_apart(os.fsencode(sys.argv[1]), [one], [out], max_pixels=10**6, timeout_seconds=30)
print(told.width, told.height, flush=True)
"""


def parent(path: bytes) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PARENT, os.fsdecode(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def test_ctrl_c_does_not_reach_the_image(tmp_path: Path, hostile_decoder: Path) -> None:
    with parent(write_hostile(tmp_path / "a.png", "slow")) as run:
        waited_for(lambda: hostile_decoder.exists() and "slow" in hostile_decoder.read_text())
        os.killpg(run.pid, signal.SIGINT)
        told, _ = run.communicate(timeout=30)
    assert told.split("\n") == ["Ctrl-C", "30 20", ""]
    assert run.returncode == 0


def test_a_decoder_that_hangs_does_not_outlive_the_run(
    tmp_path: Path, hostile_decoder: Path
) -> None:
    with parent(write_hostile(tmp_path / "a.png", "hang")) as run:
        waited_for(lambda: hostile_decoder.exists() and "hang" in hostile_decoder.read_text())
        run.kill()
    child = int(hostile_decoder.read_text().split()[0])
    try:
        waited_for(lambda: not is_alive(child), seconds=1)
    finally:
        if is_alive(child):
            os.kill(child, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie, which waits for its parent alone."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
