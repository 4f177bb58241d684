"""One writer at a time: a lock that the kernel holds for a living process."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path

from extractor.errors import StoreError
from extractor.store.atomic import NOT_SUPPORTED

__all__ = ["Lock"]


class Lock:
    """Holds a file locked while the process lives, and says in it who does.

    Args:
        required: refuse where the file system knows no locks.

    Raises:
        StoreError: on entry, when another process holds it; does not wait.
    """

    def __init__(self, path: Path, *, required: bool = True) -> None:
        self._path = path
        self._required = required
        self._descriptor: int | None = None

    def __enter__(self) -> Lock:
        while self._descriptor is None:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(self._path, flags, 0o666)
            try:
                self._take(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            if _is_still(descriptor, self._path):
                self._descriptor = descriptor
            else:  # its last holder removed it between our opening and our locking
                os.close(descriptor)
        os.truncate(self._descriptor, 0)
        os.write(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        return self

    def check(self) -> None:
        """See whether another process holds it, and leave it as it is.

        Raises:
            StoreError: one does.
        """
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:  # there is none, or it is not for us to say
            return
        try:
            self._take(descriptor)
        finally:
            os.close(descriptor)

    def _take(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 1000).decode(errors="replace").strip()
            place = self._path.parent.parent
            raise StoreError(
                f"{place} is being written by {holder or 'another process'}; wait for it, or "
                "choose another --out"
            ) from error
        except OSError as error:
            if error.errno not in {*NOT_SUPPORTED, errno.ENOLCK}:
                raise
            if self._required:
                raise StoreError(
                    f"{self._path.parent.parent}: no file can be locked there ({error.strerror}), "
                    "so a second run would go unseen; choose another --out, or say --no-lock and "
                    "see to it yourself"
                ) from error

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _is_still(descriptor: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    ours = os.fstat(descriptor)
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)
