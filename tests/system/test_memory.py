"""Memory granted by Linux's control groups."""

from __future__ import annotations

import math
from pathlib import Path

from extractor.system.memory import granted_memory

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
