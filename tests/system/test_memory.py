"""Memory granted by Linux's control groups."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from extractor.system import memory as memory_module
from extractor.system.memory import free_memory, granted_memory

MIB = 2**20
MACHINE = "MemTotal:        8192 kB\nMemFree:  1 kB\nMemAvailable:    4096 kB\n"  # 8 and 4 MiB


def memory(folder: Path, groups: str, files: dict[str, str]) -> tuple[float, float]:
    for name, text in {"meminfo": MACHINE, "groups": groups, **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return granted_memory(folder / "cgroup", folder / "groups", folder / "meminfo")


def test_machine_without_limits_grants_all(tmp_path: Path) -> None:
    files = {"cgroup/memory.max": "max\n", "cgroup/memory.current": "5\n"}
    assert memory(tmp_path, "0::/\n", files) == (8 * MIB, 4 * MIB)
    assert granted_memory(tmp_path, tmp_path, tmp_path) == (math.inf, math.inf)


def test_lowest_limit_on_the_way_up_counts_in_version_2(tmp_path: Path) -> None:
    files = {
        "cgroup/a/b/memory.max": f"{6 * MIB}\n",
        "cgroup/a/b/memory.current": f"{1 * MIB}\n",
        "cgroup/a/memory.max": f"{3 * MIB}\n",
        "cgroup/a/memory.current": f"{2 * MIB}\n",
    }
    assert memory(tmp_path, "0::/a/b\n", files) == (3 * MIB, 1 * MIB)


def test_limit_of_version_1_counts(tmp_path: Path) -> None:
    groups = "9:cpu,cpuacct:/x\n5:memory:/x\n"
    files = {
        "cgroup/memory/x/memory.limit_in_bytes": f"{2 * MIB}\n",
        "cgroup/memory/x/memory.usage_in_bytes": f"{5 * MIB}\n",
        "cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    }
    assert memory(tmp_path, groups, files) == (2 * MIB, 0)


@pytest.mark.parametrize(("prefix", "groups"), [("", "0::/x\n"), ("total_", "5:memory:/x\n")])
def test_cached_files_count_as_free(tmp_path: Path, prefix: str, groups: str) -> None:
    folder, names = "cgroup/x", ("memory.max", "memory.current")
    if prefix:
        folder = "cgroup/memory/x"
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    files = {
        f"{folder}/{names[0]}": f"{3 * MIB}\n",
        f"{folder}/{names[1]}": f"{3 * MIB - 1}\n",
        f"{folder}/memory.stat": f"anon 7\n{prefix}active_file {MIB}\n{prefix}inactive_file 5\n",
    }
    assert memory(tmp_path, groups, files) == (3 * MIB, MIB + 5 + 1)


def test_memory_that_is_kept_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "granted_memory", lambda: (9.0, 4.0))
    monkeypatch.setattr(memory_module, "_kept_memory", lambda: 3)
    assert free_memory() == 7


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_limit_on_addresses_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import resource

    (tmp_path / "statm").write_text("100 50 20 10 0 5 0\n")
    page = resource.getpagesize()
    monkeypatch.setattr(memory_module, "STATM", tmp_path / "statm")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1000 * page, resource.RLIM_INFINITY))
    monkeypatch.setattr(memory_module, "granted_memory", lambda: (math.inf, math.inf))
    assert free_memory() == 900 * page
    monkeypatch.setattr(resource, "getrlimit", lambda _: (10 * page, 10 * page))
    assert free_memory() == 0


def test_processes_share_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "granted_memory", lambda: (8.0 * MIB, 6.0 * MIB))
    monkeypatch.setattr(memory_module, "_kept_memory", lambda: 1 * MIB)
    monkeypatch.setattr(memory_module, "_free_addresses", lambda: math.inf)
    assert free_memory() == 7 * MIB
    monkeypatch.setattr(memory_module, "_sharers", 1)  # restored after the test
    memory_module.share_memory(3)
    assert free_memory() == 3 * MIB
