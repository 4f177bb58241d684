"""Tests of a GPU are skipped without one, unless it is required."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
MODULE = """
import pytest

@pytest.mark.cuda
def test_of_a_gpu():
    pass

@pytest.mark.cuda
def test_that_skips_itself():
    pytest.skip("nothing compiles here")

def test_of_a_cpu():
    pytest.skip("needs another system")
"""


TORCH = """
import os

class cuda:
    is_available = staticmethod(lambda: "WITH_GPU" in os.environ)

def set_num_threads(count):
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "counts"),
    [
        ({}, "3 skipped"),
        ({"WITH_GPU": "yes"}, "1 passed, 2 skipped"),
        ({"EXTRACTOR_REQUIRE_CUDA": "1"}, "1 skipped, 2 errors"),
        ({"EXTRACTOR_REQUIRE_CUDA": "1", "WITH_GPU": "yes"}, "1 failed, 1 passed, 1 skipped"),
    ],
)
def test_skipped_test_of_a_gpu_fails_if_one_is_required(
    tmp_path: Path, variables: dict[str, str], counts: str
) -> None:
    shutil.copy(TESTS / "conftest.py", tmp_path)
    (tmp_path / "torch.py").write_text(TORCH)
    (tmp_path / "test_it.py").write_text(MODULE)
    inherited = {k: v for k, v in os.environ.items() if k != "EXTRACTOR_REQUIRE_CUDA"}
    path = os.pathsep.join(map(str, (tmp_path, TESTS, TESTS.parent)))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "."],
        cwd=tmp_path,
        env={**inherited, **variables, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.splitlines()[-1].startswith(counts), done.stdout + done.stderr
    is_wrong = "failed" in counts or "error" in counts
    assert done.returncode == is_wrong
    assert ("EXTRACTOR_REQUIRE_CUDA=1 allows no skipped test: Skipped: no" in done.stdout) == (
        is_wrong
    )
