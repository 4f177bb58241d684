"""Small pictures of rows' images, of those that are as they were when they were embedded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from extractor.errors import DecodeError
from extractor.images.budget import PixelBudget
from extractor.images.time_limit import decode_within
from extractor.options import MAX_PIXELS
from extractor.preprocess import Preprocess
from extractor.system.cpu import available_cores
from extractor.text import plural

__all__ = ["ImageCounts", "Thumbnails"]

Pixels: TypeAlias = npt.NDArray[np.uint8]


@dataclass
class ImageCounts:
    """What became of the images of rows.

    Attributes:
        shown: Number of images with a thumbnail.
        unreadable: Number of images that are gone or cannot be decoded.
        changed: Number of images whose content changed since they were embedded.
    """

    shown: int = 0
    unreadable: int = 0
    changed: int = 0

    @property
    def problems(self) -> str:
        """What is missing, for people; empty if nothing is."""
        parts = []
        if self.unreadable:
            parts.append(f"{plural(self.unreadable, 'image')} moved or cannot be read")
        if self.changed:
            parts.append(f"{plural(self.changed, 'image')} changed since extraction")
        return ", ".join(parts)


class Thumbnails:
    """Reads thumbnails with the limits of extraction, in several threads.

    Args:
        root: Folder that paths are relative to.
        edge: Length of the longer edge in pixels.

    Attributes:
        counts: What became of the images so far.
    """

    def __init__(self, root: str | os.PathLike[str], edge: int) -> None:
        self._root = os.fspath(root)
        self._edge = edge
        self._budget = PixelBudget(MAX_PIXELS)
        gray = (0.5, 0.5, 0.5)
        size = (edge, edge)
        # Pillow's Lanczos filter needs no torch.
        self._transform = Preprocess(size, "contain", size, "lanczos", gray, gray, (255, 255, 255))
        self.counts = ImageCounts()

    def read(self, paths: Sequence[str], digests: Sequence[bytes | None]) -> list[Pixels | None]:
        """Return the thumbnail of each image, ``(h, w, 3)`` uint8; None where there is none.

        Args:
            paths: Paths of images.
            digests: SHA-256 of each file as it was embedded; None or empty if that is unknown.
        """
        found: list[Pixels | None] = []
        with ThreadPoolExecutor(available_cores()) as threads:
            for pixels, problem in threads.map(self._thumbnail, paths, digests):
                found.append(pixels)
                self.counts.shown += pixels is not None
                self.counts.changed += problem == "changed"
                self.counts.unreadable += problem == "unreadable"
        return found

    def _thumbnail(self, path: str, digest: bytes | None) -> tuple[Pixels | None, str]:
        """Return one thumbnail, or None and why there is none."""
        pixels = np.empty((self._edge, self._edge, 3), np.uint8)
        source = os.path.join(self._root, path)
        try:
            info = decode_within(source, [self._transform], [pixels], self._budget)
        except DecodeError:
            return None, "unreadable"
        if digest and info.sha256 != digest:
            return None, "changed"
        geometry = self._transform.geometry(info.width, info.height)
        (left, top), (width, height) = geometry.offset, geometry.size
        return pixels[top : top + height, left : left + width].copy(), ""
