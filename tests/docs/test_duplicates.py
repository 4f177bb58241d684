"""What the guide to duplicates and outliers shows is what happens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.snippets import Reader, snippets

GUIDE = Path(__file__).parents[2] / "docs" / "duplicates.md"


def test_every_snippet_runs(
    tmp_path: Path,
    write_store: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names = [f"{kind}/{number}.jpg".encode() for kind in ("cats", "dogs") for number in range(6)]
    rows = np.random.default_rng(0).standard_normal((12, 32), np.float32)
    rows[6:] += 1
    rows[3] = rows[8]  # a duplicate, and a label error
    for name in ("resnet50", "test", "train"):
        write_store(tmp_path / "features" / name, [rows], names=[names])
    assert {snippet.language for snippet in snippets(GUIDE)} == {"python", "sh"}
    Reader(monkeypatch, capsys, {}).read(GUIDE)
    printed = capsys.readouterr().out
    assert "dogs/2.jpg ['cats/3.jpg']" in printed
    assert "cats/3.jpg cats -> dogs" in printed
    assert sorted(path.name for path in tmp_path.glob("*.*")) == [
        "duplicates.csv",
        "duplicates.png",
        "leaks.csv",
        "outliers.csv",
        "outliers.png",
    ]
