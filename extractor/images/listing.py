"""From folders, files and lists to one sorted list of image paths; no pixel is read here."""

from __future__ import annotations

import codecs
import itertools
import logging
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, TypeAlias

from extractor.errors import SourceError
from extractor.images.formats import looks_like_image, readable_suffixes

__all__ = ["ImageList", "Input", "list_images", "read_list"]

log = logging.getLogger(__name__)

Input: TypeAlias = "str | bytes | os.PathLike[str]"


@dataclass(frozen=True)
class ImageList:
    """Paths of images in the order of their rows.

    Attributes:
        root: absolute folder that the paths are relative to, as bytes.
        paths: relative paths with ``/``, strictly ascending by their bytes, each once.
        passed_over: files in the walked folders that are no images.
    """

    root: bytes
    paths: Sequence[bytes] = field(repr=False)
    passed_over: int = 0

    def __post_init__(self) -> None:
        if not os.path.isabs(self.root):
            raise ValueError(f"root must be absolute, got {self.root!r}")
        if any(a >= b for a, b in itertools.pairwise(self.paths)):
            raise ValueError("paths must ascend strictly by their bytes")

    def __len__(self) -> int:
        return len(self.paths)

    def full_path(self, index: int) -> bytes:
        """Where image ``index`` is on this machine."""
        return os.path.join(self.root, self.paths[index])


def list_images(inputs: Input | Iterable[Input]) -> ImageList:
    """List the images in folders (walked recursively) and single files.

    In a folder, files count whose ending belongs to an image format and files of any other ending
    whose content is an image; hidden files and folders do not. Links are followed, a link back to a
    folder that it lies in is not. A file named by itself always counts.

    The root is the folder that was given, the parent of a single file, and for several inputs
    the deepest folder that holds them all.

    Raises:
        SourceError: an input does not exist or cannot be read, or no image is found.
    """
    if isinstance(inputs, (str, bytes, os.PathLike)):
        inputs = [inputs]
    if not isinstance(inputs, Iterable):
        raise SourceError(f"got a {type(inputs).__name__}, expected a folder, an image or several")
    given = list(inputs)
    if not given:
        raise SourceError("no input: expected a folder of images, an image or a list of them")
    folders: list[bytes] = []
    files: list[bytes] = []
    for item in given:
        if not os.fsencode(item):
            raise SourceError("got an empty path, expected a folder or an image")
        path = _absolute(os.fsencode(item))
        try:
            os.stat(path)
        except OSError as error:
            raise SourceError(
                f"cannot read {show(path)}: {error.strerror}; expected a folder or an image"
            ) from error
        (folders if os.path.isdir(path) else files).append(path)

    root = os.path.commonpath([*folders, *map(os.path.dirname, files)])
    found = [_relative(path, root) for path in files]
    walk = _Walk()
    for folder in dict.fromkeys(folders):
        if any(_covers(other, folder) for other in folders):
            continue
        prefix = b"" if folder == root else _relative(folder, root) + b"/"
        found.extend(prefix + path for path in walk.images(folder))
    if not found:
        passed = f" (passed over {walk.passed_over} other files)" if walk.passed_over else ""
        raise SourceError(f"no images in {', '.join(map(show, folders))}{passed}")
    return ImageList(root, _sorted_once(found), walk.passed_over)


def read_list(file: IO[bytes], name: str = "the list") -> ImageList:
    """List the images that a file names, one path a line, or ended by zero bytes (``-print0``).

    Relative paths are meant from the current folder, which is the root unless a path leads out of
    it. Empty lines do not count. Whether the images are there is seen when they are read.

    Raises:
        SourceError: no path in the list.
    """
    here = os.fsencode(os.getcwd())
    content = file.read().removeprefix(codecs.BOM_UTF8)
    lines = content.split(b"\0" if b"\0" in content else b"\n")
    paths = [_absolute(line) for line in (line.rstrip(b"\r") for line in lines) if line]
    if not paths:
        raise SourceError(f"no paths in {name}; expected one a line")
    inside = all(path.startswith(here.rstrip(b"/") + b"/") for path in paths)
    root = here if inside else os.path.commonpath([os.path.dirname(path) for path in paths])
    return ImageList(root, _sorted_once([_relative(path, root) for path in paths]))


def show(path: bytes) -> str:
    """A path for people: odd characters escaped, the middle of a long one left out."""
    text = os.fsdecode(path)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-145:]}"


def _absolute(path: bytes) -> bytes:
    # POSIX keeps a leading "//" apart, and so does abspath; no system that we run on does.
    return b"/" + os.path.abspath(path).lstrip(b"/")


def _covers(folder: bytes, other: bytes) -> bool:
    """Whether a walk of ``folder`` comes through ``other`` below it, and not past it as hidden."""
    above = folder.rstrip(b"/") + b"/"
    return other.startswith(above) and b"/." not in other[len(above) - 1 :]


def _relative(path: bytes, root: bytes) -> bytes:
    return path[len(root.rstrip(b"/")) + 1 :]


def _sorted_once(paths: list[bytes]) -> list[bytes]:
    once = sorted(set(paths))
    if len(once) < len(paths):
        log.info("%d paths were given more than once", len(paths) - len(once))
    return once


class _Walk:
    """Walks folders and counts the files that are no images."""

    def __init__(self) -> None:
        self.passed_over = 0
        self._suffixes = {os.fsencode(suffix) for suffix in readable_suffixes()}

    def images(self, folder: bytes) -> Iterator[bytes]:
        """Paths of the images below ``folder``, relative to it, in no special order.

        A folder below it that cannot be listed comes as a path itself: reading it as an image will
        fail, and so it is reported like everything else that cannot be read.
        """
        status = os.stat(folder)
        # For each folder still to walk: its path below the start, and the folders that it lies in.
        waiting = [(b"", frozenset({(status.st_dev, status.st_ino)}))]
        while waiting:
            below, above = waiting.pop()
            try:
                entries = os.scandir(os.path.join(folder, below) if below else folder)
            except OSError as error:
                if not below:
                    raise SourceError(f"cannot list {show(folder)}: {error.strerror}") from error
                yield below.rstrip(b"/")
                continue
            with entries:
                for entry in entries:
                    if entry.name.startswith(b"."):
                        continue
                    path = below + entry.name
                    kind = _kind(entry)
                    if kind is stat.S_IFDIR:
                        try:
                            status = entry.stat()
                        except OSError:  # too long a path, or a fault of the disk
                            yield path
                            continue
                        identity = (status.st_dev, status.st_ino)
                        if identity in above:
                            log.info("%s leads back to a folder above it", show(entry.path))
                        else:
                            waiting.append((path + b"/", above | {identity}))
                    elif self._counts(entry, kind):
                        yield path
                    else:
                        self.passed_over += 1

    def _counts(self, entry: os.DirEntry[bytes], kind: int | None) -> bool:
        if os.path.splitext(entry.name)[1].lower() in self._suffixes:
            # A link with an image's name that leads nowhere was meant to be an image.
            return kind is stat.S_IFREG or entry.is_symlink()
        return kind is stat.S_IFREG and looks_like_image(entry.path)


def _kind(entry: os.DirEntry[bytes]) -> int | None:
    """``S_IFDIR``, ``S_IFREG``, or None for all else; links are followed where they lead."""
    try:
        if entry.is_dir():
            return stat.S_IFDIR
        return stat.S_IFREG if entry.is_file() else None
    except OSError:  # a link to itself, or into a folder that is closed to us
        return None
