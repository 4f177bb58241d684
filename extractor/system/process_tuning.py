"""Settings of a whole process that computes: for a program to decide, and not for a library."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Iterator

__all__ = ["imported_to_stay", "keep_freed_memory", "spin_briefly"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h

# Of GNU's OpenMP, which reads them when it is loaded. About a millisecond.
SPINS, SPINNING = "30000", ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")

ARROW_POOL = "ARROW_DEFAULT_MEMORY_POOL"


def keep_freed_memory() -> None:
    """Let glibc keep the memory of one forward pass for the next, instead of giving it back.

    By default every large activation is mapped anew and faulted in page by page. Without that the
    forward pass of 32 images ran 2.0 (SqueezeNet) and 1.6 times (ResNet-50) as fast on two cores,
    medians of three turns. Does nothing where there is no ``mallopt``.

    Arrow, too, is to take from that memory, if it is imported later: from a pool of its own, which
    nothing had touched, the first index of a run took 20 ms instead of 3. What the environment says
    of it holds.
    """
    os.environ.setdefault(ARROW_POOL, "system")
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, 2**31 - 1)):
            mallopt(parameter, value)


def spin_briefly() -> None:
    """Let torch's threads sleep soon after a forward pass; to be called before torch is imported.

    By default each holds its core for 8 ms more, in case there is another operation, while images
    could be decoded there: without that a run of MobileNetV3 small on two cores was 1.03 times as
    fast (docs/performance.md). What the environment says of it holds.
    """
    if not any(name in os.environ for name in SPINNING):
        os.environ[SPINNING[0]] = SPINS


@contextlib.contextmanager
def imported_to_stay() -> Iterator[None]:
    """Import large libraries within, of which nothing will be garbage before the process ends.

    By default Python looks for garbage many times while half a million objects of torch come into
    being, and at all of them again and again later. Does nothing where torch is there already.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # some libraries complain of what is left at the end
        gc.enable()
