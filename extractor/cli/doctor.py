"""Command ``extract doctor``: what is installed, what the machine has, and what is broken."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from extractor.errors import UsageError
from extractor.flags import PREFIX
from extractor.terminal import environment
from extractor.terminal.console import print_lines, print_table
from extractor.terminal.parser import Parser, command_options
from extractor.text import plural
from extractor.version import __version__

if TYPE_CHECKING:
    from extractor.doctor.finding import Finding

__all__ = ["doctor", "doctor_parser"]

DESCRIPTION = """\
Check what extract needs: packages and whether they fit, devices, cores and memory, image formats,
cached weights, the model hub, and with --out a folder for stores. The exit code is 1 if something
is broken, else 0.
"""


def doctor_parser() -> argparse.ArgumentParser:
    """Return the parser of ``extract doctor``."""
    parser = Parser(
        prog="extract doctor",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "-o", "--out", metavar="OUT", help="check this output folder, too; a store in it is safe"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for bug reports")
    return parser


def doctor(arguments: Sequence[str]) -> int:
    """Print the findings of all checks, and what to try; return the exit code.

    Raises:
        UsageError: The name of the output folder is empty.
    """
    parsed = doctor_parser().parse_args(arguments)
    if parsed.out == "":
        raise UsageError("out: got an empty name, expected a folder for the store")
    from extractor.doctor.children import examine

    findings = [*_variables(), *examine(parsed.out)]
    broken = [finding for finding in findings if finding.state == "broken"]
    if parsed.json:
        page = {
            "version": __version__,
            "ok": not broken,
            "checks": [dataclasses.asdict(finding) for finding in findings],
        }
        print_lines([json.dumps(page, indent=2)])
    else:
        print_table([(each.state, f"{each.name:15} {each.text}") for each in findings])
        print_lines(["", *_advice(findings), _verdict(broken)])
    return 1 if broken else 0


def _variables() -> list[Finding]:
    """Name the environment variables that set options, without their values."""
    declared = command_options()
    known = {option.variable for option in declared}
    names = sorted(name for name in os.environ if name.startswith(PREFIX) and name in known)
    unknown = list(environment.unknown(declared, os.environ))
    from extractor.doctor.finding import Finding

    findings = [Finding("variables", "ok", f"set: {', '.join(names)}")] if names else []
    return findings + [Finding("variables", "warning", text) for text in unknown]


def _advice(findings: Sequence[Finding]) -> list[str]:
    """Return what to try, each thing once, the broken checks first."""
    tips: dict[str, list[str]] = {}
    for state in ("broken", "warning"):
        for finding in findings:
            if finding.state == state and finding.advice:
                tips.setdefault(finding.advice, []).append(finding.name)
    return [f"try for {', '.join(names)}: {advice}" for advice, names in tips.items()]


def _verdict(broken: Sequence[Finding]) -> str:
    if broken:
        names = ", ".join(dict.fromkeys(finding.name for finding in broken))
        return f"extract cannot run: {plural(len(broken), 'problem')} ({names})"
    return "extract can run"
