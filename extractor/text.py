"""Text for people: counts with their plurals, messages in one line."""

from __future__ import annotations

__all__ = ["first_line", "plural"]


def plural(count: int, noun: str, nouns: str = "") -> str:
    """Return a count with its noun.

    >>> plural(1, "image"), plural(1234, "image"), plural(2, "index", "indexes")
    ('1 image', '1,234 images', '2 indexes')
    """
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def first_line(error: BaseException) -> str:
    r"""Return the first line of an exception's message, at most 200 characters.

    >>> first_line(ValueError("wrong shape\nsee above")), first_line(KeyError())
    ('wrong shape', 'KeyError')
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
