"""The benchmark of duplicates finds what it planted, at a small size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmarks" / "duplicates.py"


@pytest.mark.slow
def test_planted_pairs_are_found(tmp_path: Path) -> None:
    words = ["--rows", "20000", "--dim", "16", "--folder", str(tmp_path), "--json", "-"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=True
    )
    figures = json.loads(done.stdout)
    assert (figures["rows"], figures["dim"]) == (20000, 16)
    assert figures["first"]["planted"] > 50
    assert figures["first"]["planted_found"] == figures["again"]["planted_found"] == 1
    assert figures["first"]["groups"] == figures["again"]["groups"]
    assert not list(tmp_path.iterdir())
