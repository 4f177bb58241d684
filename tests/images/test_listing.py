"""Folders, files and lists become one sorted list of images."""

from __future__ import annotations

import contextlib
import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from extractor.errors import SourceError
from extractor.images import listing
from extractor.images.listing import (
    ImageList,
    UnlistedFolder,
    display_path,
    list_images,
    read_list,
)

not_root = pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")


def add(folder: Path | bytes, *names: str | bytes, content: bytes = b"no image at all") -> None:
    """Create files with their folders."""
    for name in names:
        path = os.path.join(os.fsencode(folder), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 10, 10)).save(file, "JPEG")
    return file.getvalue()


def eps() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "EPS")
    return file.getvalue()


def listed(*inputs: str | bytes | os.PathLike[str]) -> list[bytes]:
    return list(list_images(inputs).paths)


class TestFolder:
    def test_images_at_any_depth_are_listed(self, tmp_path: Path) -> None:
        add(tmp_path, "a.jpg", "b/c.png", "b/d/e/f.webp")
        (tmp_path / "empty").mkdir()
        images = list_images(tmp_path)
        assert images.root == os.fsencode(tmp_path)
        assert list(images.paths) == [b"a.jpg", b"b/c.png", b"b/d/e/f.webp"]
        assert len(images) == 3
        assert images.full_path(2) == os.fsencode(tmp_path / "b/d/e/f.webp")
        assert images.passed_over == 0

    def test_order_follows_bytes_not_text(self, tmp_path: Path) -> None:
        # As text, a byte that is no UTF-8 becomes U+DCFF and comes before an emoji.
        emoji, byte = "\N{CAMERA}.jpg".encode(), b"\xff.jpg"
        assert os.fsdecode(byte) < os.fsdecode(emoji)
        assert emoji < byte
        try:
            add(tmp_path, emoji, byte)
        except OSError:
            pytest.skip("the file system takes only UTF-8 names")
        assert listed(tmp_path) == [emoji, byte]

    def test_order_follows_whole_paths_not_folders(self, tmp_path: Path) -> None:
        # "." and "-" come before "/", and "0" after it.
        add(tmp_path, "a/b.jpg", "a.jpg", "a-1.jpg", "a0.jpg", "a/a/z.jpg", "B.jpg")
        assert listed(tmp_path) == [
            b"B.jpg",
            b"a-1.jpg",
            b"a.jpg",
            b"a/a/z.jpg",
            b"a/b.jpg",
            b"a0.jpg",
        ]

    def test_hidden_files_and_folders_are_skipped(self, tmp_path: Path) -> None:
        add(tmp_path, "a.jpg", ".b.jpg", ".c/d.jpg", "e/.f/g.jpg", "e/.h.jpg", "._a.jpg")
        images = list_images(tmp_path)
        assert list(images.paths) == [b"a.jpg"]
        assert images.passed_over == 0

    def test_hidden_inputs_are_listed(self, tmp_path: Path) -> None:
        add(tmp_path, ".photos/a.jpg", ".photos/.b.jpg", ".c.jpg")
        assert listed(tmp_path / ".photos") == [b"a.jpg"]
        assert listed(tmp_path / ".c.jpg") == [b".c.jpg"]

    def test_other_files_are_skipped_and_counted(self, tmp_path: Path) -> None:
        add(tmp_path, "a.jpg", "notes.txt", "README", "b/Thumbs.db", "b/c.jpg.part", "d.h5")
        images = list_images(tmp_path)
        assert list(images.paths) == [b"a.jpg"]
        assert images.passed_over == 5

    @pytest.mark.parametrize(
        "name",
        ["a.jpg", "a.JPG", "a.Jpeg", "a.png", "a.gif", "a.bmp", "a.tif", "a.tiff", "a.webp"],
    )
    def test_files_with_an_image_suffix_are_listed(self, tmp_path: Path, name: str) -> None:
        add(tmp_path, name, content=b"text")  # that it is none is reported when it is read
        assert listed(tmp_path) == [name.encode()]

    @pytest.mark.parametrize("name", ["a", "a.dat", "a.jpg_large", "a.txt", "a.jpg~", "a.ps"])
    def test_files_with_image_content_are_listed(self, tmp_path: Path, name: str) -> None:
        add(tmp_path, name, content=jpeg())
        add(tmp_path, "other" + name)
        images = list_images(tmp_path)
        assert list(images.paths) == [name.encode()]
        assert images.passed_over == 1

    @pytest.mark.parametrize("name", ["a.eps", "a.ps", "a"])
    def test_undecodable_formats_are_skipped(self, tmp_path: Path, name: str) -> None:
        add(tmp_path, name, content=eps())
        add(tmp_path, "b.jpg")
        images = list_images(tmp_path)
        assert list(images.paths) == [b"b.jpg"]
        assert images.passed_over == 1

    def test_pipes_are_skipped_without_waiting(self, tmp_path: Path) -> None:
        add(tmp_path, "b.jpg")
        os.mkfifo(tmp_path / "a.jpg")
        os.mkfifo(tmp_path / "pipe")
        images = list_images(tmp_path)
        assert list(images.paths) == [b"b.jpg"]
        assert images.passed_over == 2

    def test_folders_with_an_image_suffix_are_walked(self, tmp_path: Path) -> None:
        add(tmp_path, "a.jpg/b.jpg")
        (tmp_path / "c.jpg").mkdir()
        assert listed(tmp_path) == [b"a.jpg/b.jpg"]

    def test_unprintable_names_are_listed(self, tmp_path: Path) -> None:
        strange = [b"new\nline.jpg", b"tab\t.jpg", b" .jpg", b"-o.jpg", b"deep\n/a.jpg"]
        add(tmp_path, *strange)
        assert listed(tmp_path) == sorted(strange)

    @not_root
    def test_forbidden_folders_are_listed_as_paths(self, tmp_path: Path) -> None:
        add(tmp_path, "a.jpg", "closed/b.jpg")
        (tmp_path / "closed").chmod(0)
        try:
            assert listed(tmp_path) == [b"a.jpg", b"closed"]
            with pytest.raises(SourceError, match=r"cannot list .*closed: Permission denied"):
                list_images(tmp_path / "closed")
        finally:
            (tmp_path / "closed").chmod(0o700)

    def test_broken_folders_are_listed_as_paths(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        add(tmp_path, "a.jpg", "broken/b.jpg", "c/d.jpg")
        scandir = os.scandir

        def failing(path: bytes) -> object:
            if os.path.basename(path.rstrip(b"/")) == b"broken":
                raise OSError(5, "Input/output error")
            return scandir(path)

        monkeypatch.setattr(os, "scandir", failing)
        images = list_images(tmp_path)
        assert list(images.paths) == [b"a.jpg", b"broken", b"c/d.jpg"]
        assert images.unlisted == ((b"broken", "Input/output error"),)
        with pytest.raises(SourceError, match=r"cannot list .*broken: Input/output error"):
            list_images(tmp_path / "broken")
        # Of several inputs, the others are listed.
        images = list_images([tmp_path / "c", tmp_path / "broken"])
        assert list(images.paths) == [b"broken", b"c/d.jpg"]
        assert images.unlisted == ((b"broken", "Input/output error"),)

    def test_input_that_cannot_be_seen_is_unlisted_beside_others(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        add(tmp_path, "a/1.jpg", "b/2.jpg")
        status_of = os.stat

        def failing(path: bytes, **arguments: bool) -> os.stat_result:
            if os.fsencode(path).endswith(b"/b"):
                raise OSError(errno.ESTALE, "Stale file handle")
            return status_of(path, **arguments)

        monkeypatch.setattr(os, "stat", failing)
        images = list_images([tmp_path / "a", tmp_path / "b"])
        assert list(images.paths) == [b"a/1.jpg", b"b"]
        assert images.unlisted == ((b"b", "Stale file handle"),)
        with pytest.raises(SourceError, match=r"cannot read .*b: Stale file handle"):
            list_images(tmp_path / "b")
        with pytest.raises(SourceError, match=r"cannot read .*c: No such file"):
            list_images([tmp_path / "a", tmp_path / "c"])

    @pytest.mark.parametrize("broken", ["", "b"])
    def test_folder_that_breaks_off_is_unlisted_and_keeps_what_was_seen(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
    ) -> None:
        add(tmp_path, "a.jpg", "b/c.jpg", "b/d.jpg")
        folder = os.fsencode(tmp_path / broken)
        scandir = os.scandir

        class BreaksOff:
            def __init__(self, path: bytes) -> None:
                with scandir(path) as entries:
                    self._entries = sorted(entries, key=lambda entry: entry.name)[:1]

            def __enter__(self) -> BreaksOff:
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def __iter__(self) -> Iterator[os.DirEntry[bytes]]:
                yield from self._entries
                raise OSError(errno.EIO, "Input/output error")

        def failing(path: bytes) -> object:
            return BreaksOff(path) if path.rstrip(b"/") == folder else scandir(path)

        monkeypatch.setattr(os, "scandir", failing)
        images = list_images(tmp_path)
        seen = [b"a.jpg", b"b", b"b/c.jpg"] if broken else [b"a.jpg"]
        assert list(images.paths) == seen
        assert images.unlisted == ((broken.encode(), "Input/output error"),)


class TestLinks:
    def test_linked_folders_are_followed(self, tmp_path: Path) -> None:
        add(tmp_path, "elsewhere/a.jpg", "photos/b.jpg")
        (tmp_path / "photos/linked").symlink_to(tmp_path / "elsewhere")
        assert listed(tmp_path / "photos") == [b"b.jpg", b"linked/a.jpg"]

    def test_two_links_to_one_folder_are_both_walked(self, tmp_path: Path) -> None:
        add(tmp_path, "elsewhere/a.jpg")
        (tmp_path / "photos").mkdir()
        for name in ("x", "y"):
            (tmp_path / "photos" / name).symlink_to(tmp_path / "elsewhere")
        assert listed(tmp_path / "photos") == [b"x/a.jpg", b"y/a.jpg"]

    @pytest.mark.parametrize(("link", "target"), [("a/b/up", ".."), ("a/here", "."), ("a/top", "")])
    def test_links_to_a_folder_above_are_not_followed(
        self, tmp_path: Path, link: str, target: str
    ) -> None:
        add(tmp_path, "a/b/c.jpg")
        (tmp_path / link).symlink_to(target or tmp_path)
        assert listed(tmp_path) == [b"a/b/c.jpg"]

    def test_links_in_a_ring_are_followed_once(self, tmp_path: Path) -> None:
        add(tmp_path, "a/1.jpg", "b/2.jpg")
        (tmp_path / "a/over").symlink_to(tmp_path / "b")
        (tmp_path / "b/over").symlink_to(tmp_path / "a")
        assert listed(tmp_path) == [b"a/1.jpg", b"a/over/2.jpg", b"b/2.jpg", b"b/over/1.jpg"]

    def test_linked_images_are_listed_under_the_name_of_the_link(self, tmp_path: Path) -> None:
        add(tmp_path, "data/0017", content=jpeg())
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos/cat.jpg").symlink_to(tmp_path / "data/0017")
        (tmp_path / "photos/dog").symlink_to(tmp_path / "data/0017")
        assert listed(tmp_path / "photos") == [b"cat.jpg", b"dog"]

    def test_link_whose_target_cannot_be_seen_is_unlisted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        add(tmp_path, "a.jpg", "there/b.jpg")
        (tmp_path / "nas").symlink_to("there")
        (tmp_path / "loop").symlink_to("loop")

        def is_dir(entry: os.DirEntry[bytes]) -> bool:
            if entry.name == b"nas":
                raise OSError(errno.ESTALE, "Stale file handle")
            return entry.is_dir()

        class Entry:
            def __init__(self, entry: os.DirEntry[bytes]) -> None:
                self._entry = entry

            def __getattr__(self, name: str) -> object:
                if name == "is_dir":
                    return lambda: is_dir(self._entry)
                return getattr(self._entry, name)

        scandir = os.scandir

        @contextlib.contextmanager
        def failing(path: bytes) -> Iterator[list[Entry]]:
            with scandir(path) as entries:
                yield [Entry(entry) for entry in entries]

        monkeypatch.setattr(os, "scandir", failing)
        images = list_images(tmp_path)
        assert list(images.paths) == [b"a.jpg", b"nas", b"there/b.jpg"]
        assert images.unlisted == ((b"nas", "Stale file handle"),)
        assert images.passed_over == 1

    def test_links_to_themselves_with_an_image_suffix_are_listed(self, tmp_path: Path) -> None:
        (tmp_path / "a.jpg").symlink_to("a.jpg")
        (tmp_path / "b").symlink_to("b")
        images = list_images(tmp_path)
        assert list(images.paths) == [b"a.jpg"]
        assert images.passed_over == 1

    def test_dangling_links_with_an_image_suffix_are_listed(self, tmp_path: Path) -> None:
        (tmp_path / "a.jpg").symlink_to("gone")
        (tmp_path / "b.txt").symlink_to("gone")
        images = list_images(tmp_path)
        assert list(images.paths) == [b"a.jpg"]
        assert images.passed_over == 1


class TestInputs:
    def test_root_of_a_single_file_is_its_folder(self, tmp_path: Path) -> None:
        add(tmp_path, "a/b.txt")
        images = list_images(tmp_path / "a/b.txt")  # named by itself, it counts
        assert images.root == os.fsencode(tmp_path / "a")
        assert list(images.paths) == [b"b.txt"]
        assert images.passed_over == 0

    def test_root_of_several_inputs_is_their_common_folder(self, tmp_path: Path) -> None:
        add(tmp_path, "p/x/1.jpg", "p/xy/2.jpg", "p/z/3.jpg", "p/4.jpg")
        images = list_images([tmp_path / "p/xy", tmp_path / "p/x", tmp_path / "p/z/3.jpg"])
        assert images.root == os.fsencode(tmp_path / "p")
        assert list(images.paths) == [b"x/1.jpg", b"xy/2.jpg", b"z/3.jpg"]

    def test_root_of_a_folder_and_a_file_in_it_is_the_folder(self, tmp_path: Path) -> None:
        add(tmp_path, "p/a.jpg", "p/q/b.jpg")
        images = list_images([tmp_path / "p/q/b.jpg", tmp_path / "p"])
        assert images.root == os.fsencode(tmp_path / "p")
        assert list(images.paths) == [b"a.jpg", b"q/b.jpg"]

    def test_repeated_inputs_are_listed_once(self, tmp_path: Path) -> None:
        add(tmp_path, "a.jpg", "b/c.jpg")
        inputs = [tmp_path, tmp_path / "b", tmp_path / "a.jpg", tmp_path / "b/../a.jpg", tmp_path]
        images = list_images(inputs)
        assert images.root == os.fsencode(tmp_path)
        assert list(images.paths) == [b"a.jpg", b"b/c.jpg"]

    def test_repeated_folders_count_skipped_files_once(self, tmp_path: Path) -> None:
        add(tmp_path, "a.jpg", "notes.txt", "b/more.txt")
        assert list_images([tmp_path, tmp_path]).passed_over == 2
        assert list_images([tmp_path, tmp_path / "b"]).passed_over == 2

    def test_str_bytes_and_path_objects_are_equivalent(self, tmp_path: Path) -> None:
        add(tmp_path, "a.jpg", "b/c.jpg")
        path = tmp_path
        expected = list_images(path)
        assert len(expected) == 2
        assert list_images(str(path)) == expected
        assert list_images(os.fsencode(path)) == expected
        assert list_images([str(path), os.fsencode(path), path]) == expected
        assert list_images(iter([path])) == expected  # any iterable, read once

    @pytest.mark.parametrize("form", ["./p", "p/", "p/.", "p//", "p/q/..", "q/../p"])
    def test_equivalent_relative_paths_give_the_same_list(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
    ) -> None:
        add(tmp_path, "p/a.jpg", "p/q/b.jpg", "q/c.jpg")
        monkeypatch.chdir(tmp_path)
        images = list_images(form)
        assert images.root == os.fsencode(tmp_path / "p")
        assert list(images.paths) == [b"a.jpg", b"q/b.jpg"]

    def test_doubled_leading_slash_is_one_slash(self, tmp_path: Path) -> None:
        # POSIX keeps "//" apart from "/", and so does os.path.abspath.
        add(tmp_path, "a.jpg")
        for path in (f"/{tmp_path}", f"/{tmp_path}/a.jpg"):
            images = list_images(path)
            assert list(images.paths) == [b"a.jpg"]
            assert os.path.samefile(images.full_path(0), tmp_path / "a.jpg")

    def test_linked_inputs_keep_their_name(self, tmp_path: Path) -> None:
        add(tmp_path, "real/a.jpg")
        (tmp_path / "link").symlink_to("real")
        images = list_images(tmp_path / "link")
        assert images.root == os.fsencode(tmp_path / "link")
        assert list(images.paths) == [b"a.jpg"]

    def test_missing_input_is_named_in_the_error(self, tmp_path: Path) -> None:
        add(tmp_path, "a.jpg")
        with pytest.raises(
            SourceError, match=r"cannot read .*/gone\.jpg: No such file .*; expected a folder"
        ):
            list_images([tmp_path / "a.jpg", tmp_path / "gone.jpg"])

    def test_unprintable_names_are_escaped_in_the_error(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match=r"cannot read .*/new\\nline\\udcff: No such file"):
            list_images(os.fsencode(tmp_path) + b"/new\nline\xff")

    def test_no_input_is_an_error(self) -> None:
        with pytest.raises(SourceError, match="no input: expected a folder of images"):
            list_images([])

    def test_no_image_is_an_error_with_the_number_of_skipped_files(self, tmp_path: Path) -> None:
        (tmp_path / "p").mkdir()
        with pytest.raises(SourceError, match=r"no images in .*/p$"):
            list_images(tmp_path / "p")
        add(tmp_path, "p/a.txt", "p/b/c.txt", "p/.hidden.jpg")
        with pytest.raises(SourceError, match=r"no images in .*/p \(skipped 2 other files\)"):
            list_images(tmp_path / "p")

    def test_no_image_in_several_folders_is_an_error_that_names_them(self, tmp_path: Path) -> None:
        add(tmp_path, "p/a.txt", "q/b.txt")
        with pytest.raises(SourceError, match=r"no images in .*/p, .*/q \(skipped 2 other"):
            list_images([tmp_path / "p", tmp_path / "q"])


class TestExclude:
    def test_folders_and_files_are_left_out_and_counted(self, tmp_path: Path) -> None:
        add(
            tmp_path, "a.jpg", "a_thumb.jpg", "b/c_thumb.jpg", "b/d.jpg", "b/old/e.jpg", "old/f.jpg"
        )
        images = list_images(tmp_path, exclude=["old", "*_thumb.jpg", "*.gif"])
        assert list(images.paths) == [b"a.jpg", b"b/d.jpg"]
        assert images.excluded == {"*_thumb.jpg": 2, "old/": 2, "*.gif": 0}
        assert images.exclude == ("old", "*_thumb.jpg", "*.gif")

    def test_thumbnails_of_a_nas_are_left_out_by_default(self, tmp_path: Path) -> None:
        add(tmp_path, "a.jpg", "@eaDir/a.jpg/THUMB.jpg", "b/@eaDir/x.jpg", ".thumbnails/y.jpg")
        images = list_images(tmp_path)
        assert list(images.paths) == [b"a.jpg"]
        assert images.excluded == {"@eaDir/": 2, ".thumbnails/": 1}

    def test_excluded_folders_are_not_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        add(tmp_path, "a.jpg", "@eaDir/b.jpg", "old/c.jpg")
        read: list[bytes] = []
        scandir = os.scandir

        def recorded(path: bytes) -> object:
            read.append(path)
            return scandir(path)

        monkeypatch.setattr(os, "scandir", recorded)
        list_images(tmp_path, exclude=["old"])
        assert read == [os.fsencode(tmp_path)]

    def test_linked_folders_are_left_out_by_their_name(self, tmp_path: Path) -> None:
        add(tmp_path, "photos/a.jpg", "elsewhere/b.jpg")
        (tmp_path / "photos/@eaDir").symlink_to(tmp_path / "elsewhere")
        assert listed(tmp_path / "photos") == [b"a.jpg"]

    def test_patterns_with_a_slash_start_at_the_root_of_all_inputs(self, tmp_path: Path) -> None:
        add(tmp_path, "p/x/1.jpg", "p/x/y/2.jpg", "p/z/x/3.jpg")
        images = list_images([tmp_path / "p/x", tmp_path / "p/z"], exclude=["x/y", "/z/x/*"])
        assert list(images.paths) == [b"x/1.jpg"]

    def test_folder_that_is_an_input_counts(self, tmp_path: Path) -> None:
        add(tmp_path, "a.jpg", "@eaDir/b.jpg", "@eaDir/@eaDir/c.jpg", "old/d.jpg", "old/old/e.jpg")
        for name, inside in (("@eaDir", "b.jpg"), ("old", "d.jpg")):
            alone = list_images(tmp_path / name, exclude=["old"])
            assert list(alone.paths) == [inside.encode()]
            beside = list_images([tmp_path, tmp_path / name], exclude=["old"])
            assert (
                list(beside.paths)
                == [f"{name}/{inside}".encode(), b"a.jpg"][:: 1 if name < "a" else -1]
            )

    def test_files_that_are_inputs_are_left_out_by_patterns_of_the_caller(
        self, tmp_path: Path
    ) -> None:
        add(tmp_path, "p/a.jpg", "p/a_thumb.jpg", "p/old/b.jpg", "p/@eaDir/c.jpg")
        inputs = [
            tmp_path / "p" / name for name in ("a.jpg", "a_thumb.jpg", "old/b.jpg", "@eaDir/c.jpg")
        ]
        images = list_images(inputs, exclude=["*_thumb.jpg", "old/"])
        assert list(images.paths) == [b"@eaDir/c.jpg", b"a.jpg"]
        assert images.excluded == {"*_thumb.jpg": 1, "old": 1}

    def test_nothing_left_is_an_error_that_counts(self, tmp_path: Path) -> None:
        add(tmp_path, "p/a.jpg", "p/b.txt", "p/@eaDir/c.jpg")
        message = r"no images in .*/p \(skipped 1 other file; excluded 1 file and 1 folder\)"
        with pytest.raises(SourceError, match=message):
            list_images(tmp_path / "p", exclude=["*.jpg"])
        with pytest.raises(SourceError, match=r"no images in .*/a.jpg \(excluded 1 file\)"):
            list_images(tmp_path / "p/a.jpg", exclude=["*.jpg"])

    def test_lists_are_filtered_by_patterns_of_the_caller_only(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        lines = b"a.jpg\n@eaDir/b.jpg\nold/c.jpg\nd_thumb.jpg\n"
        images = read_list(io.BytesIO(lines), exclude=["old", "*_thumb.jpg"])
        assert list(images.paths) == [b"@eaDir/b.jpg", b"a.jpg"]
        assert images.excluded == {"old": 1, "*_thumb.jpg": 1}
        with pytest.raises(SourceError, match=r"no images in the list \(excluded 4 files\)"):
            read_list(io.BytesIO(lines), exclude=["*"])

    def test_order_marks_lines_that_are_left_out(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        lines = b"c.jpg\nb.gif\na.jpg\nc.jpg\n"
        images = read_list(io.BytesIO(lines), exclude=["*.gif"])
        assert list(images.order or ()) == [1, -1, 0, 1]
        assert list(images.paths_in_order) == [b"c.jpg", b"", b"a.jpg", b"c.jpg"]
        add(tmp_path, "c.jpg", "b.gif")
        images = list_images(["c.jpg", "b.gif"], exclude=["*.gif"])
        assert list(images.order or ()) == [0, -1]

    def test_names_that_are_no_utf8_are_left_out(self, tmp_path: Path) -> None:
        try:
            add(tmp_path, b"a.jpg", b"old\xff/b.jpg", b"\xff_thumb.jpg")
        except OSError:
            pytest.skip("the file system takes only UTF-8 names")
        images = list_images(tmp_path, exclude=[os.fsdecode(b"old\xff"), "?_thumb.jpg"])
        assert list(images.paths) == [b"a.jpg"]


class TestSkipped:
    def test_skipped_files_are_counted_by_suffix(self, tmp_path: Path) -> None:
        add(tmp_path, "a.jpg", "1.txt", "b/2.TXT", "3.xmp", "README", "data.001", "data.002", "x.")
        add(tmp_path, "long.abcdefghijklmnop", "odd.a b", "tab.\t")
        os.mkfifo(tmp_path / "pipe.jpg")
        (tmp_path / "link.txt").symlink_to("gone")
        images = list_images(tmp_path)
        assert images.skipped == {
            ".txt": 2,
            ".xmp": 1,
            "no suffix": 2,
            "numbered": 2,
            "other": 3,
            "special": 2,
        }
        assert images.passed_over == 12

    def test_number_of_suffixes_is_bounded(self, tmp_path: Path) -> None:
        add(tmp_path, "a.jpg", *(f"x.k{number}" for number in range(150)))
        images = list_images(tmp_path)
        assert images.passed_over == 150
        assert len(images.skipped) == 101
        assert images.skipped["other"] == 50

    def test_every_path_that_is_left_out_is_reported(self, tmp_path: Path) -> None:
        add(tmp_path, "p/a.jpg", "p/b/c.txt", "p/@eaDir/d.jpg", "p/e.gif", "p/.hidden.jpg")
        seen: list[tuple[bytes, str]] = []
        list_images(
            tmp_path / "p", exclude=["*.gif"], left_out=lambda path, verb: seen.append((path, verb))
        )
        expected = [(b"@eaDir/", "excluded"), (b"b/c.txt", "skipped"), (b"e.gif", "excluded")]
        assert sorted(seen) == expected


class TestReadList:
    @pytest.fixture(autouse=True)
    def here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
        """The current folder: ``tmp_path/here``."""
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        return os.fsencode(tmp_path / "here")

    @pytest.mark.parametrize(
        ("lines", "paths"),
        [
            (b"b.jpg\na/c.jpg\n", [b"a/c.jpg", b"b.jpg"]),
            (b"b.jpg\r\na.jpg\r\n", [b"a.jpg", b"b.jpg"]),
            (b"b.jpg\na.jpg", [b"a.jpg", b"b.jpg"]),
            (b"only.jpg", [b"only.jpg"]),
            (b"\n\nb.jpg\n\n\r\na.jpg\n\n", [b"a.jpg", b"b.jpg"]),
            (b"a.jpg\na.jpg\n./a.jpg\nb/../a.jpg\nb//c.jpg\nb/c.jpg\n", [b"a.jpg", b"b/c.jpg"]),
            (b"\xff\xfe.jpg\n\xc3\xa9.jpg\n", [b"\xc3\xa9.jpg", b"\xff\xfe.jpg"]),
            (b" a.jpg \n#b.jpg\n", [b" a.jpg ", b"#b.jpg"]),
            (b".hidden.jpg\nb.txt\n", [b".hidden.jpg", b"b.txt"]),
            (b"a/b.jpg\na.jpg\na0.jpg\n", [b"a.jpg", b"a/b.jpg", b"a0.jpg"]),
        ],
        ids=[
            "sorted",
            "crlf",
            "no-newline-at-the-end",
            "no-newline",
            "empty-lines",
            "duplicates",
            "invalid-utf-8",
            "spaces-and-hashes-are-names",
            "named-so-counted",
            "whole-paths",
        ],
    )
    def test_every_line_is_a_path_below_the_current_folder(
        self, here: bytes, lines: bytes, paths: list[bytes]
    ) -> None:
        images = read_list(io.BytesIO(lines))
        assert images.root == here
        assert list(images.paths) == paths
        assert images.passed_over == 0

    def test_absolute_paths_below_the_current_folder_keep_it_as_the_root(self, here: bytes) -> None:
        images = read_list(io.BytesIO(here + b"/a/b.jpg\n" + here + b"/a/c.jpg\na/b.jpg\n"))
        assert images.root == here
        assert list(images.paths) == [b"a/b.jpg", b"a/c.jpg"]

    def test_paths_outside_move_the_root_to_their_common_folder(self, here: bytes) -> None:
        above = os.path.dirname(here)
        images = read_list(io.BytesIO(b"a.jpg\n../there/b.jpg\n"))
        assert images.root == above
        assert list(images.paths) == [b"here/a.jpg", b"there/b.jpg"]

    def test_folder_with_the_same_prefix_is_outside(self, here: bytes) -> None:
        images = read_list(io.BytesIO(here + b"2/a.jpg\n"))
        assert images.root == here + b"2"
        assert list(images.paths) == [b"a.jpg"]

    def test_paths_with_nothing_in_common_have_the_root_folder(self) -> None:
        images = read_list(io.BytesIO(b"/b/y.jpg\n/a/x.jpg\n/z.jpg\n"))
        assert images.root == b"/"
        assert list(images.paths) == [b"a/x.jpg", b"b/y.jpg", b"z.jpg"]
        assert [images.full_path(i) for i in range(3)] == [b"/a/x.jpg", b"/b/y.jpg", b"/z.jpg"]

    def test_the_root_folder_can_be_the_current_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir("/")
        images = read_list(io.BytesIO(b"b.jpg\na/c.jpg\n"))
        assert images.root == b"/"
        assert list(images.paths) == [b"a/c.jpg", b"b.jpg"]

    def test_doubled_leading_slash_in_a_list_is_one_slash(self) -> None:
        images = read_list(io.BytesIO(b"//data/photos/a.jpg\n"))
        assert os.path.normpath(images.full_path(0)).lstrip(b"/") == b"data/photos/a.jpg"
        assert list(images.paths) == [b"a.jpg"]

    @pytest.mark.parametrize("lines", [b"", b"\n", b"\r\n\n\r\n"])
    def test_list_without_paths_is_an_error(self, lines: bytes) -> None:
        with pytest.raises(SourceError, match=r"no paths in list\.txt; expected one per line"):
            read_list(io.BytesIO(lines), "list.txt")


class TestImageList:
    def test_full_path_joins_root_and_path(self) -> None:
        images = ImageList(b"/data", [b"a.jpg", b"b/c.jpg"], 3)
        assert [images.full_path(i) for i in range(2)] == [b"/data/a.jpg", b"/data/b/c.jpg"]
        assert (len(images), images.passed_over) == (2, 3)

    def test_empty_and_single_lists_are_valid(self) -> None:
        assert len(ImageList(b"/data", [])) == 0
        assert len(ImageList(b"/data", [b"a"])) == 1

    def test_relative_root_is_refused(self) -> None:
        with pytest.raises(ValueError, match="root: got b'data', expected an absolute path"):
            ImageList(b"data", [b"a.jpg"])

    @pytest.mark.parametrize(
        "paths", [[b"b", b"a"], [b"a", b"a"], [b"a", b"c", b"b"], [b"a/b", b"a.b"]]
    )
    def test_unsorted_or_repeated_paths_are_refused(self, paths: list[bytes]) -> None:
        with pytest.raises(ValueError, match="paths: expected ascending order of bytes"):
            ImageList(b"/data", paths)


def test_empty_path_is_an_error() -> None:
    with pytest.raises(SourceError, match="got an empty path"):
        list_images("")


def test_binary_files_without_a_signature_are_skipped(tmp_path: Path) -> None:
    # The first bytes of a TARGA image, which has no signature, in a file of another kind.
    (tmp_path / "data.bin").write_bytes(bytes([0, 0, 2, *[0] * 9, 9, 0, 9, 0, 24, 0]) + b"x" * 999)
    Image.new("RGB", (5, 5)).save(tmp_path / "a.tga")
    images = list_images(tmp_path)
    assert (list(images.paths), images.passed_over) == ([b"a.tga"], 1)


def test_list_may_be_separated_by_zero_bytes() -> None:
    images = read_list(io.BytesIO(b"b.jpg\0a\nb.jpg\0\0"))
    assert list(images.paths) == [b"a\nb.jpg", b"b.jpg"]


def test_byte_order_mark_is_ignored() -> None:
    assert list(read_list(io.BytesIO(b"\xef\xbb\xbfa.jpg\r\n")).paths) == [b"a.jpg"]


def test_input_of_another_type_is_an_error() -> None:
    with pytest.raises(SourceError, match="got int, expected a folder"):
        list_images(5)  # type: ignore[arg-type]


def test_folder_with_too_long_a_path_is_listed_as_a_path(tmp_path: Path) -> None:
    Image.new("RGB", (5, 5)).save(tmp_path / "a.jpg")
    here = os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(20):
            os.mkdir("d" * 240)
            os.chdir("d" * 240)
    finally:
        os.chdir(here)
    deep, found = sorted(list_images(tmp_path).paths, key=len, reverse=True)
    assert found == b"a.jpg"
    assert set(deep.split(b"/")) == {b"d" * 240}


def test_long_paths_are_shortened_in_messages() -> None:
    assert len(display_path(b"/" + b"x" * 9000)) <= 300
    assert display_path(b"/a b/\xff") == r"/a b/\udcff"


def test_list_relative_to_another_root_names_the_same_files() -> None:
    hidden = UnlistedFolder(b"b/c", "denied")
    images = ImageList(b"/a", [b"b/c/1.png", b"b/c/2.png", b"b/d.png"], unlisted=(hidden,))
    above = images.relative_to(b"/")
    below = images.relative_to(b"/a/b")
    assert above == ImageList(
        b"/",
        [b"a/b/c/1.png", b"a/b/c/2.png", b"a/b/d.png"],
        unlisted=(UnlistedFolder(b"a/b/c", "denied"),),
    )
    assert below == ImageList(
        b"/a/b",
        [b"c/1.png", b"c/2.png", b"d.png"],
        unlisted=(UnlistedFolder(b"c", "denied"),),
    )
    assert above.relative_to(b"/a/b") == below
    assert below.relative_to(b"/") == above
    assert images.relative_to(b"/a") is images
    for root in (b"/a/b/c", b"/c", b"/a/bb", b"/a/b/c/1.png"):
        assert images.relative_to(root) is None


def test_unlisted_root_stays_a_folder_of_a_list_relative_to_another_root() -> None:
    images = ImageList(b"/a/b", [b"1.png"], unlisted=(UnlistedFolder(b"", "denied"),))
    above = images.relative_to(b"/a")
    assert above is not None
    assert above.unlisted == (UnlistedFolder(b"b", "denied"),)
    assert above.relative_to(b"/a/b") == images
    assert ImageList(b"/a", [b"b/1.png"], unlisted=images.unlisted).relative_to(b"/a/b") is None


def test_folders_are_walked_in_the_order_of_their_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["a.jpg", "a/b.jpg", "a/b/c.jpg", "a-b/c.jpg", "a0.jpg", "b/a.jpg", "b.jpg", "ab/a.jpg"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()

    monkeypatch.setattr(listing, "_sorted_once", lambda paths: paths)
    assert list_images(tmp_path).paths == sorted(name.encode() for name in names)
    several = list_images([tmp_path / folder for folder in ("b", "ab", "a", "a-b")])
    assert several.paths == sorted(name.encode() for name in names if "/" in name)
