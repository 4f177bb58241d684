"""The fidelity benchmark compares each image with itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.pictures import noise

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmarks" / "fidelity.py"


@pytest.mark.slow
@pytest.mark.parametrize(("least", "code"), [("0.999", 0), ("1.1", 1)])
def test_exit_code_follows_the_least_cosine(tmp_path: Path, least: str, code: int) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for number in range(200):
        noise(number, 40, 30).save(tmp_path / "a" / ("b" if number % 2 else ".") / f"{number}.png")
    command = [sys.executable, str(SCRIPT), str(tmp_path / "a"), "--least", least]
    command += ["--model", "test_resnet", "--weights", "random", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert " of 200 images" in done.stdout
    assert "least cosine 0.999" in done.stdout or "least cosine 1.000" in done.stdout
