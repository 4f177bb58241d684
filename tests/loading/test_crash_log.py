"""Paths noted by a process survive its death, byte by byte."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from extractor.errors import StoreError
from extractor.loading.crash_log import SLOT_BYTES, CrashLog

NAMES = [
    b"/a/b.jpg",
    b"/new\nline.png",
    b"/\xff\xfe.png",
    "/\N{GRINNING FACE}.png".encode(),
    b"/" + b"n" * 4094,
]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:12]))
def test_paths_are_read_back_byte_by_byte(tmp_path: Path, name: bytes) -> None:
    with CrashLog(tmp_path / "f", 3) as crash_log:
        crash_log.note(1, name)
        assert CrashLog.read(tmp_path / "f") == [name]


def test_slots_are_independent_and_paths_sorted_without_duplicates(tmp_path: Path) -> None:
    with CrashLog(tmp_path / "f", 4) as crash_log:
        assert CrashLog.read(tmp_path / "f") == []
        for slot, name in enumerate((b"/c", b"/a", b"/b" * 2000, b"/a")):
            crash_log.note(slot, name)
        assert CrashLog.read(tmp_path / "f") == [b"/a", b"/b" * 2000, b"/c"]
        crash_log.note(2, b"/d")  # shorter than what it follows
        crash_log.note(0, b"")
        assert CrashLog.read(tmp_path / "f") == [b"/a", b"/d"]


def test_slots_out_of_range_and_long_paths_are_ignored(tmp_path: Path) -> None:
    with CrashLog(tmp_path / "f", 2) as crash_log:
        crash_log.note(1, b"/a")
        crash_log.note(2, b"/b")
        crash_log.note(1, b"/" * (SLOT_BYTES - 1))
        assert CrashLog.read(tmp_path / "f") == [b"/a"]


def test_leaving_removes_the_file_and_late_notes_are_harmless(tmp_path: Path) -> None:
    with CrashLog(tmp_path / "f", 1) as crash_log:
        crash_log.note(0, b"/a")
    assert list(tmp_path.iterdir()) == []
    crash_log.note(0, b"")
    assert CrashLog.read(tmp_path / "f") == []


def test_the_file_is_allocated_on_entering(
    tmp_path: Path,
) -> None:
    with CrashLog(tmp_path / "f", 40):
        status = (tmp_path / "f").stat()
        assert status.st_blocks * 512 >= status.st_size == 40 * SLOT_BYTES


def test_an_exception_removes_the_file(tmp_path: Path) -> None:
    def fail() -> None:
        with CrashLog(tmp_path / "f", 1) as crash_log:
            crash_log.note(0, b"/a")
            raise RuntimeError("an error")

    with pytest.raises(RuntimeError, match="an error"):
        fail()
    assert CrashLog.read(tmp_path / "f") == []


def test_a_killed_process_leaves_its_paths(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from extractor.loading.crash_log import CrashLog\n"
        "with CrashLog(Path(sys.argv[1]), 2) as crash_log:\n"
        "    crash_log.note(0, b'/done'); crash_log.note(0, b''); crash_log.note(1, b'/at hand')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path / "f")], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert CrashLog.read(tmp_path / "f") == [b"/at hand"]


def test_a_folder_that_is_missing_is_a_store_error(tmp_path: Path) -> None:
    with (
        pytest.raises(StoreError, match=r"cannot write .*gone/f: No such file"),
        CrashLog(tmp_path / "gone" / "f", 1),
    ):
        pass
