"""Sorted list of image paths from folders, files and lists. No pixel is read here."""

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
from extractor.text import plural

__all__ = ["ImageList", "Input", "display_path", "list_images", "read_list"]

log = logging.getLogger(__name__)

Input: TypeAlias = "str | bytes | os.PathLike[str]"


@dataclass(frozen=True)
class ImageList:
    """Paths of images in the order of their rows.

    Attributes:
        root: Absolute folder that the paths are relative to, as bytes.
        paths: Relative paths with ``/``, in ascending order of their bytes, without duplicates.
        passed_over: Number of files in the walked folders that are not images.
    """

    root: bytes
    paths: Sequence[bytes] = field(repr=False)
    passed_over: int = 0

    def __post_init__(self) -> None:
        """Check the root and the order."""
        if not os.path.isabs(self.root):
            raise ValueError(f"root: got {self.root!r}, expected an absolute path")
        if any(a >= b for a, b in itertools.pairwise(self.paths)):
            raise ValueError("paths: expected ascending order of bytes without duplicates")

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.paths)

    def full_path(self, index: int) -> bytes:
        """Return the absolute path of an image."""
        return os.path.join(self.root, self.paths[index])


def list_images(inputs: Input | Iterable[Input]) -> ImageList:
    """List the images in folders, which are walked recursively, and single files.

    A file in a folder is an image if its suffix belongs to an image format, or else if its content
    does. Hidden files and folders are skipped. Links are followed, except back to a folder above.
    A file given as an input always counts.

    The root is the given folder, or the parent of a single file. For several inputs it is the
    deepest folder that contains them all.

    Args:
        inputs: A folder, a file, or several of them.

    Raises:
        SourceError: An input does not exist or cannot be read, or there is no image.
    """
    if isinstance(inputs, (str, bytes, os.PathLike)):
        inputs = [inputs]
    if not isinstance(inputs, Iterable):
        raise SourceError(f"got {type(inputs).__name__}, expected a folder, an image or several")
    inputs = list(inputs)
    if not inputs:
        raise SourceError("no input: expected a folder of images, an image or a list of them")
    folders, files = _sort_inputs(inputs)
    root = os.path.commonpath([*folders, *map(os.path.dirname, files)])
    found = [_relative(path, root) for path in files]
    walk = _Walk()
    for folder in dict.fromkeys(folders):
        if any(_covers(other, folder) for other in folders):
            continue
        prefix = b"" if folder == root else _relative(folder, root) + b"/"
        found.extend(prefix + path for path in walk.images(folder))
    if not found:
        others = plural(walk.passed_over, "other file")
        skipped = f" (skipped {others})" if walk.passed_over else ""
        raise SourceError(f"no images in {', '.join(map(display_path, folders))}{skipped}")
    return ImageList(root, _sorted_once(found), walk.passed_over)


def _sort_inputs(inputs: Iterable[Input]) -> tuple[list[bytes], list[bytes]]:
    """Return the absolute paths of the folders and of the files among the inputs."""
    folders: list[bytes] = []
    files: list[bytes] = []
    for item in inputs:
        if not isinstance(item, (str, bytes, os.PathLike)):
            raise SourceError(f"got {type(item).__name__}, expected a folder, an image or several")
        if not os.fsencode(item):
            raise SourceError("got an empty path, expected a folder or an image")
        path = _absolute(os.fsencode(item))
        try:
            os.stat(path)
        except OSError as error:
            raise SourceError(
                f"cannot read {display_path(path)}: {error.strerror}; expected a folder or an image"
            ) from error
        (folders if os.path.isdir(path) else files).append(path)
    return folders, files


def read_list(file: IO[bytes], name: str = "the list") -> ImageList:
    """List the images named in a file: one path per line, or separated by zero bytes (``-print0``).

    Relative paths start at the current folder. It is the root unless a path leads out of it. Empty
    lines are ignored. A missing image becomes a failure when it is read.

    Args:
        file: Binary file with the paths.
        name: Name of the file in messages.

    Raises:
        SourceError: The list contains no path.
    """
    here = os.fsencode(os.getcwd())
    content = file.read().removeprefix(codecs.BOM_UTF8)
    lines = content.split(b"\0" if b"\0" in content else b"\n")
    paths = [_absolute(line) for line in (line.rstrip(b"\r") for line in lines) if line]
    if not paths:
        raise SourceError(f"no paths in {name}; expected one per line")
    inside = all(path.startswith(here.rstrip(b"/") + b"/") for path in paths)
    root = here if inside else os.path.commonpath([os.path.dirname(path) for path in paths])
    return ImageList(root, _sorted_once([_relative(path, root) for path in paths]))


def display_path(path: bytes) -> str:
    """Return a path as text for messages: unprintable characters escaped, long paths shortened."""
    text = os.fsdecode(path)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-145:]}"


def _absolute(path: bytes) -> bytes:
    # POSIX reserves a leading "//", so abspath keeps it. No supported system uses it.
    return b"/" + os.path.abspath(path).lstrip(b"/")


def _covers(folder: bytes, other: bytes) -> bool:
    """Return whether a walk of ``folder`` visits ``other``: it lies below, and is not hidden."""
    above = folder.rstrip(b"/") + b"/"
    return other.startswith(above) and b"/." not in other[len(above) - 1 :]


def _relative(path: bytes, root: bytes) -> bytes:
    return path[len(root.rstrip(b"/")) + 1 :]


def _sorted_once(paths: list[bytes]) -> list[bytes]:
    unique = sorted(set(paths))
    if len(unique) < len(paths):
        log.info("ignored %s", plural(len(paths) - len(unique), "duplicate path"))
    return unique


class _Walk:
    """Walks folders, and counts the files that are not images."""

    def __init__(self) -> None:
        self.passed_over = 0
        self._suffixes = {os.fsencode(suffix) for suffix in readable_suffixes()}

    def images(self, folder: bytes) -> Iterator[bytes]:
        """Yield the paths of the images below ``folder``, relative to it, in arbitrary order.

        A subfolder that cannot be listed is yielded as a path. Reading it as an image will fail, so
        it is reported like every unreadable file.
        """
        status = os.stat(folder)
        # Folders still to walk: the path below the start, and the identities of the folders above.
        waiting = [(b"", frozenset({(status.st_dev, status.st_ino)}))]
        while waiting:
            below, above = waiting.pop()
            try:
                entries = os.scandir(os.path.join(folder, below) if below else folder)
            except OSError as error:
                if not below:
                    raise SourceError(
                        f"cannot list {display_path(folder)}: {error.strerror}"
                    ) from error
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
                        except OSError:  # the path is too long, or the disk fails
                            yield path
                            continue
                        identity = (status.st_dev, status.st_ino)
                        if identity in above:
                            log.info(
                                "%s links to a folder above it; not followed",
                                display_path(entry.path),
                            )
                        else:
                            waiting.append((path + b"/", above | {identity}))
                    elif self._counts(entry, kind):
                        yield path
                    else:
                        self.passed_over += 1

    def _counts(self, entry: os.DirEntry[bytes], kind: int | None) -> bool:
        if os.path.splitext(entry.name)[1].lower() in self._suffixes:
            # A dangling link with the suffix of an image was meant to be one.
            return kind is stat.S_IFREG or entry.is_symlink()
        return kind is stat.S_IFREG and looks_like_image(entry.path)


def _kind(entry: os.DirEntry[bytes]) -> int | None:
    """Return ``S_IFDIR``, ``S_IFREG``, or None for anything else. Links are followed."""
    try:
        if entry.is_dir():
            return stat.S_IFDIR
        return stat.S_IFREG if entry.is_file() else None
    except OSError:  # a link to itself, or into a folder without permission
        return None
