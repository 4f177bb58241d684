"""Glob patterns leave out files and folders."""

from __future__ import annotations

import fnmatch
import os

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from extractor.errors import UsageError
from extractor.images.exclude import DEFAULT_EXCLUDES, Excludes


def excluded(pattern: str, path: str) -> bool:
    """Return whether a pattern leaves out a path, which ends with a slash if it is a folder."""
    own = Excludes([pattern], defaults=False)
    is_folder = path.endswith("/")
    return own.match(os.fsencode(path.rstrip("/")), is_folder=is_folder) is not None


# As `git check-ignore` has it, except that it looks at bytes, and does not know "./" and "//".
@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        (
            "thumbs",
            ["thumbs", "thumbs/", "a/thumbs/", "a/b/thumbs"],
            ["thumbs2", "Thumbs", "xthumbs"],
        ),
        ("thumbs/", ["thumbs/", "a/thumbs/"], ["thumbs", "a/thumbs"]),
        ("*_thumb.jpg", ["a_thumb.jpg", "b/_thumb.jpg"], ["a_thumb.jpg.png", "a_thumb/x.jpg"]),
        ("/thumbs", ["thumbs", "thumbs/"], ["a/thumbs"]),
        ("./thumbs", ["thumbs", "thumbs/"], ["a/thumbs"]),
        ("a/thumbs", ["a/thumbs", "a/thumbs/"], ["b/a/thumbs", "thumbs"]),
        ("a//thumbs", ["a/thumbs"], ["b/a/thumbs"]),
        ("a/*", ["a/b", "a/b/"], ["a/b/c", "b/a/c", "a"]),
        ("a/**", ["a/b", "a/b/c", "a/b/"], ["a", "a/", "b/a/c"]),
        ("**/thumbs", ["thumbs", "a/thumbs", "a/b/thumbs/"], ["thumbs2", "a/thumbs/b"]),
        ("**/a/b", ["a/b", "c/a/b", "d/c/a/b"], ["b", "c/b", "ca/b"]),
        ("a/**/b", ["a/b", "a/c/b", "a/c/d/b"], ["b", "ab", "a/bc", "x/a/b"]),
        ("**/2019/*.png", ["2019/a.png", "x/2019/b.png"], ["2019/x/a.png", "2019/a.jpg"]),
        ("a**b", ["ab", "axb", "c/axxb"], ["a/b"]),
        ("?.jpg", ["a.jpg", "é.jpg", "x/b.jpg"], ["ab.jpg", ".jpg"]),
        ("[ab].jpg", ["a.jpg", "b.jpg"], ["c.jpg", "ab.jpg"]),
        ("[!ab].jpg", ["c.jpg", "é.jpg"], ["a.jpg"]),
        ("[^ab].jpg", ["c.jpg"], ["b.jpg"]),
        ("[0-9]*", ["1", "12.jpg"], ["a1"]),
        ("[]a]", ["]", "a"], ["b"]),
        (r"\*.jpg", ["*.jpg"], ["a.jpg"]),
        (r"\[a].jpg", ["[a].jpg"], ["a.jpg"]),
        ("a.b+c(d)|e", ["a.b+c(d)|e"], ["aXb+c(d)|e", "e"]),
        ("new\nline*", ["new\nline", "new\nline\nb"], ["newline"]),
    ],
)
def test_pattern_leaves_out(pattern: str, yes: list[str], no: list[str]) -> None:
    assert [path for path in yes if not excluded(pattern, path)] == []
    assert [path for path in no if excluded(pattern, path)] == []


@pytest.mark.parametrize(
    ("pattern", "name"), [("[", "["), ("a[", "a["), ("[]", "[]"), ("[!]", "!")]
)
def test_unfinished_set_is_literal(pattern: str, name: str) -> None:
    assert excluded(pattern, name)
    assert not excluded(pattern, "a")


@given(
    st.text("ab.-*?[]!", min_size=1, max_size=6),
    st.text("ab.-[]!", min_size=1, max_size=6).filter(lambda name: name not in (".", "..")),
)
@example("[b-a]", "b")
def test_names_match_as_in_fnmatch(pattern: str, name: str) -> None:
    if pattern in (".", "..") or "[!]" in pattern or "[]" in pattern:
        return
    assert excluded(pattern, name) == fnmatch.fnmatchcase(name, pattern)


def test_names_that_are_no_utf8_match() -> None:
    name = b"scan\xff.jpg"
    for pattern in ("scan*", "scan?.jpg", os.fsdecode(name)):
        assert Excludes([pattern]).match(name, is_folder=False) == pattern
    assert Excludes(["scan.jpg"]).match(name, is_folder=False) is None


@pytest.mark.parametrize("pattern", ["", "/", "//", ".", "./", "..", "../a", "a/../b", "a/./b"])
def test_pattern_that_matches_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(UsageError, match=r"exclude: got .*, expected a name or a path below INPUT"):
        Excludes([pattern])


@pytest.mark.parametrize("patterns", ["*.jpg", [b"*.jpg"], [3]])
def test_patterns_of_another_type_are_refused(patterns: list[str]) -> None:
    with pytest.raises(UsageError, match=r"exclude: got .*, expected a list of patterns"):
        Excludes(patterns)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        (b"@eaDir", "@eaDir/"),
        (b"@EADIR", "@eaDir/"),
        (b"$Recycle.Bin", "$RECYCLE.BIN/"),
        (b".Trash-1000", ".Trash*/"),
        (b"Lightroom Catalog Previews.lrdata", "*.lrdata/"),
        (b"System Volume Information", "System Volume Information/"),
    ],
)
def test_default_leaves_out_folders_of_systems(name: bytes, pattern: str) -> None:
    assert Excludes().match(b"photos/" + name, is_folder=True) == pattern
    assert Excludes().match(b"photos/" + name, is_folder=False) is None
    assert Excludes(defaults=False).match(name, is_folder=True) is None


def test_every_default_is_a_folder_that_leaves_out_itself() -> None:
    for pattern in DEFAULT_EXCLUDES:
        name = pattern.rstrip("/").replace("*", "x").encode()
        assert pattern.endswith("/")
        assert Excludes().match(name, is_folder=True) == pattern


@pytest.mark.parametrize(
    "name", [b"thumbs", b"cache", b"previews", b"trash", b"lost+found", b"recycle", b"eaDir", b"a"]
)
def test_default_keeps_folders_that_may_hold_originals(name: bytes) -> None:
    assert Excludes().match(name, is_folder=True) is None


def test_file_is_left_out_with_a_folder_above_it() -> None:
    own = Excludes(["thumbs/", "b/*.png"], defaults=False)
    assert own.match_file(b"a/thumbs/b.jpg") == "thumbs/"
    assert own.match_file(b"b/c.png") == "b/*.png"
    assert own.match_file(b"a/thumbs") is None
    assert own.match_file(b"a/b/c.png") is None
