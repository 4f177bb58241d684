"""Thumbnails: made when they are asked for, and kept beside the store by id and content."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import threading
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from extractor.errors import DecodeError
from extractor.images.budget import PixelBudget
from extractor.images.files import size_and_mtime
from extractor.images.time_limit import decode_within
from extractor.options import MAX_PIXELS
from extractor.preprocess import Interpolation, Preprocess
from extractor.search.derived import derived_folders
from extractor.view.collection import Collection, Image

__all__ = ["LARGE_EDGE", "MIDDLE_EDGE", "SMALL_EDGE", "Thumbnails"]

SMALL_EDGE = 256  # pixels
MIDDLE_EDGE = 400
LARGE_EDGE = 1024
TILE = 150  # pixels of the shorter edge, as far as possible: a panorama fills a square of the grid
MOST_EDGES = 4  # longest edge of such a thumbnail
# `extract` leaves out folders of this name, so that thumbnails never become images of a store.
FOLDER = ".thumbnails"
IDS_PER_FOLDER = 1000
QUALITY = 85  # of JPEG
FILTER: Interpolation = "hamming"  # 1.3 ms less than lanczos for a photo; needs no torch
MEMORY_BYTES = 64 * 2**20
JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"


class _Kept(NamedTuple):
    """A thumbnail, and the modification time of the file that it was made of."""

    content: bytes
    mtime_ns: int


class Thumbnails:
    """Thumbnails of one store, as JPEGs. Many threads may ask for them.

    An image is decoded with the limits of a run. What an image file holds is never passed on, only
    pixels that were decoded from it.

    Args:
        out: Folder of the store.

    Attributes:
        problems: By id, why images have no thumbnail: a short word and a sentence.
    """

    def __init__(self, out: Path) -> None:
        self.problems: dict[int, tuple[str, str]] = {}
        self._folders = [folder / FOLDER for folder in derived_folders(out)]
        self._budget = PixelBudget(MAX_PIXELS)
        self._recent: OrderedDict[tuple[int, str], _Kept] = OrderedDict()
        self._recent_bytes = 0
        self._lock = threading.Lock()

    def kept(self, collection: Collection, image: Image) -> bytes | None:
        """Return the small thumbnail of an image if it was made before, and its file is the same.

        The file has the size and the time of the index, or else the time of the file that the
        thumbnail was made of: a file that was copied or touched may have the same content.
        """
        found = self._found(image)
        if found is None or not self.is_unchanged(collection, image, found.mtime_ns):
            return None
        self.problems.pop(image.id, None)
        return found.content

    def is_unchanged(
        self, collection: Collection, image: Image, mtime_ns: int | None = None
    ) -> bool:
        """Return whether the file of an image has the size and the time of the index.

        Args:
            collection: The store of the image.
            image: The image.
            mtime_ns: Another time that the file may have.
        """
        file = collection.file_of(image)
        try:
            now = (-1, -1) if file is None else size_and_mtime(os.stat(file))
        except (OSError, ValueError):
            return False
        return now == (image.size, image.mtime_ns) or now[1] == mtime_ns

    def _found(self, image: Image) -> _Kept | None:
        key = (image.id, image.content)
        with self._lock:
            if key in self._recent:
                self._recent.move_to_end(key)
                return self._recent[key]
        for folder in self._folders:
            with contextlib.suppress(OSError), (folder / _name(image)).open("rb") as file:
                found = _Kept(file.read(), os.fstat(file.fileno()).st_mtime_ns)
                # A power cut may leave a part of a file.
                if found.content.startswith(JPEG_START) and found.content.endswith(JPEG_END):
                    self._remember(key, found)
                    return found
        return None

    def make(self, collection: Collection, image: Image, edge: int = SMALL_EDGE) -> bytes:
        """Return a new thumbnail, whose longer edge has ``edge`` pixels.

        It has up to four times as many where the shorter edge would have less than ``TILE`` pixels.
        A small image keeps its size.

        Raises:
            DecodeError: The file is missing, has another content, or cannot be decoded in time.
        """
        try:
            made = self._decoded(collection, image, edge)
        except DecodeError as error:
            self.problems[image.id] = (error.reason, str(error))
            raise
        self.problems.pop(image.id, None)
        if edge == SMALL_EDGE:
            self._remember((image.id, image.content), made)
            self._keep(image, made)
        return made.content

    def _decoded(self, collection: Collection, image: Image, edge: int) -> _Kept:
        from PIL import Image as Pillow

        file = collection.file_of(image)
        if file is None:
            raise DecodeError("outside", "the path leads out of the folder of the images")
        transform = _transform(image, edge)
        pixels = np.empty((*transform.input_size, 3), np.uint8)
        info = decode_within(file, [transform], [pixels], self._budget)
        is_same = (info.size, info.mtime_ns) == (image.size, image.mtime_ns)
        if info.sha256 != image.sha256 if image.sha256 else not is_same:
            raise DecodeError("changed", "the file changed since its row was computed")
        content = io.BytesIO()
        Pillow.fromarray(pixels).save(content, "JPEG", quality=QUALITY)
        return _Kept(content.getvalue(), info.mtime_ns)

    def _remember(self, key: tuple[int, str], made: _Kept) -> None:
        with self._lock:
            before = self._recent.pop(key, None)
            self._recent_bytes += len(made.content) - (len(before.content) if before else 0)
            self._recent[key] = made
            while self._recent_bytes > MEMORY_BYTES:
                self._recent_bytes -= len(self._recent.popitem(last=False)[1].content)

    def _keep(self, image: Image, made: _Kept) -> None:
        """Write a thumbnail; a disk that is full or read-only is no error."""
        for folder in self._folders:
            path = folder / _name(image)
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                handle, partial = tempfile.mkstemp(suffix=".partial", dir=path.parent)
                try:
                    with os.fdopen(handle, "wb") as file:
                        file.write(made.content)
                    os.utime(partial, ns=(made.mtime_ns, made.mtime_ns))
                    os.chmod(partial, 0o644)
                    os.replace(partial, path)
                except BaseException:
                    os.unlink(partial)
                    raise
                return


def _name(image: Image) -> str:
    return f"{image.id // IDS_PER_FOLDER:06d}/{image.id}-{image.content}.jpg"


def _transform(image: Image, edge: int) -> Preprocess:
    """Return a transform to a picture with the aspect ratio of an image."""
    width, height = max(image.width, 1), max(image.height, 1)
    short, long = sorted((width, height))
    scale = min(max(edge / long, min(TILE / short, MOST_EDGES * edge / long)), 1.0)
    size = (max(round(height * scale), 1), max(round(width * scale), 1))
    half = (0.5, 0.5, 0.5)
    return Preprocess(size, "squash", size, FILTER, half, half, (255, 255, 255))
