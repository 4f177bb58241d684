"""Workers read the paths of their shards from a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extractor.errors import StoreError
from extractor.lease.paths_file import BLOCK, PathsFile, write_paths

PATHS = [b"%d/\xff\n%d.jpg" % (i % 7, i) for i in range(2 * BLOCK + 3)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> PathsFile:
    return write_paths(tmp_path_factory.mktemp("paths") / "new", PATHS)


@given(st.integers(0, len(PATHS)), st.integers(0, len(PATHS)))
def test_any_range_reads_its_paths(written: PathsFile, start: int, stop: int) -> None:
    assert written.read(range(start, max(start, stop))) == PATHS[start : max(start, stop)]


@pytest.mark.parametrize("count", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1])
def test_last_block_may_have_any_length(tmp_path: Path, count: int) -> None:
    assert write_paths(tmp_path, PATHS[:count]).read(range(count)) == PATHS[:count]


def test_paths_beyond_the_end_are_an_error(written: PathsFile) -> None:
    with pytest.raises(StoreError, match="lacks images"):
        written.read(range(len(PATHS) - 1, len(PATHS) + 1))


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot read the plan"):
        PathsFile(tmp_path / "gone").read(range(1))
