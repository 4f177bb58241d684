"""Which files and folders are left out: glob patterns, as in ``.gitignore`` and rsync."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Sequence

from extractor.errors import UsageError

__all__ = ["DEFAULT_EXCLUDES", "Excludes", "folders_above"]

# Folders of thumbnails, previews and deleted files, as systems and programs keep them. None may
# have a name under which people keep originals, such as "thumbs", "cache" or "lost+found".
DEFAULT_EXCLUDES = (
    "@eaDir/",  # Synology: thumbnails
    "#recycle/",  # Synology: deleted files
    "#snapshot/",  # Synology: earlier states
    ".@__thumb/",  # QNAP: thumbnails
    "@Recycle/",  # QNAP: deleted files
    "@Recently-Snapshot/",  # QNAP: earlier states
    "~snapshot/",  # NetApp: earlier states
    ".thumbnails/",  # Linux and Android: thumbnails
    ".Trash*/",  # Linux and macOS: deleted files
    "$RECYCLE.BIN/",  # Windows: deleted files
    "RECYCLER/",  # Windows: deleted files
    "System Volume Information/",  # Windows: earlier states
    "__MACOSX/",  # archives made on macOS: resource forks
    ".AppleDouble/",  # macOS on other file systems: resource forks
    "*.lrdata/",  # Lightroom: previews
)


class Excludes:
    """Patterns of files and folders to leave out.

    ``*``, ``?`` and ``[...]`` match any name at any depth. A pattern with a slash inside matches a
    whole path from the root, and ``**`` any folders in it. A slash at the end matches folders only.
    Everything in a folder that matches is left out.

    Args:
        patterns: Patterns of the caller. Upper and lower case differ.
        defaults: Whether :data:`DEFAULT_EXCLUDES` count, too. There the case does not matter.

    Attributes:
        patterns: Patterns of the caller.

    Raises:
        UsageError: A pattern cannot match anything.
    """

    def __init__(self, patterns: Sequence[str] = (), *, defaults: bool = True) -> None:
        if isinstance(patterns, str) or not all(isinstance(each, str) for each in patterns):
            raise UsageError(f"exclude: got {patterns!r}, expected a list of patterns")
        self.patterns = tuple(patterns)
        self._own = [_Pattern(text) for text in patterns]
        self._defaults = _default_patterns() if defaults else None

    def match(self, path: bytes, *, is_folder: bool) -> str | None:
        """Return the pattern that leaves out a file or folder, or None.

        The pattern of a folder ends with a slash.

        Args:
            path: Path relative to the root.
            is_folder: Whether it is a folder.
        """
        name = path[path.rfind(b"/") + 1 :]
        end = "/" if is_folder else ""
        if is_folder and self._defaults is not None and (found := self._defaults.fullmatch(name)):
            return DEFAULT_EXCLUDES[(found.lastindex or 1) - 1]
        for pattern in self._own:
            if pattern.matches(path, name, is_folder):
                return pattern.text.rstrip("/") + end
        return None

    def match_file(self, path: bytes) -> str | None:
        """Return the pattern that leaves out a file, or a folder above it; None if there is none.

        Args:
            path: Path relative to the root.
        """
        found = (self.match(above, is_folder=True) for above in folders_above(path))
        return next(filter(None, found), None) or self.match(path, is_folder=False)


def folders_above(path: bytes) -> Iterator[bytes]:
    """Yield the folders above a relative path, the outermost first."""
    end = path.find(b"/")
    while end >= 0:
        yield path[:end]
        end = path.find(b"/", end + 1)


class _Pattern:
    """One pattern of the caller."""

    def __init__(self, text: str) -> None:
        self.text = text
        glob = re.sub("/+", "/", text)
        while glob.startswith("./"):
            glob = glob[1:]  # "./a" and "/a" start at the root
        names = glob.strip("/").split("/")
        if not glob.strip("/") or {".", ".."} & set(names):
            raise UsageError(
                f"exclude: got {text!r}, expected a name or a path below INPUT, such as '*_thumb.*'"
            )
        self._is_path = "/" in glob.rstrip("/")
        self._folders_only = glob.endswith("/")
        self._regex = re.compile(_regex_of(names), re.DOTALL)

    def matches(self, path: bytes, name: bytes, is_folder: bool) -> bool:
        """Return whether the pattern leaves out a file or folder."""
        if self._folders_only and not is_folder:
            return False
        return self._regex.fullmatch(os.fsdecode(path if self._is_path else name)) is not None


def _regex_of(names: Sequence[str]) -> str:
    """Return the regular expression of a glob, given the names between its slashes."""
    last = len(names) - 1
    text = ""
    for index, name in enumerate(names):
        if name == "**":
            text += ".+" if index == last else "(?:.+/)?"
        else:
            text += _regex_of_name(name) + ("" if index == last else "/")
    return text


def _regex_of_name(glob: str) -> str:
    """Return the regular expression of a glob without slashes."""
    text = ""
    for token in re.findall(r"\\.|\[[!^]?(?:\][^\]]*|[^\]]+)\]|\*+|.", glob, re.DOTALL):
        if token[0] == "*":
            text += "[^/]*"
        elif token == "?":
            text += "[^/]"
        elif token[0] == "[" and len(token) > 1:
            text += _regex_of_set(token[1:-1])
        elif token[0] == "\\" and len(token) > 1:
            text += re.escape(token[1])
        else:
            text += re.escape(token)
    return text


def _regex_of_set(members: str) -> str:
    """Return the regular expression of the characters between brackets."""
    negated = len(members) > 1 and members[0] in "!^"
    ranges = re.findall(r"(.)-(.)|(.)", members[negated:], re.DOTALL)
    # A range whose ends are in the wrong order holds nothing, as in shells.
    chosen = [
        f"{re.escape(first)}-{re.escape(last)}" if first else re.escape(single)
        for first, last, single in ranges
        if first <= last
    ]
    inside = "".join(chosen)
    if negated:
        return f"[^/{inside}]"
    return f"[{inside}]" if inside else "(?!)"


@functools.cache
def _default_patterns() -> re.Pattern[bytes]:
    """Return one expression for all defaults, which a walk tries on every name."""
    globs = (_regex_of_name(glob.rstrip("/")) for glob in DEFAULT_EXCLUDES)
    return re.compile("|".join(f"({glob})" for glob in globs).encode(), re.IGNORECASE)
