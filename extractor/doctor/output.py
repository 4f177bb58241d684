"""Checks of an output folder: a folder for tests is made in it and removed again."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from extractor.doctor.finding import Checks, Finding, State
from extractor.errors import StoreError
from extractor.store.atomic import NOT_SUPPORTED
from extractor.store.format import MANIFEST
from extractor.store.publish import check_output_folder
from extractor.text import as_size

__all__ = ["check_output"]

CHOOSE = "choose another --out"

LEAST_BYTES, LEAST_FILES = 2**30, 100
NEEDED_FILES = 10  # those of a store with one shard, while it is written
ROW_BYTES = 8192 + 300  # of resnet50, with its line in the index


def check_output(out: str) -> Checks:
    """Check that a store can be written to a folder, or to the folder in which it will be made."""
    yield "out"
    folder = Path(out)
    try:
        check_output_folder(folder, may_exist=True, check_lock=True)
    except StoreError as error:
        # A folder of several stores is no store, but several models may fill it.
        if not any(folder.glob(f"*/{MANIFEST}")):
            text = str(error)
            yield Finding("out", "broken", text, "" if "--out" in text else CHOOSE)
            return
    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    status = os.stat(existing)
    try:
        tests = Path(tempfile.mkdtemp(prefix=".extractor-doctor-", dir=existing))
    except OSError as error:
        yield Finding("out", "broken", f"cannot write to {existing}: {error.strerror}", CHOOSE)
        return
    try:
        exists = (
            "can be written" if existing == folder.absolute() else f"will be made in {existing}"
        )
        yield Finding("out", "ok", exists)
        yield from _tests(tests)
    finally:
        shutil.rmtree(tests, ignore_errors=True)
        _keep_time(existing, status)
    yield "room"
    yield _room(existing)


def _keep_time(folder: Path, status: os.stat_result) -> None:
    """Give a folder its time back, as if nothing had been made in it."""
    try:
        os.utime(folder, ns=(status.st_atime_ns, status.st_mtime_ns))
    except OSError:  # it belongs to somebody else
        return


def _tests(folder: Path) -> Iterator[Finding | str]:
    checks: tuple[tuple[str, Callable[[Path], Finding]], ...] = (
        ("lock", _lock),
        ("sync", _sync),
        ("rename", _rename),
    )
    for name, check in checks:
        yield name
        try:
            yield check(folder)
        except OSError as error:
            yield Finding(name, "broken", f"fails: {error.strerror}", CHOOSE)


def _lock(folder: Path) -> Finding:
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in {*NOT_SUPPORTED, errno.ENOLCK}:
                raise
            text = f"not supported: {error.strerror}"
            return Finding("lock", "warning", text, "use --no-lock, and one run at a time")
    return Finding("lock", "ok", "locks work")


def _sync(folder: Path) -> Finding:
    try:
        with (folder / "synced").open("wb") as file:
            file.write(b"x" * mmap.PAGESIZE)
            file.flush()
            os.fsync(file.fileno())
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        text = f"not supported ({error.strerror}); a power cut may cost data"
        return Finding("sync", "warning", text, "choose a local disk for --out")
    with (folder / "synced").open("rb") as synced:
        mmap.mmap(synced.fileno(), 0, prot=mmap.PROT_READ).close()
        return Finding("sync", "ok", "files can be synced and mapped")


def _rename(folder: Path) -> Finding:
    for name in ("a", "b"):
        (folder / name).mkdir()
        (folder / f"{name}.txt").write_text(name)
    os.replace(folder / "a.txt", folder / "b.txt")
    os.rename(folder / "a", folder / "c")
    os.rename(folder / "c", folder / "b")  # an empty folder is replaced
    if (folder / "b.txt").read_text() != "a":
        return Finding("rename", "broken", "a renamed file has another content", CHOOSE)
    return Finding("rename", "ok", "files and folders can be renamed")


def _room(folder: Path) -> Finding:
    status = os.statvfs(folder)
    free, files = status.f_bavail * status.f_frsize, status.f_favail
    details = {"free_bytes": free, "free_files": files if status.f_files else None}
    text = f"{as_size(free)} free, {free // ROW_BYTES:,} rows of resnet50"
    if status.f_files:
        text += f"; {files:,} more files"
    if free >= LEAST_BYTES and (not status.f_files or files >= LEAST_FILES):
        return Finding("room", "ok", text, details=details)
    is_full = free < ROW_BYTES or (status.f_files and files < NEEDED_FILES)
    state: State = "broken" if is_full else "warning"
    return Finding("room", state, text, "make room, or choose another --out", details)
