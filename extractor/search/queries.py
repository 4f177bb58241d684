"""What may be searched for: vectors, rows of the store, and images."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from extractor.errors import UsageError
from extractor.images.listing import list_images
from extractor.reading.rows import Rows
from extractor.text import plural

__all__ = ["Names", "Query", "as_vectors", "queries_of"]

ROW = re.compile(r"row:(-?\d+)")


@dataclass(frozen=True)
class Query:
    """An image to search for.

    Attributes:
        name: How messages and results name it.
        row: Its row in the store; -1 if it has none.
        image: The image to embed; None if it has a row.
        from_folder: Whether it was found in a folder, so that its user did not name it.
    """

    name: str
    row: int = -1
    image: Any = None
    from_folder: bool = False


def as_vectors(queries: object) -> npt.NDArray[Any] | None:
    """Return queries that are vectors, ``(q, ...)``; None if they are images.

    Numbers of any type but uint8 are vectors. A single vector is one query.

    Raises:
        UsageError: A store, whose vectors may be of another model; or a tensor of a GPU.
    """
    if isinstance(queries, Rows):
        raise UsageError(
            f"queries: got {type(queries).__name__}, expected vectors or images; if both were made "
            "with the same backbone, try its .features"
        )
    is_array = hasattr(queries, "__array__") and not hasattr(queries, "getbands")
    if not is_array and not _is_list_of_numbers(queries):
        return None
    try:
        array = np.asarray(queries)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"queries: expected vectors of one length on the CPU ({error})") from error
    if array.dtype == np.uint8 or array.dtype.kind not in "fiu":
        return None
    return array[None] if array.ndim == 1 else array


def _is_list_of_numbers(queries: object) -> bool:
    first: Any = queries
    while isinstance(first, (list, tuple)) and first:
        first = first[0]
    if first is queries:
        return False
    if isinstance(first, np.ndarray) or hasattr(first, "detach"):
        return not str(first.dtype).endswith("uint8")
    return isinstance(first, (int, float, np.number)) and not isinstance(first, (bool, np.uint8))


def _is_picture(image: object) -> bool:
    """Return whether a value is one image in memory."""
    is_array = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim < 4
    return is_array or hasattr(image, "getbands") or hasattr(image, "read")


def queries_of(rows: Rows, images: object) -> list[Query]:
    """Return queries of a caller's images; a path in the store stands for its row.

    Raises:
        UsageError: They are no images.
    """
    if isinstance(images, (str, bytes, os.PathLike)) or _is_picture(images):
        images = [images]
    if not isinstance(images, Iterable) or isinstance(images, (set, frozenset, Mapping)):
        raise UsageError(
            f"queries: got {type(images).__name__}, expected vectors, or a list of paths or images"
        )
    names = Names(rows)
    return [names.query_of(image, number) for number, image in enumerate(images)]


class Names:
    """Finds the rows of names: paths in a store, image files, and ``row:17``.

    Args:
        rows: A store.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def query_of(self, image: object, number: int) -> Query:
        """Return the query of an image that a caller passes in.

        Raises:
            UsageError: A path of no file, which the store does not hold either.
        """
        if not isinstance(image, (str, os.PathLike)):
            return Query(f"query {number}", image=image)
        name = os.fspath(image)
        row = self._row_of(name)
        if row < 0 and not os.path.exists(name):
            raise UsageError(f"{name}: no such image, and no such path in the store")
        return Query(name, row) if row >= 0 else Query(name, image=image)

    def queries_of_word(self, word: str) -> list[Query]:
        """Return the queries of a folder, or of what :meth:`query_of_word` accepts.

        Raises:
            UsageError: The word is none of these.
            SourceError: A folder holds no images.
        """
        if not os.path.isdir(word) or word in self._rows:
            return [self.query_of_word(word)]
        listed = list_images(word)
        paths = [os.fsdecode(listed.full_path(number)) for number in range(len(listed))]
        return [Query(p, self._row_of_file(p), p, from_folder=True) for p in paths]

    def query_of_word(self, word: str) -> Query:
        """Return the query of ``row:17``, of a path in the store or of an image file.

        Raises:
            UsageError: The word is none of these.
        """
        rows = self._rows
        if match := ROW.fullmatch(word):
            row = int(match[1])
            if not -len(rows) <= row < len(rows):
                raise UsageError(
                    f"{word}: the store has {plural(len(rows), 'row')}, counted from 0"
                )
            row %= len(rows)
            return Query(rows._paths_of(np.array([row]))[0], row)
        row = self._row_of(word)
        if row >= 0:
            return Query(rows._paths_of(np.array([row]))[0], row)
        if not os.path.exists(word):
            raise UsageError(
                f"{word}: no such image, and no such path in the store; expected an image, a "
                "folder, a path as the store has it, or row:NUMBER"
            )
        if os.path.isdir(word):
            raise UsageError(f"{word}: is a folder, expected one image")
        return Query(word, image=word)

    def _row_of(self, path: str) -> int:
        """Return the row of a path in the store, or of a file that did not change; else -1."""
        if not os.path.isabs(path) and path in self._rows:
            return self._rows.index_of(path)
        return self._row_of_file(path)

    def _row_of_file(self, path: str) -> int:
        """Return the row of an image file; -1 if it has none or changed since it was embedded."""
        try:
            row = self._rows.index_of(os.path.abspath(path))
            status = os.stat(path)
        except (KeyError, OSError, ValueError):
            return -1
        sizes, times = self._columns
        return row if (sizes[row], times[row]) == (status.st_size, status.st_mtime_ns) else -1

    @functools.cached_property
    def _columns(self) -> tuple[list[int], list[int]]:
        """Size and modification time of the image of each row."""
        return self._rows.column("size"), self._rows.column("mtime_ns")
