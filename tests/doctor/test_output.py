"""Checks of an output folder leave nothing behind."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from extractor.doctor.finding import Finding
from extractor.doctor.output import check_output


def findings(out: Path) -> dict[str, Finding]:
    return {each.name: each for each in check_output(str(out)) if isinstance(each, Finding)}


def state_of(folder: Path) -> list[tuple[str, int, int]]:
    paths = [folder, *sorted(folder.rglob("*"))]
    return [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths]


def failing(code: int) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def test_writable_folder_has_five_good_checks_and_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    before = state_of(tmp_path)
    found = findings(tmp_path / "out")
    assert list(found) == ["out", "lock", "sync", "rename", "room"]
    assert {each.state for each in found.values()} <= {"ok", "warning"}  # the disk may be full
    assert found["out"].text == "can be written"
    assert state_of(tmp_path) == before


def test_folder_that_does_not_exist_is_not_made(tmp_path: Path) -> None:
    before = state_of(tmp_path)
    found = findings(tmp_path / "new" / "out")
    assert found["out"].text == f"will be made in {tmp_path}"
    assert state_of(tmp_path) == before


def test_folder_with_other_files_is_broken_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    before = state_of(tmp_path)
    (found,) = findings(tmp_path).values()
    assert (found.name, found.state) == ("out", "broken")
    assert "not empty and holds no store" in found.text
    assert state_of(tmp_path) == before


def test_folder_of_several_stores_can_be_written(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "store.json").write_text("{}")
    assert findings(tmp_path)["out"].state == "ok"


def test_read_only_folder_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "mkdtemp", failing(errno.EROFS))
    (found,) = findings(tmp_path / "out").values()
    assert (found.name, found.state) == ("out", "broken")
    assert found.text == f"cannot write to {tmp_path}: Read-only file system"


@pytest.mark.parametrize(
    ("module", "function", "code", "name", "state"),
    [
        (fcntl, "flock", errno.ENOLCK, "lock", "warning"),
        (fcntl, "flock", errno.EIO, "lock", "broken"),
        (os, "fsync", errno.EINVAL, "sync", "warning"),
        (os, "fsync", errno.EIO, "sync", "broken"),
        (os, "rename", errno.EXDEV, "rename", "broken"),
    ],
)
def test_disk_that_lacks_a_function_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    function: str,
    code: int,
    name: str,
    state: str,
) -> None:
    monkeypatch.setattr(module, function, failing(code))
    found = findings(tmp_path)
    assert found[name].state == state
    assert os.strerror(code) in found[name].text
    assert found[name].advice
    assert {each.state for each in found.values() if each.name not in (name, "room")} == {"ok"}
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("blocks", "files", "free_files", "state"),
    [
        (2**20, 100, 1000, "ok"),
        (2**20, 0, 0, "ok"),  # as many as fit
        (2**20, 100, 50, "warning"),
        (2**20, 100, 3, "broken"),
        (1000, 100, 1000, "warning"),
        (0, 100, 1000, "broken"),
    ],
)
def test_room_counts_bytes_and_files(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    blocks: int,
    files: int,
    free_files: int,
    state: str,
) -> None:
    status = os.statvfs_result(
        (4096, 4096, 2**20, blocks, blocks, files, files, free_files, 0, 255)
    )
    monkeypatch.setattr(os, "statvfs", lambda _: status)
    found = findings(tmp_path)["room"]
    assert found.state == state
    assert found.details["free_bytes"] == 4096 * blocks
    assert ("more files" in found.text) is (files > 0)
