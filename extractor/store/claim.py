"""Exclusive use of the output folder of a store."""

from __future__ import annotations

import contextlib
import enum
from pathlib import Path

from extractor.store.atomic import store_errors
from extractor.store.format import (
    FEATURES,
    IMAGES,
    IN_FLIGHT,
    JOB,
    JOURNAL,
    MANIFEST,
    PLAN,
    REPLACED,
    STAGING,
    SUSPECTS,
    WORKERS,
)
from extractor.store.job import Job
from extractor.store.lock import Lock
from extractor.store.publish import check_output_folder, clear_staging, publish_staged

__all__ = ["ClaimedFolder", "SharedFolder"]


class _OnExit(enum.Enum):
    """What leaving a claimed folder does with the staging folder."""

    KEEP_FOUND = (
        enum.auto()
    )  # nothing was changed yet: keep an interrupted run, clear anything else
    KEEP_WORK = enum.auto()  # keep finished batches for the next run
    CLEAR = enum.auto()


class ClaimedFolder:
    """Context manager that claims the output folder of a store for one run.

    Entering checks, makes and locks the folder, and publishes a store whose run died after it was
    complete. Leaving clears the staging folder, except for work that the next run can resume, and
    removes folders that entering made. The finished store is never touched before a new one is
    complete.

    Args:
        out: folder of the store; made if missing.
        overwrite: accept a finished store, which is then replaced, and an interrupted run of
            something else, which is then discarded.
        extend: accept a finished store, which is then extended.
        lock: fail if the file system does not support locks.
        waits: wait while another process uses the folder.

    Attributes:
        out: folder of the store.
        staging: folder in it that holds the work until it is published.
        overwrite: as given.
        lock: as given.

    Raises:
        StoreError: on entry, if the folder is not writable, in use, or holds something else.
    """

    def __init__(
        self,
        out: Path,
        *,
        overwrite: bool = False,
        extend: bool = False,
        lock: bool = True,
        waits: bool = False,
    ) -> None:
        self.out = out
        self.staging = out / STAGING
        self.overwrite = overwrite
        self.lock = lock
        self._waits = waits
        self._may_exist = overwrite or extend
        self._lock = Lock(self.staging / "lock", required=lock, waits=waits)
        self._made: list[Path] = []  # folders that did not exist before
        self._on_exit = _OnExit.KEEP_FOUND

    def __enter__(self) -> ClaimedFolder:
        if not self._waits:  # what others are publishing is checked once they have left
            self.check()
        with store_errors(self.out):
            try:
                self._take_lock()
            except BaseException:
                self._remove_made_folders()
                raise
            try:
                publish_staged(self.out)
                self.check()
            except BaseException:
                self.release()
                raise
        return self

    def _take_lock(self) -> None:
        while not self._lock.is_held:
            self._make_folders()
            try:
                self._lock.__enter__()
            except FileNotFoundError:  # the last holder removed the folder just now
                if not self._waits:
                    raise

    def __exit__(self, *_: object) -> None:
        self.release()

    def check(self) -> None:
        """Check that the folder holds nothing but a store, as :func:`check_output_folder`."""
        check_output_folder(self.out, may_exist=self._may_exist, overwrite=self.overwrite)

    def staged_job(self) -> Job | None:
        """Return the job of an interrupted run; None if there is none, or it left nothing."""
        return _staged_job(self.staging)

    def start_staging(self) -> None:
        """Clear the staging folder and make its folders; leaving clears them again."""
        clear_staging(self.staging)
        for name in (FEATURES, IMAGES, JOURNAL):
            (self.staging / name).mkdir()
        self._on_exit = _OnExit.CLEAR

    def keep_work(self) -> None:
        """Let leaving keep finished batches for the next run of the same job."""
        self._on_exit = _OnExit.KEEP_WORK

    def discard_work(self) -> None:
        """Let leaving discard all work, since resuming would fail again."""
        self._on_exit = _OnExit.CLEAR

    def finish(self) -> None:
        """Release the folder after the store was published; its folders stay."""
        self._made.clear()
        self._on_exit = _OnExit.CLEAR
        self.release()

    def release(self) -> None:
        """Unlock the folder and clear what is not kept; do nothing if it was released before."""
        if not self._lock.is_held:
            return
        with contextlib.suppress(OSError):  # the next run clears the rest
            if self._is_kept():
                self._lock.__exit__()
                return
            clear_staging(self.staging)
            (self.staging / "lock").unlink(missing_ok=True)
            self.staging.rmdir()
        self._lock.__exit__()
        self._remove_made_folders()

    def _is_kept(self) -> bool:
        # The next run publishes a complete store and removes files of a replaced one.
        if any((self.staging / name).is_file() for name in (MANIFEST, REPLACED)):
            return True
        if self._on_exit is _OnExit.KEEP_FOUND:
            return self.staged_job() is not None
        return self._on_exit is _OnExit.KEEP_WORK and self._has_work()

    def _has_work(self) -> bool:
        if any((self.staging / name).is_file() for name in (SUSPECTS, IN_FLIGHT, PLAN)):
            return True
        if any((self.staging / WORKERS).rglob(f"{IN_FLIGHT}*")):  # of workers that died
            return True
        journal = self.staging / JOURNAL
        batches = any(path.stat().st_size for path in journal.glob("*.jsonl"))
        return batches or any(journal.glob("*.done"))

    def _make_folders(self) -> None:
        missing = []
        folder = self.staging
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another run was faster
                folder.mkdir()
                self._made.append(folder)

    def _remove_made_folders(self) -> None:
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):  # not empty: something else uses it by now
                folder.rmdir()


class SharedFolder:
    """Context manager that lets several processes compute shards of one run.

    While one does, no other run can claim the folder. Entering waits while one has claimed it.
    Leaving clears nothing. A folder where no run is under way is shared as it is, without a lock.

    Args:
        out: folder of the store.

    Attributes:
        out: as given.
        staging: folder in it that holds the work until it is published.
        overwrite: whether a finished store is replaced, which no part does.
        lock: the file system must support locks.
    """

    overwrite = False
    lock = True

    def __init__(self, out: Path) -> None:
        self.out = out
        self.staging = out / STAGING
        self._held = contextlib.ExitStack()

    def __enter__(self) -> SharedFolder:
        with store_errors(self.out), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            self._held.enter_context(Lock(self.staging / "lock", shared=True, waits=True))
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def staged_job(self) -> Job | None:
        """Return the job of the run that is under way; None if there is none."""
        return _staged_job(self.staging)


def _staged_job(staging: Path) -> Job | None:
    try:
        return Job.from_json((staging / JOB).read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):  # the run died while it wrote the job
        return None
