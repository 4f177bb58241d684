"""The benchmark of worker processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmarks" / "processes.py"


@pytest.mark.slow
def test_every_side_has_a_rate(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--small", "40", "--processes", "1", "--repeats", "1"]
    done = subprocess.run([*command, "--json", str(figures)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rates = json.loads(figures.read_text())["small"]
    assert set(rates) == {"plain", "1"}
    assert min(side["median"] for side in rates.values()) > 0
