"""Size and time of files, as they are stored and compared."""

from __future__ import annotations

import os
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from extractor.images.files import read_file, size_and_mtime
from extractor.images.types import ReadFile

BILLION = 10**9


def status(size: int, mtime_ns: int) -> Any:
    return SimpleNamespace(st_size=size, st_mtime_ns=mtime_ns)


@pytest.mark.parametrize(
    ("year", "stored"),
    [(1600, -(2**63)), (1677, -(2**63)), (2263, 2**63 - 1), (2446, 2**63 - 1), (9999, 2**63 - 1)],
)
def test_time_beyond_int64_becomes_the_nearest_one(year: int, stored: int) -> None:
    seconds = int(datetime(year, 1, 1, tzinfo=timezone.utc).timestamp())
    assert size_and_mtime(status(7, seconds * BILLION)) == (7, stored)


@pytest.mark.parametrize("mtime_ns", [0, -1, -(2**63), 2**63 - 1, -86400 * BILLION])
def test_time_within_int64_stays(mtime_ns: int) -> None:
    assert size_and_mtime(status(0, mtime_ns)) == (0, mtime_ns)
    np.array([mtime_ns], np.int64)


@pytest.mark.parametrize(("size", "stored"), [(-1, 0), (2**63, 2**63 - 1), (5, 5)])
def test_size_is_within_int64_and_not_negative(size: int, stored: int) -> None:
    assert size_and_mtime(status(size, 1)) == (stored, 1)  # -1 means that there is no file


def test_reading_and_comparing_see_the_same_time(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    os.utime(path, ns=(0, 15_032_399_935 * BILLION))
    read = read_file(path)
    assert isinstance(read, ReadFile)
    assert (read.size, read.mtime_ns) == size_and_mtime(path.stat())
    assert read.mtime_ns < 2**63
