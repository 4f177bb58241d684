"""Result of one check."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

__all__ = ["Checks", "Finding", "State", "as_size"]

State: TypeAlias = Literal["ok", "warning", "broken"]


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        name: What was checked.
        state: ``broken`` if ``extract`` cannot run with it, ``warning`` if some uses of it fail.
        text: What was found, in one line.
        advice: What to try, empty if nothing is wrong.
        details: Values for programs.
    """

    name: str
    state: State
    text: str
    advice: str = ""
    details: dict[str, Any] = field(default_factory=dict)


Checks: TypeAlias = Iterator["Finding | str"]
"""Findings of several checks. The name of a check comes first if the check may crash or hang."""


def as_size(size: float) -> str:
    """Return a number of bytes for people.

    >>> as_size(3 * 2**30), as_size(5 * 2**20)
    ('3.0 GiB', '5.0 MiB')
    """
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
