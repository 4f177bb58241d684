"""Actions that die, or fail, at a chosen step that changes the file system."""

from __future__ import annotations

import gc
import itertools
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

DIED = 77
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


def in_child(action: Callable[[], object], at_step: Callable[[int], None]) -> bool:
    """Run ``action`` in a process of its own; True if ``at_step`` made it exit with ``DIED``."""
    code = exit_code(action, at_step)
    assert code in (0, DIED)
    return code == DIED


def exit_code(action: Callable[[], object], at_step: Callable[[int], None]) -> int:
    """Run ``action`` in a process of its own, and return its exit code; 1 after an error.

    ``at_step`` is called with 1, 2, 3, ... before each step that changes the file system. The
    process shares no memory with ours, so nothing of ours is cleaned up by accident.
    """
    child = os.fork()
    if child == 0:
        gc.disable()  # a collection would copy the memory of all libraries
        try:
            steps = itertools.count(1)
            fsync = os.fsync

            def hook(event: str, arguments: tuple[Any, ...]) -> None:
                written = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
                if written or event in CHANGES:
                    at_step(next(steps))

            def synced(descriptor: int) -> None:
                at_step(next(steps))
                fsync(descriptor)

            os.fsync = synced  # type: ignore[assignment]
            sys.addaudithook(hook)
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die(when: int) -> Callable[[int], None]:
    def at_step(step: int) -> None:
        if step == when:
            os._exit(DIED)

    return at_step
