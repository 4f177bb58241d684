"""Settings of the whole process, which only the command makes."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.pictures import noise

from extractor.system import process_tuning
from extractor.system.process_tuning import (
    ARROW_POOL,
    SPINNING,
    SPINS,
    freeze_imports,
    keep_freed_memory,
    return_freed_memory,
    spin_briefly,
)

# Prints what torch's OpenMP finds in the environment, and whether torch was loaded too early.
PROBE = """
import gc, os, sys
from extractor.cli import extract
from extractor.cli.main import main

settle = extract.spin_briefly

def settled():
    print("torch" in sys.modules)
    settle()
    print(os.environ.get("GOMP_SPINCOUNT"))

extract.spin_briefly = settled
try:
    sys.exit(main(sys.argv[1:]))
finally:
    print(gc.isenabled(), gc.get_freeze_count() > 10_000)
    import pyarrow
    print(pyarrow.default_memory_pool().backend_name)
"""

ARROW = """
from extractor.system.process_tuning import keep_freed_memory

keep_freed_memory()
import pyarrow

print(pyarrow.default_memory_pool().backend_name)
"""


@pytest.mark.parametrize("variables", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}])
def test_environment_overrides_spinning(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name in SPINNING:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    spin_briefly()
    assert {name: os.environ[name] for name in SPINNING if name in os.environ} == (
        variables or {"GOMP_SPINCOUNT": SPINS}
    )


@pytest.mark.parametrize(
    ("variables", "pool"), [({}, "system"), ({ARROW_POOL: "mimalloc"}, "mimalloc")]
)
def test_environment_overrides_arrow_pool(variables: dict[str, str], pool: str) -> None:
    environment = {
        name: value for name, value in os.environ.items() if name != ARROW_POOL
    } | variables
    done = subprocess.run(
        [sys.executable, "-c", ARROW], env=environment | variables, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, pool), done.stderr


def test_command_tunes_process_before_importing_torch(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    noise(0, 40, 40).save(tmp_path / "images" / "a.png")
    words = ["--model", "torchvision:squeezenet1_0", "--weights", "random", "--device", "cpu"]
    command = [sys.executable, "-c", PROBE, *words, "--out", "store", "images"]
    own = (*SPINNING, ARROW_POOL)
    environment = {name: value for name, value in os.environ.items() if name not in own}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.split()
    assert (printed[:2], printed[-3:]) == (["False", SPINS], ["True", "True", "system"])
    assert not done.stderr.count("leaked")


def test_freeze_imports_does_nothing_once_torch_is_imported() -> None:
    with freeze_imports():
        assert gc.isenabled()
    assert not gc.get_freeze_count()


def test_memory_is_returned_only_if_it_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []

    class Library:
        def mallopt(self, *values: int) -> None:
            calls.append(values)

        def malloc_trim(self, *values: int) -> None:
            calls.append(values)

    monkeypatch.setenv(ARROW_POOL, "system")
    monkeypatch.setattr(process_tuning, "_kept", False)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library())
    return_freed_memory()  # as in a program that only uses the library
    assert calls == []
    keep_freed_memory()
    kept: dict[int, int] = dict(calls)  # type: ignore[arg-type]
    calls.clear()
    return_freed_memory()
    assert calls.pop() == (0,)  # of malloc_trim
    returned: dict[int, int] = dict(calls)  # type: ignore[arg-type]
    assert returned.keys() == kept.keys()
    assert all(returned[parameter] < kept[parameter] for parameter in kept)
    calls.clear()
    return_freed_memory()
    assert calls == []
