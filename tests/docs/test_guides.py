"""What the guides show is what happens."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from extractor import FeatureStore
from extractor.cli import main as cli

GUIDE = Path(__file__).parents[2] / "docs" / "identity.md"


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks of a page, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_every_example_of_identity_guide_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    random = np.random.default_rng(0)
    for index in range(5):
        noise = random.integers(0, 256, (60, 50, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "images" / f"{index}.png")
    names: dict[str, object] = {}
    ran = {"python": 0, "sh": 0, "": 0}
    for language, content in blocks(GUIDE.read_text("utf-8")):
        ran[language] += 1
        if language == "python":
            exec(compile(content, GUIDE.name, "exec"), names)
        for line in content.splitlines() if language == "sh" else ():
            command, *words = shlex.split(line)
            assert command == "extract"
            assert cli.main(words) == 0
    assert ran == {"python": 5, "sh": 2, "": 1}
    assert "mean cosine" in capsys.readouterr().out

    joined = FeatureStore.open(tmp_path / "features/resnet18+torchvision-squeezenet1_1")
    assert joined.features.shape == (5, 1024)
    without = FeatureStore.open(tmp_path / "without")
    assert without.manifest.description.backbone["bypassed"] == ["layer4.1"]
    whole = FeatureStore.open(tmp_path / "whole")
    assert not np.allclose(whole.features[:], without.features[:])
