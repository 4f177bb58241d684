"""An image that crashes or hangs its decoder costs a child process and nothing else."""

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
from extractor.loading import subprocess_decode
from extractor.loading.subprocess_decode import decode_apart
from extractor.preprocess import Preprocess

PREPROCESSES = [
    Preprocess((8, 6), "squash", (8, 6), "bilinear", (0, 0, 0), (1, 1, 1)),
    Preprocess((12, 12), "contain", (12, 12), "bicubic", (0, 0, 0), (1, 1, 1), (1, 2, 3)),
]


@pytest.fixture
def hostile_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give children a faulty decoder. Returns the file in which they report."""
    monkeypatch.setenv("PYTHONPATH", hostile_python(tmp_path / "hostile"))
    monkeypatch.setenv("HOSTILE_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


def blank() -> list[np.ndarray]:
    return [np.full((*preprocess.input_size, 3), 201, np.uint8) for preprocess in PREPROCESSES]


def decode_in_child(path: bytes, timeout: float = 30, max_pixels: int = 10**6) -> Any:
    outs = blank()
    info = decode_apart(path, PREPROCESSES, outs, max_pixels=max_pixels, timeout_seconds=timeout)
    return info, outs


def wait_until(ready: Callable[[], bool], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until, f"still false after {seconds} s"
        time.sleep(0.01)


def test_pictures_and_info_equal_those_of_decoding_here(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/a \xff\n'\".png"
    with open(path, "wb") as file:
        noise(3, 40, 30).save(file, "PNG")
    here = blank()
    expected = decode_into(path, PREPROCESSES, here)
    info, outs = decode_in_child(path)
    assert info == expected
    assert info.sha256
    assert all(np.array_equal(one, other) for one, other in zip(outs, here, strict=True))


@pytest.mark.parametrize("max_pixels", [1199, 10**6])
def test_failures_keep_reason_size_and_time(tmp_path: Path, max_pixels: int) -> None:
    path = tmp_path / "a.png"
    noise(3, 40, 30).save(path)
    if max_pixels == 10**6:
        os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(DecodeError, match=r"are 1200 pixels|exceeds limit|truncated") as caught:
        decode_in_child(os.fsencode(path), max_pixels=max_pixels)
    status = path.stat()
    assert caught.value.reason == ("too-large" if max_pixels == 1199 else "truncated")
    assert (caught.value.size, caught.value.mtime_ns) == (status.st_size, status.st_mtime_ns)


def test_a_missing_file_is_unreadable(tmp_path: Path) -> None:
    with pytest.raises(DecodeError, match="No such file") as caught:
        decode_in_child(os.fsencode(tmp_path / "gone.png"))
    assert (caught.value.reason, caught.value.size) == ("unreadable", -1)


@pytest.mark.parametrize(
    ("deed", "exit_description"),
    [
        (f"signal {int(signal.SIGSEGV)}", "SIGSEGV"),
        (f"signal {int(signal.SIGKILL)}", "SIGKILL"),
        ("exit 7", "exit code 7"),
        ("exit 0", "."),
        (f"signal {signal.SIGRTMIN + 5}", "."),
    ],
)
def test_a_decoder_that_kills_its_process_has_crashed(
    tmp_path: Path, hostile_decoder: Path, deed: str, exit_description: str
) -> None:
    path = write_hostile(tmp_path / "a.png", deed)
    with pytest.raises(DecodeError, match=exit_description) as caught:
        decode_in_child(path)
    status = os.stat(path)
    assert caught.value.reason == "crashed"
    assert (caught.value.size, caught.value.mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert deed in hostile_decoder.read_text()  # it was the image, not the start of the process


def test_a_signal_that_ends_the_run_does_not_end_the_decoder(
    tmp_path: Path, hostile_decoder: Path
) -> None:
    """Schedulers send it to all processes of a job. The image would be a failure for good."""
    path = write_hostile(tmp_path / "a.png", f"signal {int(signal.SIGTERM)}")
    info, _ = decode_in_child(path)
    assert (info.width, info.height) == (30, 20)
    assert f"signal {int(signal.SIGTERM)}" in hostile_decoder.read_text()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


@pytest.mark.slow
def test_a_hanging_decoder_is_killed_after_the_timeout(
    tmp_path: Path, hostile_decoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_hostile(tmp_path / "a.png", "hang")
    monkeypatch.setattr(subprocess_decode, "START_SECONDS", 6.5)  # it imports torch
    started = time.monotonic()
    with pytest.raises(DecodeError, match=r"not decoded within 1\.5 s") as caught:
        decode_in_child(path, timeout=1.5)
    assert time.monotonic() - started < 30  # it hangs for a minute
    assert caught.value.reason == "timeout"
    assert caught.value.size == os.stat(path).st_size
    child = int(hostile_decoder.read_text().split()[0])
    with pytest.raises(ProcessLookupError, match="No such process"):
        os.kill(child, 0)


@pytest.mark.usefixtures("hostile_decoder")
def test_output_of_a_library_does_not_disturb_the_answer(tmp_path: Path) -> None:
    here = blank()
    path = write_hostile(tmp_path / "a.png", "print")
    expected = decode_into(path, PREPROCESSES, here)
    info, outs = decode_in_child(path)
    assert info == expected
    assert all(np.array_equal(one, other) for one, other in zip(outs, here, strict=True))


def test_modules_in_the_current_folder_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numpy.py").write_text("open('run', 'w').close()\n")
    noise(3, 40, 30).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    info, _ = decode_in_child(os.fsencode(tmp_path / "a.png"))
    assert isinstance(info, ImageInfo)
    assert not (tmp_path / "run").exists()


STOPPED = """
import sys, time
from extractor.images.types import ImageInfo
from extractor.loading import image_decoder
from extractor.loading.loader import BatchLoader
from extractor.loading.options import LoaderOptions
from extractor.preprocess import Preprocess

def slow(*_):
    for step in range(40):  # two seconds, each of which the process has to live through
        time.sleep(0.05)
    return ImageInfo(1, 1, 1, 1)

image_decoder.decode_into = slow
options = LoaderOptions(2, 2, image_timeout_seconds=4)
loader = BatchLoader([[sys.argv[1]] * 2], [Preprocess.standard(8)], options)
with loader:
    print("begins", flush=True)
    for batch in loader:
        print(*(type(outcome).__name__ for outcome in batch.outcomes), flush=True)
"""


@pytest.mark.slow
def test_images_of_a_stopped_process_do_not_time_out(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    noise(3, 40, 30).save(path)
    command = [sys.executable, "-c", STOPPED, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begins\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGSTOP)
        time.sleep(6)
        process.send_signal(signal.SIGCONT)
        assert process.stdout.readline() == "ImageInfo ImageInfo\n"


PARENT = """
import os, signal, sys
import numpy as np
from extractor.loading.subprocess_decode import decode_apart
from extractor.preprocess import Preprocess

signal.signal(signal.SIGINT, lambda *_: print("Ctrl-C", flush=True))
preprocess = Preprocess((8, 6), "squash", (8, 6), "bilinear", (0, 0, 0), (1, 1, 1))
out = np.zeros((8, 6, 3), np.uint8)
path = os.fsencode(sys.argv[1])
info = decode_apart(path, [preprocess], [out], max_pixels=10**6, timeout_seconds=30)
print(info.width, info.height, flush=True)
"""


def parent(path: bytes) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PARENT, os.fsdecode(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def test_ctrl_c_does_not_reach_the_child(tmp_path: Path, hostile_decoder: Path) -> None:
    with parent(write_hostile(tmp_path / "a.png", "slow")) as run:
        wait_until(lambda: hostile_decoder.exists() and "slow" in hostile_decoder.read_text())
        os.killpg(run.pid, signal.SIGINT)
        printed, _ = run.communicate(timeout=30)
    assert printed.split("\n") == ["Ctrl-C", "30 20", ""]
    assert run.returncode == 0


def test_a_hanging_child_does_not_outlive_the_run(tmp_path: Path, hostile_decoder: Path) -> None:
    with parent(write_hostile(tmp_path / "a.png", "hang")) as run:
        wait_until(lambda: hostile_decoder.exists() and "hang" in hostile_decoder.read_text())
        run.kill()
    child = int(hostile_decoder.read_text().split()[0])
    try:
        wait_until(lambda: not is_alive(child), seconds=10)
    finally:
        if is_alive(child):
            os.kill(child, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    """Return whether a process runs. A zombie only waits for its parent."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
