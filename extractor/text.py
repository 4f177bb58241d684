"""Text for people: counts with their plurals, messages in one line."""

from __future__ import annotations

import signal
from collections.abc import Mapping

__all__ = [
    "as_size",
    "counts_in_words",
    "excluded_in_words",
    "exit_in_words",
    "first_line",
    "plural",
]

COUNTS_SHOWN = 5


def as_size(size: float) -> str:
    """Return a number of bytes for people.

    >>> as_size(3 * 2**30), as_size(5 * 2**20)
    ('3.0 GiB', '5.0 MiB')
    """
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def plural(count: int, noun: str, nouns: str = "") -> str:
    """Return a count with its noun.

    >>> plural(1, "image"), plural(1234, "image"), plural(2, "index", "indexes")
    ('1 image', '1,234 images', '2 indexes')
    """
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def counts_in_words(counts: Mapping[str, int]) -> str:
    """Return the largest counts with their names, and the sum of the others.

    >>> counts_in_words({".xmp": 3, ".txt": 4})
    '4 .txt, 3 .xmp'
    """
    named = sorted((-count, name) for name, count in counts.items() if name != "other")
    shown = [f"{-count:,} {name}" for count, name in named[:COUNTS_SHOWN]]
    others = sum(counts.values()) + sum(count for count, _ in named[:COUNTS_SHOWN])
    return ", ".join(shown + ([plural(others, "other")] if others else []))


def excluded_in_words(counts: Mapping[str, int]) -> str:
    """Return the number of excluded files and folders; the names of folders end with a slash.

    >>> excluded_in_words({"@eaDir/": 1, "*_thumb.jpg": 12})
    '12 files and 1 folder'
    """
    folders = sum(count for name, count in counts.items() if name.endswith("/"))
    files = sum(counts.values()) - folders
    parts = [plural(files, "file")] if files or not folders else []
    return " and ".join(parts + ([plural(folders, "folder")] if folders else []))


def exit_in_words(code: int) -> str:
    """Return how a process ended, from the exit code that ``subprocess`` has for it.

    >>> exit_in_words(3), exit_in_words(-9), exit_in_words(-99)
    ('exit code 3', 'SIGKILL', 'signal 99')
    """
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def first_line(error: BaseException) -> str:
    r"""Return the first line of an exception's message, at most 200 characters.

    >>> first_line(ValueError("wrong shape\nsee above")), first_line(KeyError())
    ('wrong shape', 'KeyError')
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
