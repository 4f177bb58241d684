"""Snippets of the README and the guides, run as a reader would."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from extractor.cli import main as cli

LANGUAGES = ("python", "sh", "bash", "console")
TOOLS = ("cat", "cp", "rm", "mkdir")  # run as they are
ASSIGNMENT = re.compile(r"(?:export )?\w+=\S*( \w+=\S*)*")


@dataclass(frozen=True)
class Snippet:
    """A fenced block of a page that someone may run.

    Attributes:
        language: One of ``LANGUAGES``.
        content: Its lines.
    """

    language: str
    content: str

    @property
    def commands(self) -> list[str]:
        """Lines that a shell would run; none in Python."""
        if self.language == "console":
            return re.findall(r"^\$ (.*)$", self.content, re.M)
        text = self.content.replace("\\\n", "")
        lines = text.splitlines() if self.language in ("sh", "bash") else []
        return [line for line in lines if line and not line.startswith("#")]


def snippets(page: Path) -> list[Snippet]:
    """Return the snippets of a page, in order; pages may also show output, JSON and others."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)
    return [Snippet(*each) for each in found if each[0] in LANGUAGES]


class Reader:
    """Runs the snippets of a page from top to bottom, in the current folder.

    Args:
        monkeypatch: Sets what the page exports.
        capture: What commands print.
        elsewhere: Beginnings of commands, or of snippets of Python, that cannot run here; with the
            reason.
        names: Variables that the page assumes.
        script_environment: Environment of scripts, which run in processes of their own.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capture: pytest.CaptureFixture[str],
        elsewhere: Mapping[str, str],
        names: Mapping[str, Any] | None = None,
        script_environment: Mapping[str, str] | None = None,
    ) -> None:
        self.names = dict(names or {})
        self.passed_over: list[str] = []
        self._monkeypatch = monkeypatch
        self._capture = capture
        self._elsewhere = elsewhere
        self._script_environment = dict(script_environment or {})

    def read(self, page: Path) -> None:
        """Run every snippet of a page."""
        for snippet in snippets(page):
            if snippet.language == "python":
                if not self._is_elsewhere(snippet.content):
                    exec(compile(snippet.content, page.name, "exec"), self.names)
            elif snippet.content.startswith("#!"):
                self._run_script(snippet.content)
            else:
                for line in snippet.commands:
                    self._run(line)
                if snippet.language == "console":
                    self._check_output(snippet.content)

    def _check_output(self, content: str) -> None:
        """Check that each line that a page shows begins like one that was printed."""
        printed = {line.split()[0] for line in self._printed() if line[:1].strip()}
        for line in content.splitlines():
            if line[:1].strip() and not line.startswith(("$", "...")):
                assert line.split()[0] in printed, (
                    f"the page shows a line that is not there: {line}"
                )

    def _printed(self) -> list[str]:
        return self._capture.readouterr().out.splitlines()

    def _is_elsewhere(self, text: str) -> bool:
        found = [start for start in self._elsewhere if text.startswith(start)]
        self.passed_over += found
        return bool(found)

    def _run(self, line: str) -> None:
        if ASSIGNMENT.fullmatch(line):
            for pair in line.removeprefix("export ").split():
                name, _, value = pair.partition("=")
                self._monkeypatch.setenv(name, value)
            return
        if self._is_elsewhere(line):
            return
        program, *words = shlex.split(line, comments=True)
        if program == "extract":
            code = cli.main(words)
            assert code == 0, f"{line}: exit code {code}"
        elif program in TOOLS:
            subprocess.run([program, *words], check=True, stdout=subprocess.DEVNULL)
        else:
            pytest.fail(f"nothing runs {line!r}; add it to ELSEWHERE with the reason, or run it")

    def _run_script(self, content: str) -> None:
        """Run a script by the shell, with the command ``extract`` beside it."""
        folder = Path("bin").absolute()
        folder.mkdir()
        command = folder / "extract"
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m extractor "$@"\n')
        command.chmod(0o755)
        path = os.pathsep.join([str(folder), os.environ["PATH"]])
        environment = {**os.environ, "PATH": path, **self._script_environment}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        result = subprocess.run(["sh", "-c", content], env=environment, capture_output=True)
        assert result.returncode == 0, f"exit code {result.returncode}: {result.stderr.decode()}"
