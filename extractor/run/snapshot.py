"""The images that are asked for, as they are now, to compare with those of a store."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from extractor.errors import DecodeError
from extractor.images.files import digest_of, open_regular
from extractor.images.listing import ImageList
from extractor.store.plan import Snapshot

__all__ = ["current_images"]

# Files in flight: more than cores, since some wait for the disk. Hashing lets go of the
# interpreter lock.
THREADS = 8


def current_images(images: ImageList, *, content: bool) -> Snapshot:
    """Look at every file, and open none.

    Args:
        content: let the digests of files be compared, which reads them; not sizes and times.
    """
    sizes = np.full(len(images), -1, np.int64)
    mtimes = np.full(len(images), -1, np.int64)
    for i in range(len(images)):
        with contextlib.suppress(OSError, ValueError):
            status = os.stat(images.full_path(i))
            sizes[i], mtimes[i] = status.st_size, status.st_mtime_ns
    known: dict[int, bytes] = {}

    def digests(places: Sequence[int]) -> list[bytes]:
        new = [i for i in places if i not in known]
        with ThreadPoolExecutor(THREADS) as pool:
            known.update(zip(new, pool.map(digest_of, map(images.full_path, new)), strict=True))
        return [known[i] for i in places]

    def is_readable(place: int) -> bool:
        try:
            open_regular(images.full_path(place)).close()
        except (OSError, DecodeError):
            return False
        return True

    return Snapshot(images.paths, sizes, mtimes, is_readable, digests if content else None)
