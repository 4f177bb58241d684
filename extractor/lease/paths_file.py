"""Paths of the images of a run, in a file that every worker reads a part of.

The folder holds the paths, each ended by a zero byte, and the offset of every path that begins a
block. So a worker reads the paths of one shard, however many images there are. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from extractor.errors import StoreError

__all__ = ["BLOCK", "PathsFile", "write_paths"]

BLOCK = 1024  # paths between two offsets: all shards but explicit ones begin with a block

PATHS = "paths"
OFFSETS = "offsets.npy"


def write_paths(folder: Path, paths: Iterable[bytes]) -> PathsFile:
    """Write paths in their order, and return the file.

    Args:
        folder: Folder for the files; made if missing.
        paths: Paths without zero bytes.
    """
    folder.mkdir(exist_ok=True)
    offsets = [0]
    with (folder / PATHS).open("wb") as file:
        for block in _blocks(paths):
            offsets.append(offsets[-1] + file.write(b"".join(path + b"\0" for path in block)))
    np.save(folder / OFFSETS, np.array(offsets, np.int64))
    return PathsFile(folder)


def _blocks(paths: Iterable[bytes]) -> Iterator[list[bytes]]:
    block: list[bytes] = []
    for path in paths:
        block.append(path)
        if len(block) == BLOCK:
            yield block
            block = []
    if block:
        yield block


class PathsFile:
    """Paths that :func:`write_paths` wrote.

    Args:
        folder: Folder of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, indices: range) -> list[bytes]:
        """Return consecutive paths.

        Raises:
            StoreError: The files cannot be read, or lack these paths.
        """
        first, last = indices.start // BLOCK, -(-indices.stop // BLOCK)
        try:
            offsets = np.load(self.folder / OFFSETS, mmap_mode="r", allow_pickle=False)
            start, stop = int(offsets[first]), int(offsets[min(last, len(offsets) - 1)])
            with (self.folder / PATHS).open("rb") as file:
                file.seek(start)
                paths = file.read(stop - start).split(b"\0")[:-1]
        except (OSError, ValueError, IndexError) as error:
            raise StoreError(f"cannot read the plan in {self.folder}: {error}") from error
        skipped = indices.start - first * BLOCK
        paths = paths[skipped : skipped + len(indices)]
        if len(paths) != len(indices):
            raise StoreError(f"the plan in {self.folder} lacks images")
        return paths
