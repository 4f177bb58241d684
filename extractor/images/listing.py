"""Sorted list of image paths from folders, files and lists. No pixel is read here."""

from __future__ import annotations

import codecs
import errno
import itertools
import logging
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import IO, NamedTuple, TypeAlias

from extractor.errors import SourceError
from extractor.images.exclude import Excludes, folders_above
from extractor.images.formats import candidate_suffixes, looks_like_image
from extractor.paths import PackedPaths, is_ascending
from extractor.text import excluded_in_words, plural

__all__ = ["ImageList", "Input", "UnlistedFolder", "display_path", "list_images", "read_list"]

log = logging.getLogger(__name__)

Input: TypeAlias = "str | bytes | os.PathLike[str]"


# Bounds of what a summary has to hold: suffixes that are counted apart, and their length.
MAX_SUFFIXES = 100
MAX_SUFFIX_LENGTH = 12

# Errors of a path that leads nowhere. After any other error, nobody knows what is there.
_ABSENT = (FileNotFoundError, NotADirectoryError)


class UnlistedFolder(NamedTuple):
    """A folder that could not be listed, or not to its end: its images are unknown.

    Attributes:
        path: Path relative to the root of the list; empty for the root.
        reason: Why it could not be listed.
    """

    path: bytes
    reason: str


@dataclass(frozen=True)
class ImageList:
    """Paths of images in the order of their rows.

    >>> images = list_images("images")  # doctest: +SKIP
    >>> len(images), images.paths[0]  # doctest: +SKIP
    (25, b'cats/00.jpg')

    Attributes:
        root: Absolute folder that the paths are relative to, as bytes.
        paths: Relative paths with ``/``, in ascending order of their bytes, without duplicates.
        passed_over: Number of files in the walked folders that are not images.
        unlisted: Folders that could not be listed, sorted by path.
        order: Index in :attr:`paths` of each line of a list, or of each file of the caller's, with
            duplicates; -1 for a path that a pattern leaves out. None for the images of folders,
            which have no order of their own.
        skipped: The same number for each suffix. Some names stand for several: ``no suffix``,
            ``numbered`` for suffixes of digits, ``special`` for pipes, devices and broken links,
            and ``other`` for rare and unusual ones.
        excluded: For each pattern the number of files that it left out. That of a folder ends with
            a slash; its files are not counted. Patterns of the caller may have 0.
        exclude: Patterns of the caller.
    """

    root: bytes
    paths: Sequence[bytes] = field(repr=False)
    passed_over: int = 0
    unlisted: tuple[UnlistedFolder, ...] = ()
    order: Sequence[int] | None = field(default=None, repr=False, compare=False)
    skipped: Mapping[str, int] = field(default_factory=dict)
    excluded: Mapping[str, int] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the root and the order."""
        if not os.path.isabs(self.root):
            raise ValueError(f"root: got {self.root!r}, expected an absolute path")
        if not is_ascending(self.paths):
            raise ValueError("paths: expected ascending order of bytes without duplicates")
        if self.order and not -1 <= min(self.order) <= max(self.order) < len(self.paths):
            raise ValueError(f"order: expected indices of {len(self.paths)} paths")

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.paths)

    @property
    def paths_in_order(self) -> Iterator[bytes]:
        """Path of each line of the list, as :attr:`order` has them; empty where it is -1."""
        return (self.paths[i] if i >= 0 else b"" for i in self.order or ())

    def full_path(self, index: int) -> bytes:
        """Return the absolute path of an image."""
        return os.path.join(self.root, self.paths[index])

    def relative_to(self, root: bytes) -> ImageList | None:
        """Return the same images with paths relative to another root; None if one is not in it.

        The order stays the same, since all paths get or lose the same beginning.
        """
        if root == self.root:
            return self
        own, other = (folder.rstrip(b"/") + b"/" for folder in (self.root, root))
        added, removed = own[len(other) :], other[len(own) :]
        # Paths of folders end with a slash here, so that the root of this list has one, too.
        folders = [folder.path + b"/" if folder.path else b"" for folder in self.unlisted]
        is_outside = not (own.startswith(other) or other.startswith(own))
        if is_outside or not all(path.startswith(removed) for path in (*self.paths, *folders)):
            return None
        start = len(removed)
        unlisted = tuple(
            folder._replace(path=(added + path[start:]).rstrip(b"/"))
            for folder, path in zip(self.unlisted, folders, strict=True)
        )
        paths = PackedPaths(added + path[start:] for path in self.paths)
        return replace(self, root=root, paths=paths, unlisted=unlisted)


def list_images(
    inputs: Input | Iterable[Input],
    *,
    exclude: Sequence[str] = (),
    left_out: Callable[[bytes, str], None] | None = None,
) -> ImageList:
    """List the images in folders, which are walked recursively, and single files.

    >>> len(list_images("images", exclude=["dogs/"]))  # doctest: +SKIP
    12

    A file in a folder is an image if its suffix belongs to an image format, or else if its content
    does. Hidden files and folders are skipped. Links are followed, except back to a folder above.
    A file given as an input always counts. A folder that cannot be listed is in
    :attr:`ImageList.unlisted`, and counts as an image that cannot be read.

    The root is the given folder, or the parent of a single file. For several inputs it is the
    deepest folder that contains them all.

    Folders and files that match :data:`~extractor.images.exclude.DEFAULT_EXCLUDES` are left out,
    such as the thumbnails of a NAS. A folder given as an input always counts.

    Args:
        inputs: A folder, a file, or several of them.
        exclude: Glob patterns of files and folders to leave out. A pattern without a slash matches
            a name at any depth, one with a slash a path from the root. A slash at its end matches
            folders only.
        left_out: Called with the path of every file that is not an image, and ``skipped``; and of
            every file or folder that a pattern leaves out, and ``excluded``.

    Raises:
        SourceError: An input does not exist or cannot be read, or there is no image.
        UsageError: A pattern cannot match anything.
    """
    if isinstance(inputs, (str, bytes, os.PathLike)):
        inputs = [inputs]
    if not isinstance(inputs, Iterable):
        raise SourceError(f"got {type(inputs).__name__}, expected a folder, an image or several")
    inputs = list(inputs)
    if not inputs:
        raise SourceError("no input: expected a folder of images, an image or a list of them")
    folders, files, unseen = _sort_inputs(inputs)
    root = os.path.commonpath([*folders, *unseen, *map(os.path.dirname, files)])
    tally = _Tally(exclude, left_out)
    own = Excludes(exclude, defaults=False)
    named = [_relative(path, root) for path in files]
    kept = tally.not_excluded(named, own)
    walk = _Walk(root, Excludes(exclude), tally)
    tops = [
        folder
        for folder in sorted(set(folders), key=_with_slash)
        if not any(walk.covers(other, folder) for other in folders)
    ]
    walked = itertools.chain.from_iterable(map(walk.images, tops))
    # Folders are walked in the order of their paths, so that one list needs no sorting.
    found = PackedPaths(itertools.chain(sorted(kept) if tops else kept, walked))
    unlisted = {path: str(error.strerror) for path, error in {**unseen, **walk.unlisted}.items()}
    if not len(found):
        for folder, reason in unlisted.items():
            raise SourceError(f"cannot list {display_path(folder)}: {reason}")
        names = ", ".join(map(display_path, folders or files))
        raise SourceError(f"no images in {names}{tally.in_words}")
    below = sorted(UnlistedFolder(_relative(path, root), unlisted[path]) for path in unlisted)
    # Reading such a folder as an image fails, so it is reported like every unreadable file.
    added = [folder.path for folder in below if folder.path]
    paths = _sorted_once(PackedPaths(itertools.chain(found, added)) if added else found)
    order = None if folders or below else _order_of(named, paths)
    return ImageList(
        root,
        paths,
        sum(tally.skipped.values()),
        tuple(below),
        order,
        tally.skipped,
        tally.excluded,
        own.patterns,
    )


def _sort_inputs(
    inputs: Sequence[Input],
) -> tuple[list[bytes], list[bytes], dict[bytes, OSError]]:
    """Return the absolute paths of the folders, of the files, and of inputs that cannot be seen."""
    folders: list[bytes] = []
    files: list[bytes] = []
    unseen: dict[bytes, OSError] = {}
    for item in inputs:
        if not isinstance(item, (str, bytes, os.PathLike)):
            raise SourceError(f"got {type(item).__name__}, expected a folder, an image or several")
        if not os.fsencode(item):
            raise SourceError("got an empty path, expected a folder or an image")
        path = _absolute(os.fsencode(item))
        try:
            os.stat(path)
        except OSError as error:
            if len(inputs) > 1 and not isinstance(error, _ABSENT):
                unseen[path] = error
                continue
            raise SourceError(
                f"cannot read {display_path(path)}: {error.strerror}; expected a folder or an image"
            ) from error
        (folders if os.path.isdir(path) else files).append(path)
    return folders, files, unseen


def read_list(
    file: IO[bytes],
    name: str = "the list",
    *,
    exclude: Sequence[str] = (),
    left_out: Callable[[bytes, str], None] | None = None,
) -> ImageList:
    """List the images named in a file: one path per line, or separated by zero bytes (``-print0``).

    Relative paths start at the current folder. It is the root unless a path leads out of it. Empty
    lines are ignored. A missing image becomes a failure when it is read.

    Args:
        file: Binary file with the paths.
        name: Name of the file in messages.
        exclude: Patterns of paths to leave out, as for :func:`list_images`. A list has no others.
        left_out: Called with every path that a pattern leaves out, and ``excluded``.

    Raises:
        SourceError: The list contains no path, or all are left out.
        UsageError: A pattern cannot match anything.
    """
    here = os.fsencode(os.getcwd())
    content = file.read().removeprefix(codecs.BOM_UTF8)
    lines = (line.rstrip(b"\r") for line in _lines(content, b"\0" if b"\0" in content else b"\n"))
    paths = PackedPaths(_absolute(line) for line in lines if line)
    del content, lines
    if not len(paths):
        raise SourceError(f"no paths in {name}; expected one per line")
    inside = all(path.startswith(here.rstrip(b"/") + b"/") for path in paths)
    root = here if inside else _common_folder(paths)
    listed = PackedPaths(_relative(path, root) for path in paths)
    tally = _Tally(exclude, left_out)
    own = Excludes(exclude, defaults=False)
    kept = PackedPaths(tally.not_excluded(listed, own)) if own.patterns else listed
    if not len(kept):
        raise SourceError(f"no images in {name}{tally.in_words}")
    unique = _sorted_once(kept)
    order = _order_of(listed, unique)
    return ImageList(root, unique, order=order, excluded=tally.excluded, exclude=own.patterns)


def _lines(content: bytes, separator: bytes) -> Iterator[bytes]:
    """Yield the parts of a text; the last one may be empty."""
    start = 0
    while (end := content.find(separator, start)) >= 0:
        yield content[start:end]
        start = end + 1
    yield content[start:]


def _common_folder(paths: Iterable[bytes]) -> bytes:
    """Return the deepest folder that contains all files."""
    folders = {os.path.dirname(path) for path in paths}
    return os.path.commonpath(list(folders))


def display_path(path: bytes) -> str:
    """Return a path as text for messages: unprintable characters escaped, long paths shortened."""
    text = os.fsdecode(path)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-145:]}"


def _absolute(path: bytes) -> bytes:
    # POSIX reserves a leading "//", so abspath keeps it. No supported system uses it.
    return b"/" + os.path.abspath(path).lstrip(b"/")


def _relative(path: bytes, root: bytes) -> bytes:
    return path[len(root.rstrip(b"/")) + 1 :]


def _with_slash(folder: bytes) -> bytes:
    return folder.rstrip(b"/") + b"/"


def _sorted_once(paths: PackedPaths) -> PackedPaths:
    if paths.is_ascending:
        return paths
    unique = PackedPaths(sorted(set(paths)))
    if len(unique) < len(paths):
        log.info("ignored %s", plural(len(paths) - len(unique), "duplicate path"))
    return unique


def _order_of(listed: Sequence[bytes], unique: PackedPaths) -> Sequence[int]:
    """Return the index of each listed path among the unique ones; -1 if it is not there."""
    if is_ascending(listed):
        return array("q", map(unique.find, listed))
    index = {path: i for i, path in enumerate(unique)}
    return array("q", (index.get(path, -1) for path in listed))


_Identities: TypeAlias = "frozenset[tuple[int, int]]"  # device and inode of folders


class _Tally:
    """Counts what is left out.

    Args:
        exclude: Patterns of the caller, which count from 0.
        left_out: Called with each path and whether it was ``skipped`` or ``excluded``.

    Attributes:
        skipped: As in :class:`ImageList`.
        excluded: As in :class:`ImageList`.
    """

    def __init__(
        self, exclude: Sequence[str], left_out: Callable[[bytes, str], None] | None
    ) -> None:
        self.skipped: dict[str, int] = {}
        self.excluded = dict.fromkeys(exclude, 0)
        self._left_out = left_out

    def skip(self, path: bytes, *, is_special: bool) -> None:
        """Count a file that is not an image."""
        label = "special" if is_special else _suffix_label(path)
        if label not in self.skipped and len(self.skipped) >= MAX_SUFFIXES:
            label = "other"
        self.skipped[label] = self.skipped.get(label, 0) + 1
        if self._left_out is not None:
            self._left_out(path, "skipped")

    def exclude(self, path: bytes, pattern: str) -> None:
        """Count a file or folder that a pattern leaves out."""
        for unused in (pattern.rstrip("/"), pattern.rstrip("/") + "/"):
            if self.excluded.get(unused) == 0:
                del self.excluded[unused]
        self.excluded[pattern] = self.excluded.get(pattern, 0) + 1
        if self._left_out is not None:
            self._left_out(path, "excluded")

    def not_excluded(self, paths: Iterable[bytes], patterns: Excludes) -> list[bytes]:
        """Return the paths of files that no pattern leaves out, and count the others."""
        kept = []
        for path in paths:
            pattern = patterns.match_file(path) if patterns.patterns else None
            if pattern is None:
                kept.append(path)
            else:
                self.exclude(path, pattern.rstrip("/"))
        return kept

    @property
    def in_words(self) -> str:
        """What was left out, for messages."""
        counts = {
            "skipped": plural(sum(self.skipped.values()), "other file"),
            "excluded": excluded_in_words(self.excluded),
        }
        parts = [f"{verb} {count}" for verb, count in counts.items() if not count.startswith("0 ")]
        return f" ({'; '.join(parts)})" if parts else ""


def _suffix_label(path: bytes) -> str:
    suffix = os.fsdecode(os.path.splitext(path)[1].lower())
    if len(suffix) < 2:
        return "no suffix"
    if suffix[1:].isdecimal():
        return "numbered"
    is_usual = len(suffix) <= MAX_SUFFIX_LENGTH and suffix.isprintable() and " " not in suffix
    return suffix if is_usual else "other"


class _Walk:
    """Walks folders.

    Args:
        root: Absolute folder that paths are relative to.
        excludes: What to leave out.
        tally: Counts what is left out.

    Attributes:
        unlisted: Absolute paths of folders that could not be listed, with the error.
    """

    def __init__(self, root: bytes, excludes: Excludes, tally: _Tally) -> None:
        self.unlisted: dict[bytes, OSError] = {}
        self._root = root
        self._excludes = excludes
        self._tally = tally
        self._suffixes = {os.fsencode(suffix) for suffix in candidate_suffixes()}

    def covers(self, folder: bytes, other: bytes) -> bool:
        """Return whether a walk of ``folder`` visits ``other``.

        It does if ``other`` lies below, and is neither hidden nor excluded.
        """
        above = folder.rstrip(b"/") + b"/"
        if not other.startswith(above) or b"/." in other[len(above) - 1 :]:
            return False
        path = _relative(other, self._root)
        between = [*folders_above(path), path][_relative(above, self._root).count(b"/") :]
        return not any(self._excludes.match(each, is_folder=True) for each in between)

    def images(self, folder: bytes) -> Iterator[bytes]:
        """Yield the paths of the images below ``folder``, relative to the root, ascending."""
        try:
            status = os.stat(folder)
        except OSError as error:
            self.unlisted[folder] = error
            return
        start = b"" if folder == self._root else _relative(folder, self._root) + b"/"
        walked = [self._entries(start, frozenset({(status.st_dev, status.st_ino)}))]
        while walked:
            path, above = next(walked[-1], (b"", None))
            if above is not None:
                walked.append(self._entries(path, above))
            elif path:
                yield path
            else:
                walked.pop()

    def _entries(
        self, below: bytes, above: _Identities
    ) -> Iterator[tuple[bytes, _Identities | None]]:
        """Yield what a folder holds, ascending: images, and folders with a slash.

        Args:
            below: Path of the folder with a slash; empty for the root.
            above: Identities of the folder and those above it.

        Yields:
            The path of an image, and None; or that of a folder, and the identities of it and of
            those above it.
        """
        path = os.path.join(self._root, below) if below else self._root
        images: list[bytes] = []
        folders: dict[bytes, _Identities] = {}
        try:
            with os.scandir(path) as entries:
                for entry in entries:  # may fail at any entry
                    if self._is_excluded(below + entry.name, entry) or entry.name[:1] == b".":
                        continue
                    identity = self._identity(entry)
                    if identity is None:
                        if self._counts(below + entry.name, entry):
                            images.append(below + entry.name)
                    elif identity in above:
                        log.info(
                            "%s links to a folder above it; not followed",
                            display_path(entry.path),
                        )
                    else:
                        folders[below + entry.name + b"/"] = above | {identity}
        except OSError as error:
            self.unlisted[path.rstrip(b"/") or path] = error
        for name in sorted([*images, *folders]):
            yield name, folders.get(name)

    def _is_excluded(self, path: bytes, entry: os.DirEntry[bytes]) -> bool:
        """Return whether a pattern leaves an entry out, and count it if so."""
        try:
            is_folder = entry.is_dir()
        except OSError:  # a folder of another file system that cannot be seen, or a link to itself
            is_folder = False
        pattern = self._excludes.match(path, is_folder=is_folder)
        if pattern is not None:
            self._tally.exclude(path + b"/" * is_folder, pattern)
        return pattern is not None

    def _identity(self, entry: os.DirEntry[bytes]) -> tuple[int, int] | None:
        """Return what identifies a folder; None if the entry is none, or cannot be seen."""
        is_folder = False
        try:
            is_folder = entry.is_dir()
            if not is_folder:
                return None
            status = entry.stat()
        except OSError as error:  # no permission, too long a path, or the disk fails
            # A link to itself leads nowhere. With the suffix of an image, it was meant to be one.
            if is_folder or not (error.errno == errno.ELOOP or self._has_suffix(entry)):
                self.unlisted[entry.path] = error
            return None
        return status.st_dev, status.st_ino

    def _counts(self, path: bytes, entry: os.DirEntry[bytes]) -> bool:
        """Return whether an entry that is no folder is an image; count it if not."""
        if entry.path in self.unlisted:
            return False
        try:
            is_file = entry.is_file()
        except OSError:
            is_file = self._has_suffix(entry)
        if self._has_suffix(entry):
            # A dangling link with the suffix of an image was meant to be one.
            counts = is_file or entry.is_symlink()
        else:
            counts = is_file and looks_like_image(entry.path)
        if not counts:
            self._tally.skip(path, is_special=not is_file)
        return counts

    def _has_suffix(self, entry: os.DirEntry[bytes]) -> bool:
        return os.path.splitext(entry.name)[1].lower() in self._suffixes
