"""Packed paths behave like a list of the same paths."""

from __future__ import annotations

import bisect
import pickle
import sys
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import extractor.paths as paths_module
from extractor.paths import PackedPaths, find_path, is_ascending, paths_between

SETTINGS = settings(deadline=None, derandomize=True, database=None)
PATH = st.binary(max_size=3).map(lambda path: path.replace(b"\0", b"/"))
LISTS = st.lists(PATH, max_size=12)
INDICES = st.integers(-14, 14)
BLOCKS = st.integers(1, 5)


@SETTINGS
@given(LISTS, BLOCKS, INDICES, st.slices(12))
def test_packed_paths_index_like_a_list(
    paths: list[bytes], block: int, index: int, part: slice
) -> None:
    with mock.patch.object(paths_module, "BLOCK", block):
        packed = PackedPaths(iter(paths))
        assert (len(packed), list(packed)) == (len(paths), paths)
        assert packed == paths
        assert packed[part] == paths[part]
        assert (b"a" in packed) == (b"a" in paths)
        if -len(paths) <= index < len(paths):
            assert packed[index] == paths[index]
        else:
            with pytest.raises(IndexError, match=f"path {index} is out of range"):
                packed[index]


@SETTINGS
@given(LISTS, BLOCKS)
def test_ascending_paths_are_known_across_blocks(paths: list[bytes], block: int) -> None:
    expected = paths == sorted(set(paths))
    with mock.patch.object(paths_module, "BLOCK", block):
        assert PackedPaths(paths).is_ascending == is_ascending(paths) == expected


@SETTINGS
@given(LISTS, BLOCKS, PATH, PATH)
def test_ascending_paths_are_found_by_bisection(
    listed: list[bytes], block: int, path: bytes, other: bytes
) -> None:
    paths = sorted(set(listed))
    with mock.patch.object(paths_module, "BLOCK", block):
        packed = PackedPaths(paths)
        expected = paths.index(path) if path in paths else -1
        assert find_path(packed, path) == find_path(paths, path) == expected
        part = range(bisect.bisect_left(paths, path), bisect.bisect_right(paths, other))
        assert paths_between(packed, path, other) == paths_between(paths, path, other) == part


def test_packed_paths_differ_from_other_ones() -> None:
    packed = PackedPaths([b"a", b"b"])
    assert packed != [b"a", b"c"]
    assert packed != [b"a"]
    assert packed != b"ab"
    assert packed == [b"a", b"b"]
    assert packed == PackedPaths([b"a", b"b"])


def test_packed_paths_survive_pickling() -> None:
    packed = PackedPaths([b"a", b"\xff"])
    assert packed[1] == b"\xff"
    assert pickle.loads(pickle.dumps(packed)) == [b"a", b"\xff"]


def test_packed_paths_take_a_tenth_of_the_memory_of_a_list() -> None:
    paths = [b"photos/%04d/img_%07d.jpg" % (i // 1000, i) for i in range(20_000)]
    in_list = sum(map(sys.getsizeof, paths)) + sys.getsizeof(paths)
    assert len(pickle.dumps(PackedPaths(paths))) < in_list / 10
