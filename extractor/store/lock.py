"""Locks that let only one process at a time write a store, or one of its shards."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path

from extractor.errors import ShardBusyError, StoreBusyError, StoreError
from extractor.store.atomic import NOT_SUPPORTED
from extractor.store.format import JOURNAL

__all__ = ["TELL_SECONDS", "FinishingLock", "Lock", "ShardLock", "is_same_file", "this_process"]

log = logging.getLogger(__name__)

POLL_SECONDS = 0.05
TELL_SECONDS = 10.0  # until the user hears why the program waits


class Lock:
    """Context manager that locks a file and writes the process and host into it.

    The kernel releases the lock when the process ends, in whatever way.

    Args:
        path: file to lock, in the staging folder of a store.
        required: fail if the file system does not support locks.
        shared: let others share the lock; then the file must exist.
        waits: wait while another process holds the lock.

    Raises:
        StoreError: on entry, if another process holds the lock and it does not wait.
        FileNotFoundError: on entry, if there is no file to share.
    """

    def __init__(
        self, path: Path, *, required: bool = True, shared: bool = False, waits: bool = False
    ) -> None:
        self._path = path
        self._required = required
        self._shared = shared
        self._waits = waits
        self._descriptor: int | None = None

    def __enter__(self) -> Lock:
        while self._descriptor is None:
            flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (0 if self._shared else os.O_CREAT)
            descriptor = os.open(self._path, flags, 0o666)
            try:
                self._take(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            if is_same_file(descriptor, self._path):
                self._descriptor = descriptor
            else:  # its last holder removed it after we opened it and before we locked it
                os.close(descriptor)
        os.truncate(self._descriptor, 0)
        os.write(self._descriptor, f"{this_process()}\n".encode())
        return self

    @property
    def is_held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def check(self) -> None:
        """Check that no other process holds the lock; the file stays as it is.

        Raises:
            StoreError: another process holds it.
        """
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:  # no lock file, or none that we may open
            return
        try:
            self._take(descriptor)
        finally:
            os.close(descriptor)

    def _take(self, descriptor: int) -> None:
        begun, operation = time.monotonic(), fcntl.LOCK_SH if self._shared else fcntl.LOCK_EX
        has_told = False
        while True:
            busy = self._try(descriptor, operation)
            if busy is None:
                return
            if not self._waits:
                raise busy
            if not has_told and time.monotonic() - begun > TELL_SECONDS:
                has_told = True
                log.warning("waiting: %s", str(busy).partition(";")[0])
            time.sleep(POLL_SECONDS)

    def _try(self, descriptor: int, operation: int) -> StoreBusyError | None:
        """Take the lock if it is free; else return who has it."""
        try:
            fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
            return self._busy(holder or "another process")
        except OSError as error:
            if error.errno not in {*NOT_SUPPORTED, errno.ENOLCK}:
                raise
            if self._required:
                raise StoreError(
                    f"{self._out}: the file system does not support locks "
                    f"({error.strerror}), so a second run would go unnoticed; choose another "
                    "--out, or use --no-lock and start only one run at a time"
                ) from error
        return None

    @property
    def _out(self) -> Path:
        """Folder of the store."""
        return self._path.parent.parent

    def _busy(self, holder: str) -> StoreBusyError:
        return StoreBusyError(
            f"{self._out} is being written by {holder}; wait for it, or choose another --out"
        )

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class ShardLock(Lock):
    """Lock of one shard of a run; its file is removed when it is released.

    Args:
        staging: staging folder of the store.
        shard: number of the shard.
        required: fail if the file system does not support locks.

    Raises:
        ShardBusyError: on entry, if another process holds the lock; it does not wait.
    """

    def __init__(self, staging: Path, shard: int, *, required: bool = True) -> None:
        self._begin(staging, shard, "lock", required=required)

    def _begin(
        self, staging: Path, shard: int, suffix: str, *, required: bool, waits: bool = False
    ) -> None:
        path = staging / JOURNAL / f"{shard:05d}.{suffix}"
        Lock.__init__(self, path, required=required, waits=waits)
        self._staging = staging
        self._shard = shard

    @property
    def _out(self) -> Path:
        return self._staging.parent

    def _busy(self, holder: str) -> StoreBusyError:
        return ShardBusyError(
            f"shard {self._shard} of {self._out} is being computed by {holder}; wait for it"
        )

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # an empty file is left, and no lock
            if self._descriptor is not None and is_same_file(self._descriptor, self._path):
                self._path.unlink()
        super().__exit__()


class FinishingLock(ShardLock):
    """Lock under which one of several attempts at a shard finishes it; it waits for others."""

    def __init__(self, staging: Path, shard: int, *, required: bool = True) -> None:
        self._begin(staging, shard, "finish", required=required, waits=True)


def this_process() -> str:
    """Return the name of this process in lock files and messages."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def is_same_file(descriptor: int, path: Path) -> bool:
    """Return whether a path still leads to an open file."""
    try:
        current = os.stat(path)
    except FileNotFoundError:
        return False
    locked = os.fstat(descriptor)
    return (current.st_dev, current.st_ino) == (locked.st_dev, locked.st_ino)
