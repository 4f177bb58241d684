"""What the guide to maps shows is what happens."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from extractor.cli import main as cli

GUIDE = (Path(__file__).parents[2] / "docs" / "map.md").read_text("utf-8")


def test_every_snippet_runs(
    tmp_path: Path,
    write_store: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    rows = np.random.default_rng(0).standard_normal((8, 4), np.float32)
    write_store(tmp_path / "features" / "resnet50", [rows])
    languages = []
    for language, content in re.findall(r"^```(\w+)\n(.*?)^```$", GUIDE, re.M | re.S):
        if language == "python":
            exec(compile(content, "map.md", "exec"), {})
        for line in content.splitlines() if language == "sh" else ():
            assert cli.main(shlex.split(line)[1:]) == 0
        languages.append(language)
    assert (languages.count("python"), languages.count("sh")) == (1, 1)
    assert "(8, 2) (0." in capsys.readouterr().out
    assert Path("map.parquet").is_file()
    assert Path("map.svg").is_file()
