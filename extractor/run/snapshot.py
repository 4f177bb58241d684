"""Size and modification time of every image now, to compare with a store."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from extractor.errors import DecodeError
from extractor.images.files import digest_of, open_regular, size_and_mtime
from extractor.images.formats import has_decoder
from extractor.images.listing import ImageList
from extractor.store.plan import Snapshot

__all__ = ["take_snapshot"]

# More threads than cores: some wait for the disk, and hashing releases the interpreter lock.
THREADS = 8


def take_snapshot(images: ImageList, *, content: bool) -> Snapshot:
    """Return the current state of every image, without opening one.

    Args:
        images: Images of the run.
        content: Compare files by their SHA-256, which reads them, instead of size and time.
    """
    sizes = np.full(len(images), -1, np.int64)
    mtimes = np.full(len(images), -1, np.int64)
    for i in range(len(images)):
        with contextlib.suppress(OSError, ValueError):
            sizes[i], mtimes[i] = size_and_mtime(os.stat(images.full_path(i)))
    known: dict[int, bytes] = {}

    def digests(indices: Sequence[int]) -> list[bytes]:
        new = [i for i in indices if i not in known]
        with ThreadPoolExecutor(THREADS) as pool:
            known.update(zip(new, pool.map(digest_of, map(images.full_path, new)), strict=True))
        return [known[i] for i in indices]

    def is_readable(index: int) -> bool:
        try:
            open_regular(images.full_path(index)).close()
        except (OSError, DecodeError):
            return False
        return True

    return Snapshot(
        images.paths,
        sizes,
        mtimes,
        is_readable,
        digests if content else None,
        lambda index: has_decoder(images.full_path(index)),
    )
