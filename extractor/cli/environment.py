"""Flags from the environment, for scheduled jobs: ``--batch-size`` is ``EXTRACTOR_BATCH_SIZE``."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Collection, Mapping, Sequence

from extractor.errors import UsageError

__all__ = ["parse"]

PREFIX = "EXTRACTOR_"
OF_TESTS = ("EXTRACTOR_TEST_", "EXTRACTOR_REQUIRE_")
YES, NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def parse(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str],
    environment: Mapping[str, str] = os.environ,
) -> argparse.Namespace:
    """Parse words; a flag that is not among them is taken from the environment, if it is there.

    A flag that can be repeated takes several values with commas between them. What an empty
    variable means is that it is not set. ``odd_variables`` of the result says in a sentence each
    which variables with our prefix are no flags.

    Raises:
        UsageError: a value that the flag does not take; names the variable.
    """
    repeated: dict[str, list[str]] = {}
    known: set[str] = set()
    for action in parser._actions:
        options = [option for option in action.option_strings if option.startswith("--")]
        if not options or action.dest in ("help", "version"):
            continue
        variable = PREFIX + options[0].removeprefix("--").upper().replace("-", "_")
        known.add(variable)
        text = environment.get(variable)
        if not text:  # empty is what schedulers leave of what is not set
            continue
        if isinstance(action, argparse._AppendAction):
            repeated[action.dest] = [one for one in text.split(",") if one]
        else:
            parser.set_defaults(**{action.dest: _value(action, text, variable)})
    parsed = parser.parse_args(arguments)
    parsed.odd_variables = [
        _odd(variable, known)
        for variable in sorted(set(environment) - known)
        if variable.startswith(PREFIX) and not variable.startswith(OF_TESTS)
    ]
    for name, values in repeated.items():
        if getattr(parsed, name) is None:
            setattr(parsed, name, values)
    return parsed


def _odd(variable: str, known: Collection[str]) -> str:
    meant = difflib.get_close_matches(variable, sorted(known), 1)
    return f"{variable} is no flag{f'; did you mean {meant[0]}?' if meant else ''}"


def _value(action: argparse.Action, text: str, variable: str) -> object:
    if isinstance(action, argparse._StoreConstAction):
        if text.lower() not in (*YES, *NO):
            raise UsageError(f"{variable}: got {text!r}, expected 1 or 0")
        return action.const if text.lower() in YES else action.default
    try:
        value = action.type(text) if callable(action.type) else text
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise UsageError(f"{variable}: got {text!r}, which is no {action.dest}: {error}") from error
    if action.choices is not None and value not in action.choices:
        raise UsageError(
            f"{variable}: got {text!r}, expected one of {', '.join(map(str, action.choices))}"
        )
    return value
