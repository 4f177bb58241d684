"""What the guide to evaluation shows is what happens."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from extractor.cli import main as cli

GUIDE = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text("utf-8")


def test_every_snippet_runs(
    tmp_path: Path,
    write_store: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [f"{kind}/{number}.jpg".encode() for kind in ("cats", "dogs") for number in range(4)]
    rows = np.random.default_rng(0).standard_normal((8, 4), np.float32)
    for name in ("resnet50", "resnet18", "test"):
        write_store(tmp_path / "features" / name, [rows], names=[names])
    languages = []
    for language, content in re.findall(r"^```(\w+)\n(.*?)^```$", GUIDE, re.M | re.S):
        if language == "python":
            exec(compile(content, "evaluate.md", "exec"), {})
        for line in content.splitlines() if language == "sh" else ():
            assert cli.main(shlex.split(line)[1:]) == 0
        languages.append(language)
    assert (languages.count("python"), languages.count("sh")) == (2, 2)
    printed = capsys.readouterr().out
    assert ", between 0." in printed
    assert "linear CKA" in printed
