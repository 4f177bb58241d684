"""Options from the environment, for scheduled jobs: ``EXTRACTOR_BATCH_SIZE`` sets --batch-size."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping

from extractor.errors import UsageError
from extractor.flags import PREFIX, Option

__all__ = ["unknown", "values", "with_variable"]

TEST_PREFIXES = ("EXTRACTOR_TEST_", "EXTRACTOR_REQUIRE_")
YES, NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def values(declared: Iterable[Option], variables: Mapping[str, str]) -> dict[str, object]:
    """Return the options that variables set, by name.

    An option that can be repeated takes several values, separated by commas. An empty variable
    counts as not set, because schedulers leave empty what nobody filled in.

    Raises:
        UsageError: an option cannot take a variable's value; names the variable.
    """
    return {
        each.name: _value(each, variables[each.variable])
        for each in declared
        if variables.get(each.variable)
    }


def with_variable(error: UsageError, declared: Iterable[Option]) -> UsageError:
    """Return an error about a value, with the variable's name if one of ``declared`` caused it."""
    for each in declared:
        if str(error).startswith(f"{each.label}: "):
            return UsageError(each.variable + str(error)[len(each.label) :])
    return error


def unknown(declared: Iterable[Option], variables: Mapping[str, str]) -> Iterator[str]:
    """Yield one sentence for each variable with our prefix that sets no option."""
    known = {each.variable for each in declared}
    for variable in sorted(set(variables) - known):
        if variable.startswith(PREFIX) and not variable.startswith(TEST_PREFIXES):
            close = difflib.get_close_matches(variable, sorted(known), 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            yield f"environment variable {variable} sets no option{hint}"


def _value(each: Option, text: str) -> object:
    if each.is_switch:
        if text.lower() not in (*YES, *NO):
            raise UsageError(f"{each.variable}: got {text!r}, expected 1 or 0")
        return not each.default if text.lower() in YES else each.default
    if each.is_repeatable:
        return [value for value in text.split(",") if value]
    try:
        return each.parse(text)
    except ValueError as error:
        raise UsageError(f"{each.variable}: {error}") from error
