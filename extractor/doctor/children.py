"""Runs checks in child processes, so that a crash or a hanging disk ends only one of them."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

from extractor.doctor.finding import Checks, Finding
from extractor.system.installation import PACKAGES, explain_import
from extractor.text import first_line

__all__ = ["GROUPS", "examine", "report"]

# Function that checks each group, and the names that it always reports.
GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "machine": ("extractor.doctor.machine:check_machine", ("system", "cores", "memory")),
    "libraries": (
        "extractor.doctor.packages:check_libraries",
        ("numpy", "pillow", "pyarrow", "safetensors", "huggingface-hub", "tqdm", "formats"),
    ),
    "extras": ("extractor.doctor.packages:check_extras", ("HEIC", "JPEG XL", "camera raw")),
    "tools": (
        "extractor.doctor.packages:check_tools",
        ("search", "evaluate", "export", "map", "ray"),
    ),
    "torch": (
        "extractor.doctor.packages:check_torch",
        ("torch", "devices", "torchvision", "timm", "extractor"),
    ),
    "weights": (
        "extractor.doctor.weights:check_weights",
        ("hub cache", "torch cache", "lite", "hub"),
    ),
    "out": ("extractor.doctor.output:check_output", ("out", "lock", "sync", "rename", "room")),
}

CHILD = """
import sys
sys.path[:] = {path!r}
from extractor.doctor.children import report
report({group!r}, {out!r})
"""

# A cold start of torch from a network drive takes this long.
LIMIT_SECONDS = 60.0


def examine(out: str | None, limit_seconds: float = LIMIT_SECONDS) -> list[Finding]:
    """Run all checks, each group in a process of its own, and return their findings in order.

    Args:
        out: Output folder to check; None checks none.
        limit_seconds: Time after which a process is killed, and its check counts as broken.
    """
    groups = [group for group in GROUPS if group != "out" or out is not None]
    deadline = time.monotonic() + limit_seconds
    children: dict[str, subprocess.Popen[bytes]] = {}
    findings: list[Finding] = []
    try:
        for group in groups:
            children[group] = _start(group, out or "")
        for group, child in children.items():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(deadline - time.monotonic(), 0))
            findings += _collect(group, child, limit_seconds)
    finally:
        for child in children.values():
            child.kill()
    return findings


def _start(group: str, out: str) -> subprocess.Popen[bytes]:
    code = CHILD.format(path=sys.path, group=group, out=out)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def _collect(group: str, child: subprocess.Popen[bytes], limit_seconds: float) -> list[Finding]:
    """Return what a child found, and what its end says about the check that it did last."""
    ended = child.poll()
    child.kill()
    assert child.stdout is not None
    os.set_blocking(child.stdout.fileno(), False)
    findings: list[Finding] = []
    last = ""
    for line in (child.stdout.read() or b"").splitlines():
        entry = json.loads(line)
        if isinstance(entry, str):
            last = entry
        else:
            findings.append(Finding(**entry))
            last = ""
    seen = {finding.name for finding in findings}
    missing = [name for name in GROUPS[group][1] if name not in seen]
    if ended == 0 or not missing:
        return findings
    guilty = last or missing[0]
    findings.append(Finding(guilty, "broken", _end(ended, limit_seconds), _advice(guilty)))
    others = [name for name in missing if name != guilty]
    return findings + [Finding(name, "warning", f"not checked: {guilty} failed") for name in others]


def _end(code: int | None, limit_seconds: float) -> str:
    """Return how a child ended, in words."""
    if code is None:
        return f"no answer within {limit_seconds:g} seconds"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"ended the interpreter by signal {signal.Signals(-code).name}"
    return f"ended the interpreter with exit code {code}"


def _advice(name: str) -> str:
    if name in ("torch", "torchvision"):
        return "pip install --force-reinstall torch torchvision"
    if name in PACKAGES:
        return f"pip install --force-reinstall {name}"
    if name in GROUPS["out"][1]:
        return "check the disk or the mount, or choose another --out"
    return {"devices": "check the driver, or use --device cpu"}.get(name, "")


def report(group: str, out: str) -> None:
    """Run the checks of one group and write them to standard output, one JSON value per line."""
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print
    for entry in _checks(group, out):
        value = entry if isinstance(entry, str) else dataclasses.asdict(entry)
        lines.write(json.dumps(value) + "\n")
        lines.flush()
    os._exit(0)  # a broken library may crash while the interpreter ends


def _checks(group: str, out: str) -> Checks:
    module, _, function = GROUPS[group][0].partition(":")
    now = GROUPS[group][1][0]
    try:
        checks: Iterator[Finding | str] = getattr(importlib.import_module(module), function)(out)
        for entry in checks:
            now = entry if isinstance(entry, str) else now
            yield entry
    except Exception as error:
        text, _, advice = explain_import(error).partition("; try: ")
        text = text or f"{type(error).__name__}: {first_line(error)}"
        yield Finding(now, "broken", text, advice or _advice(now))
