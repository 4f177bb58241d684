"""Result of one check."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

__all__ = ["Checks", "Finding", "State"]

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
