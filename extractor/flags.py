"""How a dataclass field becomes an option: flag, environment variable, help text and bounds."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from extractor.errors import UsageError

__all__ = ["Flag", "Option", "option", "options_in"]

Scope = Literal["backbone", "images", "run"]

# Who takes an option: each function takes those of its own scope and of all scopes above it.
SCOPES: dict[Scope, str] = {
    "backbone": "load_backbone()",
    "images": "Extractor()",
    "run": "extract()",
}
PREFIX = "EXTRACTOR_"  # of environment variables

T = TypeVar("T")


@dataclass(frozen=True)
class Flag:
    """Everything about an option except its name, type and default, which its field declares.

    Attributes:
        names: flags, such as ``-b/--batch-size``; without dashes the name of a positional argument.
        help: One phrase for the help page, without the default.
        group: Heading in the help page.
        metavar: Stands for the value in the help page.
        advanced: Shown by ``--help-all`` only.
        minimum: Smallest number allowed.
        maximum: Largest number allowed.
        above: The number must be larger than this one.
        parse: Reads the value from text; raises ValueError for text that it cannot read.
        unset: What None stands for, in words.
        scope: The first of :data:`SCOPES` that takes the option; all later ones take it, too.
        takes_path: A caller may give an ``os.PathLike`` instead of a string.
    """

    names: str
    help: str
    group: str
    metavar: str = ""
    advanced: bool = False
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    parse: Callable[[str], object] | None = None
    unset: str = ""
    scope: Scope = "run"
    takes_path: bool = False


def option(default: T, flag: Flag) -> T:
    """Declare a dataclass field that is an option."""
    declared: T = field(default=default, metadata={"flag": flag})
    return declared


@dataclass(frozen=True)
class Option:
    """One option with its name, type and default.

    Attributes:
        name: Name of the field, which is also that of the keyword argument.
        annotation: Type of the value as it is written in the dataclass.
        type: That type without None.
        default: Value where the option is not given.
        flag: The rest of the declaration.
    """

    name: str
    annotation: str
    type: Any
    default: Any
    flag: Flag

    @property
    def words(self) -> list[str]:
        """Flags as typed, the short one first; empty for a positional argument."""
        names = self.flag.names.split("/")
        return names if names[-1].startswith("-") else []

    @property
    def variable(self) -> str:
        """Name of the environment variable; empty for a positional argument."""
        return PREFIX + self.words[-1][2:].upper().replace("-", "_") if self.words else ""

    def is_in(self, scope: Scope) -> bool:
        """Return whether the function of a scope takes the option."""
        order = list(SCOPES)
        return order.index(self.flag.scope) <= order.index(scope)

    @property
    def label(self) -> str:
        """Name in error messages."""
        return self.name.replace("_", " ")

    @property
    def default_text(self) -> str:
        """What holds if the option is not given, in words; empty where that is obvious."""
        if self.default is None:
            return self.flag.unset
        if self.is_switch:
            return ""
        if isinstance(self.default, tuple):
            return ", ".join(self.default)
        return f"{self.default:g}" if self.type is float else str(self.default)

    @property
    def choices(self) -> tuple[str, ...]:
        """Values allowed, if only some words are."""
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    @property
    def is_switch(self) -> bool:
        """Whether the flag takes no value."""
        return self.type is bool

    @property
    def is_repeatable(self) -> bool:
        """Whether the flag may be repeated, one value each time."""
        return get_origin(self.type) is Sequence

    def parse(self, text: str) -> object:
        """Return the value that a text stands for.

        Raises:
            ValueError: The text does not stand for a value of this type.
        """
        if self.flag.parse is not None:
            return self.flag.parse(text)
        if self.type in (int, float):
            noun = "an integer" if self.type is int else "a number"
            try:
                return self.type(text)
            except ValueError:
                raise ValueError(f"got {text!r}, expected {noun}") from None
        if self.choices and text not in self.choices:
            raise ValueError(f"got {text!r}, expected one of {', '.join(self.choices)}")
        return text

    def check(self, value: object) -> None:
        """Check a value against the choices and bounds; a type with neither is left alone.

        Raises:
            UsageError: The value is out of range, or None although the option has a default.
        """
        if value is None and self.default is None:
            return
        if value is None:
            raise UsageError(f"{self.label}: got None; leave it out for {self.default!r}")
        if self.is_switch and not isinstance(value, bool):
            raise UsageError(f"{self.label}: got {value!r}, expected True or False")
        if self.type is str and not isinstance(value, str):
            raise UsageError(f"{self.label}: got {value!r}, expected a string")
        if self.choices and value not in self.choices:
            raise UsageError(
                f"{self.label}: got {value!r}, expected one of {', '.join(self.choices)}"
            )
        if self.type is int:
            self._check_integer(value)
        elif self.type is float:
            self._check_number(value)

    def _check_integer(self, value: object) -> None:
        least, most = self.flag.minimum, self.flag.maximum
        if least is None or most is None:
            return
        if (
            isinstance(value, bool)
            or not isinstance(value, Integral)
            or not least <= int(value) <= most
        ):
            raise UsageError(
                f"{self.label}: got {value!r}, expected an integer from {least} to {most}"
            )

    def _check_number(self, value: object) -> None:
        above, least, most = self.flag.above, self.flag.minimum, self.flag.maximum
        if most is None:
            return
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or (above is not None and not value > above)
            or (least is not None and not value >= least)
            or not value <= most
        ):
            lower = f"at least {least:g}" if above is None else f"more than {above:g}"
            raise UsageError(
                f"{self.label}: got {value!r}, expected a number of {lower} and at most {most:g}"
            )


_READ: dict[type, dict[str, Option]] = {}


def options_in(declared: type) -> Mapping[str, Option]:
    """Return the options that a dataclass declares, by name, in order."""
    if declared not in _READ:
        _READ[declared] = _read(declared)
    return _READ[declared]


def _read(declared: type) -> dict[str, Option]:
    hints = get_type_hints(declared)
    return {
        each.name: Option(
            each.name,
            str(each.type),
            _without_none(hints[each.name]),
            None if each.default is MISSING else each.default,
            each.metadata["flag"],
        )
        for each in fields(declared)
        if "flag" in each.metadata
    }


def _without_none(hint: Any) -> Any:
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    rest = [part for part in get_args(hint) if part is not type(None)]
    return rest[0] if len(rest) == 1 else Union[tuple(rest)]  # noqa: UP007 (built at run time)
