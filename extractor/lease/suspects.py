"""Images that were being decoded when a run died."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from extractor.images.listing import display_path
from extractor.loading.crash_log import CrashLog
from extractor.store.atomic import store_errors, write_atomically
from extractor.store.format import IN_FLIGHT, SUSPECTS, WORKERS

__all__ = ["Suspects", "load_suspects"]

log = logging.getLogger(__name__)


class Suspects:
    """Images that were being decoded when a run died, kept until the store is complete.

    Args:
        folder: Staging folder of the store, where an interrupted run keeps its work.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / SUSPECTS

    def load(self) -> tuple[list[bytes], list[bytes]]:
        """Return all suspects and, of these, those of the last run, and save them all."""
        # A run has one file of its own and one for each of its workers.
        logs = [self._folder / IN_FLIGHT, *(self._folder / WORKERS).rglob(f"{IN_FLIGHT}*")]
        new = sorted({path for log in logs for path in CrashLog.read(log)})
        return self.add(new), new

    def add(self, new: Iterable[bytes]) -> list[bytes]:
        """Save suspects beside the known ones, and return all."""
        try:
            known = [os.fsencode(path) for path in json.loads(self._path.read_bytes())]
        except (FileNotFoundError, ValueError):
            known = []
        suspects = sorted({*known, *new})
        if len(suspects) > len(known):
            with store_errors(self._folder.parent):
                content = json.dumps([os.fsdecode(path) for path in suspects])
                write_atomically(self._path, content.encode("ascii"))
        return suspects


def load_suspects(staging_folders: Iterable[Path]) -> set[bytes]:
    """Return the suspects of all stores of a run, and warn about those of the last run."""
    suspects: set[bytes] = set()
    for folder in staging_folders:
        known, new = Suspects(folder).load()
        suspects.update(known)
        if new:
            log.warning(
                "the last run died while decoding %s; now decoded in a process of its own",
                ", ".join(map(display_path, new)),
            )
    return suspects
