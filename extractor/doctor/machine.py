"""Checks of the system, its cores and its memory."""

from __future__ import annotations

import math
import os
import platform

from extractor.doctor.finding import Checks, Finding
from extractor.system.cpu import available_cores
from extractor.system.memory import granted_memory
from extractor.text import as_size, plural

__all__ = ["check_machine"]

# A small backbone with its decoding threads; torch alone takes about 0.5 GiB.
LEAST_MEMORY = 2**30


def check_machine(_: str) -> Checks:
    """Say what the machine is and what of it this process may use."""
    system = f"{platform.platform()}, Python {platform.python_version()}"
    yield Finding("system", "ok", system)
    granted, present = available_cores(), os.cpu_count() or 1
    of_all = "" if granted == present else f" of {present}"
    details: dict[str, object] = {"granted": granted, "present": present}
    yield Finding("cores", "ok", f"{plural(granted, 'core')}{of_all}", details=details)
    total, free = granted_memory()
    if math.isinf(total):
        yield Finding("memory", "ok", "size is unknown here")
        return
    details = {"total_bytes": int(total), "free_bytes": int(free)}
    text = f"{as_size(free)} of {as_size(total)} free"
    if free >= LEAST_MEMORY:
        yield Finding("memory", "ok", text, details=details)
    else:
        advice = "stop other programs, or ask for more memory; a small --batch-size needs less"
        yield Finding("memory", "warning", text, advice, details)
