"""One store as the page shows it: a snapshot, searched, filtered and counted."""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from extractor.errors import StoreError, UsageError
from extractor.images.types import FilePath
from extractor.reading.reader import FeatureStore, shard_table
from extractor.search.knn import Metric
from extractor.search.searcher import Searcher

if TYPE_CHECKING:
    from extractor.api import Extractor

__all__ = ["Collection", "Image", "Match", "Numbers", "image_row", "matcher", "path_list"]

COLUMNS = ["path", "size", "mtime_ns", "width", "height", "sha256"]
FILTERS_KEPT = 8
MAX_FILTER = 1000  # characters

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Image:
    """One image of a store, as its index has it.

    Attributes:
        row: Row in the snapshot.
        id: Id of the row.
        path: Path relative to the root.
        size: Bytes of the file.
        mtime_ns: Modification time of the file.
        width: Width in pixels.
        height: Height in pixels.
        sha256: SHA-256 of the file; empty if the store does not know it.
    """

    row: int
    id: int
    path: str
    size: int
    mtime_ns: int
    width: int
    height: int
    sha256: bytes

    @property
    def content(self) -> str:
        """Name of the content of the file."""
        return self.sha256.hex()[:24] if self.sha256 else f"{self.size}-{self.mtime_ns}"


@dataclass(frozen=True)
class Match:
    """What a search found, the best first.

    Attributes:
        rows: ``(k,)`` int64, rows in the snapshot.
        scores: ``(k,)`` float64.
        method: How the rows were found.
    """

    rows: Numbers
    scores: npt.NDArray[np.float64]
    method: str


class Collection:
    """A snapshot of a store. Many threads may ask it.

    Args:
        store: The store.
        root: Folder where the images are now; None for the one that the store names.
        metric: Metric of searches.
        extractor: Returns what embeds images that are searched for; called for the first of them.
    """

    def __init__(
        self,
        store: FeatureStore,
        *,
        root: str | None = None,
        metric: Metric = "cosine",
        extractor: Callable[[], Extractor] | None = None,
    ) -> None:
        self.store = store
        self.metric: Metric = metric
        self.root = os.path.abspath(root or store.root)
        self.ids = store.ids
        self.failures = store.failures
        self._extractor = extractor
        self._searcher = Searcher(store)
        self._embedder: Searcher | None = None
        self._table = _table_of(store)
        self._searching, self._embedding = threading.Lock(), threading.Lock()
        self._filtering = threading.Lock()
        self._filters: OrderedDict[str, Numbers] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.ids)

    def images(self, rows: Sequence[int] | Numbers) -> list[Image]:
        """Return the images of rows, in order."""
        wanted = np.asarray(rows, np.int64)
        values = self._table.take(wanted).to_pydict()
        values["sha256"] = [digest or b"" for digest in values["sha256"]]
        values["path"] = [os.fsdecode(path) for path in values["path"]]
        columns = zip(*(values[name] for name in COLUMNS), strict=True)
        return [
            Image(row, row_id, *column)
            for row, row_id, column in zip(
                wanted.tolist(), self.ids[wanted].tolist(), columns, strict=True
            )
        ]

    def column(self, name: str) -> list[Any]:
        """Return one column of the index, one value per row."""
        return list(self._table.column(name).to_pylist())

    def image(self, image_id: int) -> Image | None:
        """Return the image of an id; None if the snapshot has none."""
        rows = self.rows_of([image_id] if image_id < 2**63 else [])
        return self.images(rows)[0] if len(rows) else None

    def rows_of(self, ids: Sequence[int]) -> Numbers:
        """Return the rows of those ids that the snapshot has, in order."""
        wanted = np.array(ids, np.int64)
        if not len(self):
            return np.empty(0, np.int64)
        order = self.store._order_of_ids
        at = np.minimum(np.searchsorted(self.ids, wanted, sorter=order), len(self) - 1)
        rows = at if order is None else order[at]
        found: Numbers = rows[self.ids[rows] == wanted]
        return found

    def row_of_path(self, path: str) -> int:
        """Return the row of a path; -1 if there is none."""
        import pyarrow as pa
        import pyarrow.compute as pc

        column = self._table.column("path")
        try:
            name = path.encode() if _is_text(column) else os.fsencode(path)
        except UnicodeEncodeError:
            return -1
        return int(pc.index(column, pa.scalar(name, column.type)).as_py())

    def file_of(self, image: Image) -> FilePath | None:
        """Return the file of an image; None if its path leads out of the root."""
        file = os.path.normpath(os.path.join(self.root, image.path))
        return file if file.startswith(self.root.rstrip("/") + "/") else None

    def matching(self, text: str) -> Numbers | None:
        """Return the rows whose path holds a text, in order; None for all rows.

        Upper and lower case are the same. ``*`` stands for any characters, ``?`` for one.

        Raises:
            UsageError: The text is too long.
        """
        text = text.strip()
        if not text:
            return None
        if len(text) > MAX_FILTER:
            raise UsageError(
                f"filter: got {len(text):,} characters, expected at most {MAX_FILTER:,}"
            )
        with self._filtering:
            if text not in self._filters:
                self._filters[text] = self._find(text)
                while len(self._filters) > FILTERS_KEPT:
                    self._filters.popitem(last=False)
            self._filters.move_to_end(text)
            return self._filters[text]

    def _find(self, text: str) -> Numbers:
        import pyarrow.compute as pc

        column = self._table.column("path")
        if not _is_text(column):  # a name is not UTF-8
            holds = matcher(text)
            mask = np.fromiter((holds(os.fsdecode(path)) for path in column.to_pylist()), bool)
        elif "*" in text or "?" in text:
            found = pc.match_substring_regex(column, f"(?is){_regular_expression(text)}")
            mask = np.asarray(found)
        else:
            mask = np.asarray(pc.match_substring(column, text, ignore_case=True))
        return np.flatnonzero(mask).astype(np.int64)

    def neighbors(self, row: int, k: int) -> Match:
        """Return the rows nearest to a row, without itself.

        Raises:
            ExtractorError: The rows cannot be searched.
        """
        vector = np.asarray(self.store.features[row : row + 1]).reshape(1, -1)
        return self._nearest(vector, k, [row])

    def search(self, content: bytes, k: int) -> Match:
        """Return the rows nearest to an encoded image.

        Raises:
            DecodeError: The image cannot be decoded.
            ExtractorError: The model of the store cannot be loaded.
        """
        from extractor.search.queries import Query

        self._check_rows()
        with self._embedding:  # one image at a time, and one thread loads the model
            if self._embedder is None:
                extractor = self._extractor() if self._extractor else None
                self._embedder = Searcher(self.store, extractor=extractor)
            vectors, errors = self._embedder.embed([Query("the image", image=content)])
        if errors:
            raise errors[0]
        return self._nearest(vectors, k, None)

    def _check_rows(self) -> None:
        if not len(self):
            raise StoreError(f"{self.store.path} holds no rows, so there is nothing to search")

    def _nearest(self, vectors: npt.NDArray[Any], k: int, own: list[int] | None) -> Match:
        if not np.isfinite(vectors).all():
            raise UsageError("the embedding of this image holds NaN or infinity")
        self._check_rows()
        count = min(k, len(self))
        with self._searching:
            hits = self._searcher.nearest(vectors, count, metric=self.metric, own_rows=own)
        found = hits.rows[0] >= 0
        return Match(hits.rows[0][found], hits.scores[0][found], hits.method)


def image_row(image: Image) -> list[Any]:
    """Return an image as the page takes it: id, path, width, height."""
    return [image.id, image.path, image.width, image.height]


def path_list(collection: Collection, ids: Sequence[int]) -> bytes:
    """Return the paths of images as ``extract --list`` takes them.

    Paths are absolute. They end with a zero byte if one of them holds a line break.
    """
    images = collection.images(collection.rows_of(ids))
    paths = [os.fsencode(os.path.join(collection.root, image.path)) for image in images]
    is_plain = not any(b"\n" in path or b"\r" in path for path in paths)
    end = b"\n" if is_plain else b"\0"
    return b"".join(path + end for path in paths)


def _table_of(store: FeatureStore) -> Any:
    """Return the index of a store, with paths as text or else as bytes."""
    import pyarrow as pa

    tables = [shard_table(store, shard, COLUMNS) for shard in store.manifest.shards]
    kind = pa.large_string()
    if any(not _is_text(table.column("path")) for table in tables):
        kind = pa.large_binary()
    fields = [
        ("path", kind),
        *((name, pa.int64()) for name in COLUMNS[1:-1]),
        ("sha256", pa.binary()),
    ]
    schema = pa.schema(fields)
    whole = pa.concat_tables([schema.empty_table(), *(table.cast(schema) for table in tables)])
    return whole.combine_chunks()


def _is_text(column: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(column.type) or pa.types.is_large_string(column.type))


def matcher(text: str) -> Callable[[str], bool]:
    """Return whether a path holds a text with wildcards.

    Parts between ``*`` are searched one after the other. One regular expression for all of them
    may take years, and no other thread could run.
    """
    flags = re.IGNORECASE | re.DOTALL
    parts = [re.compile(_regular_expression(part), flags) for part in text.split("*") if part]

    def holds(path: str) -> bool:
        end = 0
        for part in parts:
            found = part.search(path, end)
            if found is None:
                return False
            end = found.end()
        return True

    return holds


def _regular_expression(text: str) -> str:
    wildcards = {"*": ".*", "?": "."}
    return "".join(wildcards.get(char) or re.escape(char) for char in text)
