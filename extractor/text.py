"""Text for people: counts with their plurals."""

from __future__ import annotations

__all__ = ["plural"]


def plural(count: int, noun: str, nouns: str = "") -> str:
    """Return a count with its noun.

    >>> plural(1, "image"), plural(1234, "image"), plural(2, "index", "indexes")
    ('1 image', '1,234 images', '2 indexes')
    """
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"
