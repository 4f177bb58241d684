"""Settings of a whole process. Programs choose them; a library never should."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import os
import signal
import sys
from collections.abc import Iterator

__all__ = [
    "die_with_parent",
    "freeze_imports",
    "keep_freed_memory",
    "return_freed_memory",
    "spin_briefly",
]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
PR_SET_PDEATHSIG = 1  # linux/prctl.h

# Variables of GNU OpenMP, which reads them when it is loaded. 30,000 spins take about 1 ms.
SPINS, SPINNING = "30000", ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")

_kept = False  # whether keep_freed_memory() had an effect

ARROW_POOL = "ARROW_DEFAULT_MEMORY_POOL"


def keep_freed_memory() -> None:
    """Make glibc and Arrow reuse freed memory instead of returning it to the system.

    By default every large activation is mapped anew and faulted in page by page. Without that, the
    forward pass of 32 images was 2.0 times (SqueezeNet) and 1.6 times (ResNet-50) as fast on two
    cores, medians of three runs. Does nothing where there is no ``mallopt``.

    Arrow uses the same memory if it is imported later. With its own pool, which no page had been
    faulted into, the first index of a run took 20 ms instead of 3. A value in the environment wins.
    """
    global _kept
    os.environ.setdefault(ARROW_POOL, "system")
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, 2**31 - 1)):
            mallopt(parameter, value)
        _kept = True


def return_freed_memory() -> None:
    """Undo :func:`keep_freed_memory` where memory is scarce, and return what is free.

    What glibc keeps has gaps: a process held up to three times the memory of its tensors. Does
    nothing if the program did not choose to keep memory.
    """
    global _kept
    if not _kept:
        return
    _kept = False
    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        for parameter, value in ((M_MMAP_THRESHOLD, 2**20), (M_TRIM_THRESHOLD, 2**26)):
            library.mallopt(parameter, value)
        library.malloc_trim(0)


def spin_briefly() -> None:
    """Make torch's threads sleep soon after a forward pass. Call it before torch is imported.

    By default each thread holds its core for 8 ms in case another operation follows, while that
    core could decode images. With this, a run of MobileNetV3 small on two cores was 1.03 times as
    fast (docs/performance.md). A value in the environment wins.
    """
    if not any(name in os.environ for name in SPINNING):
        os.environ[SPINNING[0]] = SPINS


def die_with_parent() -> None:
    """Make Linux kill this process once the one that started it has ended."""
    with contextlib.suppress(OSError, AttributeError):  # other systems have no prctl
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def freeze_imports() -> Iterator[None]:
    """Pause garbage collection while large libraries are imported, and exempt them afterwards.

    By default Python collects many times while torch creates half a million objects, and scans all
    of them in later collections. Does nothing if torch is imported already.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # some libraries report what is left at exit as a leak
        gc.enable()
