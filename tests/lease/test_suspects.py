"""Images that were being decoded when a run died."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from extractor.lease.suspects import Suspects
from extractor.loading.crash_log import SLOT_BYTES, CrashLog
from extractor.store.format import IN_FLIGHT, SUSPECTS

NAMES = [
    b"/a/b.jpg",
    b"/new\nline.png",
    b"/\xff\xfe.png",
    "/\N{GRINNING FACE}.png".encode(),
    b"/" + b"n" * 4094,
]


def leave_crash_log(folder: Path, *names: bytes) -> None:
    """Leave what a dying run leaves behind."""
    crash_log = CrashLog(folder / IN_FLIGHT, len(names)).__enter__()
    for slot, name in enumerate(names):
        crash_log.note(slot, name)


def test_no_suspects_without_a_run_that_died(tmp_path: Path) -> None:
    assert Suspects(tmp_path).load() == ([], [])
    leave_crash_log(tmp_path, b"")
    assert Suspects(tmp_path).load() == ([], [])
    assert not (tmp_path / SUSPECTS).exists()


def test_suspects_of_all_runs_are_remembered(tmp_path: Path) -> None:
    leave_crash_log(tmp_path, *NAMES)
    assert Suspects(tmp_path).load() == (sorted(NAMES), sorted(NAMES))
    leave_crash_log(tmp_path, b"/z", b"/a/b.jpg")
    suspects = sorted([*NAMES, b"/z"])
    assert Suspects(tmp_path).load() == (suspects, [b"/a/b.jpg", b"/z"])
    (tmp_path / IN_FLIGHT).unlink()
    assert Suspects(tmp_path).load() == (suspects, [])


@pytest.mark.parametrize("content", [b"", b'["/a', b"\xff\xfe"])
def test_torn_list_of_suspects_counts_as_empty(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SUSPECTS).write_bytes(content)
    assert Suspects(tmp_path).load() == ([], [])
    leave_crash_log(tmp_path, b"/z")
    assert Suspects(tmp_path).load() == ([b"/z"], [b"/z"])
    assert json.loads((tmp_path / SUSPECTS).read_bytes()) == ["/z"]


@pytest.mark.parametrize("size", [1, SLOT_BYTES - 1, SLOT_BYTES + 1])
def test_torn_crash_log_is_read_as_far_as_it_goes(tmp_path: Path, size: int) -> None:
    leave_crash_log(tmp_path, b"/a", b"/b")
    os.truncate(tmp_path / IN_FLIGHT, size)
    suspects, _ = Suspects(tmp_path).load()
    assert suspects == ([b"/a"] if size >= SLOT_BYTES - 1 else [])
