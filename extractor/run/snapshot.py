"""Size and modification time of every image now, to compare with a store."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from extractor.errors import DecodeError
from extractor.images.exclude import Excludes
from extractor.images.files import digest_of, open_regular, size_and_mtime
from extractor.images.formats import has_decoder
from extractor.images.listing import ImageList, display_path
from extractor.store.plan import Sight, Snapshot

__all__ = ["look_at", "seen_from", "take_snapshot", "unlisted_folders"]

# More threads than cores: some wait for the disk, and hashing releases the interpreter lock.
THREADS = 8
# A local file system answers in 2 us, in which a thread would not even start to work. A network
# takes 200 us to 1 ms, whoever else is waiting for it.
STATUS_THREADS = 32
STATUS_BLOCK = 1024
SLOW_STATUS = 100e-6  # seconds


def take_snapshot(images: ImageList, *, content: bool) -> Snapshot:
    """Return the current state of every image, without opening one.

    Args:
        images: Images of the run.
        content: Compare all files by their SHA-256, which reads them. Otherwise only those are read
            whose path, size or time is new, and whose content may be known.
    """
    sizes, mtimes = _sizes_and_mtimes(images)
    known: dict[int, bytes] = {}

    def digests(indices: Sequence[int]) -> list[bytes]:
        new = [i for i in indices if i not in known]
        if not new:
            return [known[i] for i in indices]
        with ThreadPoolExecutor(THREADS) as pool:
            known.update(zip(new, pool.map(digest_of, map(images.full_path, new)), strict=True))
        return [known[i] for i in indices]

    # A list has no patterns but those of the caller.
    excludes = Excludes(images.exclude, defaults=images.order is None)
    above = images.root.rstrip(b"/") + b"/"

    def is_excluded(path: bytes) -> bool:
        return path.startswith(above) and excludes.match_file(path[len(above) :]) is not None

    snapshot = Snapshot(
        images.paths,
        sizes,
        mtimes,
        _looker(b""),
        digests,
        lambda index: has_decoder(images.full_path(index)),
        is_excluded=is_excluded,
        check_content=content,
    )
    return seen_from(images, snapshot)


def _sizes_and_mtimes(
    images: ImageList,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return bytes and modification time of every image, -1 without a status.

    Threads ask for them once the file system turns out to be slow.
    """
    sizes = np.full(len(images), -1, np.int64)
    mtimes = np.full(len(images), -1, np.int64)
    is_slow = False
    with ThreadPoolExecutor(STATUS_THREADS) as pool:
        for start in range(0, len(images), STATUS_BLOCK):
            block = range(start, min(start + STATUS_BLOCK, len(images)))
            paths = [os.path.join(images.root, path) for path in images.paths[start : block.stop]]
            began = time.perf_counter()
            found = pool.map(_status, paths) if is_slow else map(_status, paths)
            for i, status in zip(block, found, strict=True):
                sizes[i], mtimes[i] = status
            is_slow |= time.perf_counter() - began > SLOW_STATUS * len(block)
    return sizes, mtimes


def _status(path: bytes) -> tuple[int, int]:
    try:
        return size_and_mtime(os.stat(path))
    except (OSError, ValueError):
        return -1, -1


def seen_from(images: ImageList, snapshot: Snapshot) -> Snapshot:
    """Return a snapshot of the same images with their paths in a list, see ``relative_to``."""
    return replace(
        snapshot,
        paths=images.paths,
        look=_looker(images.root),
        unlisted=[folder.path for folder in images.unlisted],
        is_excluded=lambda path: snapshot.is_excluded(os.path.join(images.root, path)),
    )


def _looker(root: bytes) -> Callable[[Sequence[bytes]], list[Sight]]:
    """Return a function that looks once at each of several paths relative to a folder."""
    seen: dict[bytes, Sight] = {}

    def look(paths: Sequence[bytes]) -> list[Sight]:
        new = [path for path in paths if path not in seen]
        if new:
            with ThreadPoolExecutor(THREADS) as pool:
                full = [os.path.join(root, path) for path in new]
                seen.update(zip(new, pool.map(look_at, full), strict=True))
        return [seen[path] for path in paths]

    return look


def look_at(path: bytes) -> Sight:
    """Return what is at a path. Only the answer that nothing is there counts as gone."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return Sight.OTHER
        open_regular(path).close()
    except (FileNotFoundError, NotADirectoryError):
        return Sight.GONE
    except OSError:
        return Sight.UNSEEN
    except (DecodeError, ValueError):  # replaced by a pipe just now, or no possible path
        return Sight.OTHER
    return Sight.READABLE


def unlisted_folders(images: ImageList) -> tuple[tuple[str, str], ...]:
    """Return the folders that could not be listed, as text for messages, with the reason."""
    return tuple((display_path(folder.path) or ".", folder.reason) for folder in images.unlisted)
