"""Settings of the whole process, which the command makes for itself."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.pictures import noise

from extractor.system.process_tuning import (
    ARROW_POOL,
    SPINNING,
    SPINS,
    imported_to_stay,
    spin_briefly,
)

# Says what torch's OpenMP finds in the environment when it is loaded, and who loaded it too early.
SEEN = """
import gc, os, sys
from extractor.cli import main, run

settle = run.spin_briefly

def settled():
    print("torch" in sys.modules)
    settle()
    print(os.environ.get("GOMP_SPINCOUNT"))

run.spin_briefly = settled
try:
    sys.exit(main(sys.argv[1:]))
finally:
    print(gc.isenabled(), gc.get_freeze_count() > 10_000)
    import pyarrow
    print(pyarrow.default_memory_pool().backend_name)
"""

ARROW = """
from extractor.process import keep_freed_memory

keep_freed_memory()
import pyarrow

print(pyarrow.default_memory_pool().backend_name)
"""


@pytest.mark.parametrize("told", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}])
def test_what_the_environment_says_of_waiting_threads_holds(
    monkeypatch: pytest.MonkeyPatch, told: dict[str, str]
) -> None:
    for name in SPINNING:
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    spin_briefly()
    assert {name: os.environ[name] for name in SPINNING if name in os.environ} == (
        told or {"GOMP_SPINCOUNT": SPINS}
    )


@pytest.mark.parametrize(
    ("told", "taken"), [({}, "system"), ({ARROW_POOL: "mimalloc"}, "mimalloc")]
)
def test_arrow_takes_its_memory_where_the_process_keeps_it(
    told: dict[str, str], taken: str
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != ARROW_POOL} | told
    done = subprocess.run(
        [sys.executable, "-c", ARROW], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, taken), done.stderr


def test_the_command_settles_it_before_torch_is_there(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    noise(0, 40, 40).save(tmp_path / "images" / "a.png")
    words = ["--model", "torchvision:squeezenet1_0", "--weights", "random", "--device", "cpu"]
    ran = [sys.executable, "-c", SEEN, *words, "--out", "store", "images"]
    own = (*SPINNING, ARROW_POOL)
    environment = {name: value for name, value in os.environ.items() if name not in own}
    done = subprocess.run(ran, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.split()
    assert (printed[:2], printed[-3:]) == (["False", SPINS], ["True", "True", "system"])
    assert not done.stderr.count("leaked")


def test_in_a_process_that_has_torch_nothing_is_kept() -> None:
    with imported_to_stay():
        assert gc.isenabled()
    assert not gc.get_freeze_count()
