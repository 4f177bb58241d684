"""Approximate search: builds, extends and searches the index of a store, with faiss."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from extractor.errors import InstallationError, StoreError, UsageError
from extractor.reading.array import KeptRows, ShardedArray
from extractor.reading.reader import FeatureStore
from extractor.search.derived import (
    KINDS,
    IndexEntry,
    ShardKey,
    check_file,
    covers,
    entries_of,
    publish_index,
    shard_keys,
)
from extractor.search.knn import (
    Features,
    Floats,
    Metric,
    Rows,
    best_of,
    check_metric,
    faiss_module,
    nearest,
    prepared,
    row_blocks,
)
from extractor.store.format import FileEntry
from extractor.text import plural

__all__ = ["BuiltIndex", "StoreIndex", "build_index", "open_index"]

log = logging.getLogger(__name__)

K = 10  # of the recall that is measured
# Queries. The recall of one varies by 0.1 to 0.2, as a graph finds all of its neighbors or none, so
# the standard error is about 0.002.
SAMPLE = 5000
# First effort that is tried. With 16, recall for rows in the graph was 0.004 above that for other
# vectors (50,000 x 128, clustered); with 64, there was no difference beyond the noise.
FIRST_EFFORT = {"flat": 0, "hnsw": 64, "ivf": 1}
# efConstruction of HNSW. With the 40 of faiss, recall was 0.967 for 100,000 x 256 in 200 clusters
# (efSearch 64), with 100 it was 0.997, in 1.5 times the time.
BUILD_EFFORT = 100
LINKS = 32  # of a row in HNSW, on each level but the lowest
# A search descends level by level, and ends in the wrong cluster where a level has few rows of
# each. So a row is on 0.58 levels above the lowest on average, not on 0.03 as by default. That
# gave 0.988 instead of 0.967 in the same test, and took a sixth longer.
LEVEL_SCALE = 1.0
TARGET_RECALL = 0.97
MAX_EFFORT = 1024
MAX_K = 100  # beyond it, recall at 10 says nothing, and HNSW is no faster than exact search
LARGE_STORE = 1_000_000  # rows from which on IVF is the default
BLOCK_ROWS = 16_384
EXTRA = 20  # candidates beyond k, since an index holds vectors in float16
TRAIN_ROWS_PER_LIST = 64
MIN_ROWS_PER_LIST = 39  # faiss warns below
MAX_RETIRED = 0.25  # share of rows in an index that no longer count; beyond it is built anew
HALF_MAX = 60_000  # values that float16 can hold


@dataclass(frozen=True)
class BuiltIndex:
    """What :func:`build_index` did.

    Attributes:
        entry: The index.
        added: Number of rows that were added.
        was_built: Whether it is new, rather than extended or as it was.
    """

    entry: IndexEntry
    added: int
    was_built: bool


class StoreIndex:
    """An index that was opened, with the rows of the store that it holds.

    Args:
        faiss: The library.
        index: The index.
        entry: What is known about it.
        store: The store.
    """

    def __init__(self, faiss: Any, index: Any, entry: IndexEntry, store: FeatureStore) -> None:
        self.entry = entry
        self._faiss = faiss
        self._index = index
        self._store = store
        self._rows = _rows_in_store(entry, store)
        known = set(entry.shards)
        self._others = [n for n, key in enumerate(shard_keys(store.manifest)) if key not in known]
        live = self._rows >= 0
        self._bits = None if live.all() else np.packbits(live, bitorder="little")
        self._selector = None if self._bits is None else faiss.IDSelectorBitmap(self._bits)

    @property
    def new_rows(self) -> int:
        """Number of rows of the store that the index lacks; they are searched exactly."""
        parts = self._store.features.parts
        return sum(len(parts[number]) for number in self._others)

    @property
    def title(self) -> str:
        """Kind, recall and rows that are searched exactly beside it, for people."""
        new = f", {plural(self.new_rows, 'new row')} exactly" if self.new_rows else ""
        return f"{self.entry.title}{new}"

    def candidates(self, queries: Floats, k: int) -> Rows:
        """Return rows of the store that may be the k nearest, ``(q, n)``; -1 for none."""
        rows = self._search(queries, k, self.entry.effort)
        if not self.new_rows:
            return rows
        features, numbers = self._new_features()
        count = min(k, len(features))
        exact = nearest(features, queries, count, metric=self.entry.metric).rows
        return np.concatenate([rows, np.where(exact < 0, -1, numbers[exact])], axis=1)

    def _search(self, queries: Floats, k: int, effort: int) -> Rows:
        """Return candidates from the index, ``(q, n)`` rows of the store."""
        vectors = np.ascontiguousarray(prepared(queries, self.entry.metric), np.float32)
        count = min(k + EXTRA, self._index.ntotal)
        faiss, options = self._faiss, {"sel": self._selector} if self._selector else {}
        if self.entry.kind == "hnsw":
            parameters = faiss.SearchParametersHNSW(efSearch=max(effort, count), **options)
        elif self.entry.kind == "ivf":
            parameters = faiss.SearchParametersIVF(nprobe=effort, **options)
        else:
            parameters = faiss.SearchParameters(**options)
        found = self._index.search(vectors, count, params=parameters)[1]
        return np.where(found < 0, -1, self._rows[found])

    def _new_features(self) -> tuple[ShardedArray, Rows]:
        """Return the rows that the index lacks, and their numbers in the store."""
        features = self._store.features
        starts = np.cumsum([0, *map(len, features.parts)])
        parts = [features.parts[number] for number in self._others]
        numbers = [np.arange(starts[n], starts[n + 1]) for n in self._others]
        array = ShardedArray(parts, row_shape=features.shape[1:], dtype=features.dtype)
        return array, np.concatenate(numbers)

    def with_effort(self, queries: Floats, own: Rows, exact: Rows) -> tuple[int, float]:
        """Return the least effort that reaches the target, and the recall that it has.

        Args:
            queries: ``(q, dim)``.
            own: ``(q,)``, their rows.
            exact: ``(q, k)``, the nearest rows.
        """
        most = MAX_EFFORT if self.entry.kind == "hnsw" else getattr(self._index, "nlist", 0)
        effort = FIRST_EFFORT[self.entry.kind]
        while True:
            best = best_of(
                self._store.features,
                queries,
                self._search(queries, exact.shape[1] + 1, effort),
                exact.shape[1],
                metric=self.entry.metric,
                own_rows=own,
            ).rows
            recall = _overlap(best, exact)
            if recall >= TARGET_RECALL or effort >= most:
                return effort, recall
            effort = min(2 * effort, most)


def _overlap(found: Rows, exact: Rows) -> float:
    """Return the share of rows that were found."""
    hits = sum(len(np.intersect1d(a[a >= 0], b[b >= 0])) for a, b in zip(found, exact, strict=True))
    wanted = int((exact >= 0).sum())
    return hits / wanted if wanted else 1.0


def _rows_in_store(entry: IndexEntry, store: FeatureStore) -> Rows:
    """Return the row in the store of each vector of an index; -1 for retired rows."""
    of_shard: dict[ShardKey, Rows] = {}
    first = 0
    for key, shard in zip(shard_keys(store.manifest), store.manifest.shards, strict=True):
        live = shard.live_mask()
        of_shard[key] = np.where(live, first + np.cumsum(live) - 1, -1)
        first += shard.live_rows
    return np.concatenate([of_shard[key] for key in entry.shards])


def open_index(store: FeatureStore, metric: Metric) -> StoreIndex | None:
    """Open the index of a store that fits best; None if there is none.

    An index of other rows, or whose file was changed, is left out with a warning.
    """
    fitting = []
    for entry in entries_of(store.path):
        if entry.metric != metric:
            continue
        if covers(entry, store.manifest):
            fitting.append(entry)
        else:
            log.warning("%s holds rows that are not in the store; run extract index", entry.path)
    for entry in sorted(fitting, key=_preference):
        faiss = faiss_module()
        if faiss is None:
            log.warning("%s is left out: faiss is not installed", entry.path)
            return None
        opened = _opened(faiss, entry, store)
        if opened is not None:
            return opened
    return None


def _preference(entry: IndexEntry) -> tuple[int, int]:
    """Return a key that sorts the index first which searches use."""
    return -entry.rows, ("hnsw", "ivf", "flat").index(entry.kind)


def _opened(
    faiss: Any, entry: IndexEntry, store: FeatureStore, *, in_memory: bool = False
) -> StoreIndex | None:
    """Open an index; None with a warning if its file cannot be used."""
    problem = check_file(entry.path, entry.file)
    if not problem:
        # Codes and links stay in the file, which no program changes in place.
        flags = 0 if in_memory else getattr(faiss, "IO_FLAG_MMAP_IFC", 0)
        try:
            index = faiss.read_index(str(entry.path), flags)
            if (index.ntotal, index.d) != (entry.rows, entry.dim):
                problem = f"it holds {index.ntotal} vectors of {index.d} values"
        except RuntimeError as error:
            problem = str(error).splitlines()[0]
    if problem:
        log.warning("%s is left out: %s; run extract index", entry.path, problem)
        return None
    return StoreIndex(faiss, index, entry, store)


# ---------------------------------------------------------------------------------------------
# Building


def build_index(
    store: FeatureStore,
    kind: str | None,
    metric: Metric,
    progress: Callable[[str, int, int], None],
) -> BuiltIndex:
    """Build the index of a store, or bring it up to date.

    Rows of new shards are added to an index of the same kind. It is built anew if it holds rows
    that are not in the store, or if many of its rows no longer count.

    Args:
        store: The store.
        kind: ``flat``, ``hnsw`` or ``ivf``; None for that of the present index, or else HNSW below
            a million rows and IVF from there on.
        metric: Metric to search by.
        progress: Called with the phase (``training``, ``adding`` or ``measuring``), the number of
            rows that are done, and how many there are.

    Raises:
        UsageError: An unknown kind or metric.
        InstallationError: faiss is not installed.
        StoreError: The store holds no rows, or the index cannot be written.
    """
    check_metric(metric)
    if kind is not None and kind not in KINDS:
        raise UsageError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")
    faiss = faiss_module()
    if faiss is None:
        raise InstallationError(
            "an index needs faiss; try pip install 'backbone-extractor[search]'"
        )
    if not len(store):
        raise StoreError(f"{store.path} holds no rows, so there is nothing to index")
    before = _present(faiss, store, kind, metric)
    if before is not None and not before.new_rows:
        return BuiltIndex(before.entry, 0, was_built=False)
    keys = shard_keys(store.manifest)
    if before is None:
        kind = kind or ("ivf" if len(store) >= LARGE_STORE else "hnsw")
        progress("training", 0, len(store))
        index = _new_index(faiss, store, kind, metric)
        known: tuple[ShardKey, ...] = ()
    else:
        kind, index, known = before.entry.kind, before._index, before.entry.shards
    new = [key for key in keys if key not in known]
    done, total = 0, sum(rows for _, _, rows in new)
    for block in _file_blocks(store, new, metric):
        progress("adding", done, total)
        index.add(block)
        done += len(block)
    progress("adding", done, total)
    progress("measuring", 0, min(SAMPLE, len(store)))
    entry = IndexEntry(
        folder=store.path,
        kind=kind,
        metric=metric,
        dim=store.dim,
        shards=(*known, *new),
        file=FileEntry("new", 0, ""),
        effort=0,
        recall=1.0,
        sample=0,
        faiss=faiss.__version__,
    )
    entry = _measured(StoreIndex(faiss, index, entry, store), store)
    entry = publish_index(store.path, lambda path: _write(faiss, index, path), entry)
    return BuiltIndex(entry, total, was_built=before is None)


def _present(
    faiss: Any, store: FeatureStore, kind: str | None, metric: Metric
) -> StoreIndex | None:
    """Return the index to bring up to date; None if one has to be built."""
    for entry in sorted(entries_of(store.path), key=_preference):
        if entry.metric != metric or entry.kind != (kind or entry.kind):
            continue
        if not covers(entry, store.manifest):
            continue
        opened = _opened(faiss, entry, store, in_memory=True)
        if opened is not None and np.mean(opened._rows < 0) <= MAX_RETIRED:
            return opened
    return None


def _new_index(faiss: Any, store: FeatureStore, kind: str, metric: Metric) -> Any:
    """Return an empty index, trained if it needs training."""
    is_large = metric != "cosine" and _largest_value(store.features) > HALF_MAX
    code = "Flat" if is_large else "SQfp16"
    lists = max(min(4 * math.isqrt(len(store)), len(store) // MIN_ROWS_PER_LIST), 1)
    name = {"flat": "Flat", "hnsw": f"HNSW{LINKS},{code}", "ivf": f"IVF{lists},{code}"}[kind]
    measure = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    index = faiss.index_factory(store.dim, name, measure)
    if kind == "hnsw":
        index.hnsw.efConstruction = BUILD_EFFORT
        index.hnsw.assign_probas.clear()
        index.hnsw.cum_nneighbor_per_level.clear()
        index.hnsw.set_default_probas(LINKS, LEVEL_SCALE)
    if not index.is_trained:
        if kind == "ivf":  # a store of fewer rows is one list, which needs no training
            faiss.extract_index_ivf(index).cp.min_points_per_centroid = 1
        sample = _sample(store, TRAIN_ROWS_PER_LIST * lists)
        index.train(_vectors(store.features[sample], metric))
    return index


def _largest_value(features: Features) -> float:
    """Return the largest absolute value of all rows; 0 without rows."""
    blocks = row_blocks(features, BLOCK_ROWS)
    return max((float(np.abs(block).max(initial=0.0)) for _, block in blocks), default=0.0)


def _sample(store: FeatureStore, count: int) -> Rows:
    """Return rows in ascending order, the same for the same store."""
    if count >= len(store):
        return np.arange(len(store))
    return np.sort(np.random.default_rng(0).choice(len(store), count, replace=False))


def _vectors(block: npt.NDArray[Any], metric: Metric) -> npt.NDArray[np.float32]:
    """Return rows as faiss takes them, ``(n, dim)``."""
    return np.ascontiguousarray(
        prepared(block.reshape(len(block), -1).astype(np.float32), metric), np.float32
    )


def _file_blocks(
    store: FeatureStore, shards: Sequence[ShardKey], metric: Metric
) -> Iterator[npt.NDArray[np.float32]]:
    """Yield the rows in the files of some shards, with the retired ones."""
    parts = dict(zip(shard_keys(store.manifest), store.features.parts, strict=True))
    for key in shards:
        part = parts[key]
        array = part.whole if isinstance(part, KeptRows) else part
        for start in range(0, len(array), BLOCK_ROWS):
            yield _vectors(array[start : start + BLOCK_ROWS], metric)


def _measured(index: StoreIndex, store: FeatureStore) -> IndexEntry:
    """Choose how hard an index searches, and measure its recall on rows of the store."""
    rows = _sample(store, SAMPLE)
    queries = np.asarray(store.features[rows]).reshape(len(rows), -1).astype(np.float64)
    metric = index.entry.metric
    exact = nearest(store.features, queries, min(K, len(store)), metric=metric, own_rows=rows)
    effort, recall = index.with_effort(queries, rows, exact.rows)
    return replace(index.entry, effort=effort, recall=recall, sample=len(rows))


def _write(faiss: Any, index: Any, path: Path) -> None:
    """Write an index.

    Raises:
        OSError: It cannot be written.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise OSError("faiss opens no file whose path is not UTF-8") from None
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        raise OSError(str(error).splitlines()[0]) from error
