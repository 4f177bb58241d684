"""``find_outliers()``: images that are far from all others, and labels that are probably wrong."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from extractor.analysis.near_pairs import no_progress
from extractor.analysis.unit_rows import Numbers
from extractor.errors import StoreError, UsageError
from extractor.evaluation.labels import Labels, labels_of
from extractor.reading.array import KeptRows, LazyArray
from extractor.reading.reader import FeatureStore
from extractor.search.knn import RowLengths, nearest
from extractor.search.searcher import Searcher
from extractor.text import plural

__all__ = ["DEFAULT_K", "LabelError", "Outlier", "Outliers", "find_outliers"]

DEFAULT_K = 10
# More than this share of the votes must be for another label. The neighbor of rank r has 1/r votes.
# Of 15 planted errors in 300 photos of groceries, 94 % are found; 62 % of the listed images are
# such errors. With one vote each, these are 79 % and 52 % (tf_efficientnet_lite0, k = 10).
MIN_AGREEMENT = 0.5
TINY = 1e-12
# Rows up to which each is compared with all others. Beyond it, an index finds the neighbors, or
# they are those among a sample.
MAX_EXACT = 50_000
SAMPLE_ROWS = 20_000
BLOCK_ROWS = 1024
IMAGES_AT_ONCE = 16_384

Floats: TypeAlias = npt.NDArray[np.float64]
Mask: TypeAlias = npt.NDArray[np.bool_]
Progress: TypeAlias = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Outlier:
    """One image and how far it is from the others.

    >>> outlier = find_outliers("features/resnet50", k=5)[-1]  # doctest: +SKIP
    >>> outlier.rank, len(outlier.neighbors)  # doctest: +SKIP
    (25, 5)

    Attributes:
        row: Row in the store.
        id: Id of the row.
        path: Path of the image, as in ``store.paths``.
        rank: 1 for the image that is furthest from its neighbors.
        distance: Mean cosine distance to the k nearest rows. It depends on the backbone, so compare
            ranks, not distances, between stores.
        neighbors: The nearest rows, nearest first.
        label: Label of the image; None without labels.
        class_rank: Rank among the images of its class; None without labels, or if it has no other.
        class_distance: Mean cosine distance to the k nearest rows of its class; None likewise.
    """

    row: int
    id: int
    path: str
    rank: int
    distance: float
    neighbors: tuple[int, ...]
    label: str | None = None
    class_rank: int | None = None
    class_distance: float | None = None


@dataclass(frozen=True)
class LabelError:
    """An image whose neighbors agree on another label.

    >>> labels = ["cat"] * 24 + ["dog"]  # doctest: +SKIP
    >>> (error,) = find_outliers("features/resnet50", labels).label_errors  # doctest: +SKIP
    >>> error.row, error.label, error.suggested, error.agreement  # doctest: +SKIP
    (24, 'dog', 'cat', 1.0)

    Attributes:
        row: Row in the store.
        id: Id of the row.
        path: Path of the image, as in ``store.paths``.
        label: Label of the image.
        suggested: Label with the most votes of the neighbors.
        agreement: Share of the votes for the suggested label. The neighbor of rank r has 1/r votes.
        support: Share of the votes for the label of the image.
        neighbors: The nearest rows, nearest first.
    """

    row: int
    id: int
    path: str
    label: str
    suggested: str
    agreement: float
    support: float
    neighbors: tuple[int, ...]


@dataclass(frozen=True)
class _Ranking:
    """Values by distance.

    Attributes:
        rows: Rows in the order of their distance, furthest first.
        distances: ``(N,)``, NaN for rows that are left out.
        ranks: ``(N,)``, 0 for rows that are left out.
    """

    rows: Numbers
    distances: Floats
    ranks: Numbers

    @classmethod
    def of(cls, distances: Floats) -> _Ranking:
        known = np.flatnonzero(~np.isnan(distances))
        rows = known[np.lexsort((known, -distances[known]))]
        ranks = np.zeros(len(distances), np.int64)
        ranks[rows] = np.arange(1, len(rows) + 1)
        return cls(rows, distances, ranks)


class Outliers(Sequence[Outlier]):
    """Images of a store, those first that are furthest from their neighbors.

    >>> outliers = find_outliers("features/resnet50", "folders")  # doctest: +SKIP
    >>> sorted(outliers.classes), len(outliers.classes["cats"])  # doctest: +SKIP
    (['cats', 'dogs'], 12)

    Attributes:
        store: The store.
        k: Number of neighbors.
        method: How neighbors were found: ``exact``, an index with its recall, or among a sample.
        left_out: Number of rows with NaN or infinity, which have no neighbors.
        label_errors: Images whose neighbors agree on another label, the most certain first.
        classes: Rows of each class, those first that are furthest from the rest of their class.
    """

    def __init__(
        self,
        store: FeatureStore,
        neighbors: Numbers,
        distances: Floats,
        *,
        method: str,
        labels: Sequence[str] | None = None,
        class_distances: Floats | None = None,
    ) -> None:
        self.store = store
        self.k = neighbors.shape[1]
        self.method = method
        self.left_out = int(np.isnan(distances).sum())
        self._neighbors = neighbors
        self._all = _Ranking.of(distances)
        self._labels = labels
        self._class_distances = class_distances
        self.classes: dict[str, Numbers] = {}
        self._class_ranks = np.zeros(len(distances), np.int64)
        if labels is not None and class_distances is not None:
            for label, rows in _rows_by_label(labels).items():
                ranking = _Ranking.of(class_distances[rows])
                self.classes[label] = rows[ranking.rows]
                self._class_ranks[rows] = ranking.ranks
        self.label_errors: tuple[LabelError, ...] = self._label_errors()

    def __len__(self) -> int:
        """Return the number of images that are ranked."""
        return len(self._all.rows)

    @overload
    def __getitem__(self, index: int) -> Outlier: ...

    @overload
    def __getitem__(self, index: slice) -> list[Outlier]: ...

    def __getitem__(self, index: int | slice) -> Outlier | list[Outlier]:
        """Return the image of one rank, or those of several; index 0 has rank 1."""
        if isinstance(index, slice):
            return self.of_rows(self._all.rows[index])
        return self.of_rows(self._all.rows[[range(len(self))[index]]])[0]

    def __iter__(self) -> Iterator[Outlier]:
        """Return an iterator over all images, furthest first; it reads some at a time."""
        for start in range(0, len(self), IMAGES_AT_ONCE):
            yield from self[start : start + IMAGES_AT_ONCE]

    def of_rows(self, rows: npt.ArrayLike) -> list[Outlier]:
        """Return what is known about some rows of the store."""
        numbers = np.asarray(rows, np.int64)
        paths = self.store._paths_of(numbers)
        return [
            Outlier(
                row,
                int(self.store.ids[row]),
                path,
                int(self._all.ranks[row]),
                float(self._all.distances[row]),
                self._neighbors_of(row),
                *self._in_class(row),
            )
            for row, path in zip(numbers.tolist(), paths, strict=True)
        ]

    def to_mapping(self, top: int | None = None) -> dict[str, Any]:
        """Return what was found, for JSON.

        Args:
            top: Number of images, in all and per class; None for all.
        """
        return {
            "store": str(self.store.path),
            "token": self.store.token,
            "model": self.store.info.model,
            "metric": "cosine",
            "k": self.k,
            "method": self.method,
            "rows": len(self.store),
            "left_out": self.left_out,
            "outliers": [asdict(each) for each in self[:top]],
            "classes": {
                label: [asdict(each) for each in self.of_rows(rows[:top])]
                for label, rows in self.classes.items()
            },
            "label_errors": [asdict(each) for each in self.label_errors],
        }

    def __repr__(self) -> str:
        return f"Outliers({len(self)} images of {self.store!r}, k={self.k})"

    def _neighbors_of(self, row: int) -> tuple[int, ...]:
        return tuple(each for each in self._neighbors[row].tolist() if each >= 0)

    def _in_class(self, row: int) -> tuple[str | None, int | None, float | None]:
        if self._labels is None or self._class_distances is None:
            return None, None, None
        distance = float(self._class_distances[row])
        if math.isnan(distance):
            return self._labels[row], None, None
        return self._labels[row], int(self._class_ranks[row]), distance

    def _label_errors(self) -> tuple[LabelError, ...]:
        if self._labels is None:
            return ()
        votes = _votes(self._labels, self._neighbors)
        wrong = np.flatnonzero(votes.agreement > MIN_AGREEMENT)
        order = np.lexsort((wrong, votes.support[wrong], -votes.agreement[wrong]))
        rows = wrong[order]
        return tuple(
            LabelError(
                row,
                int(self.store.ids[row]),
                path,
                self._labels[row],
                votes.names[votes.suggested[row]],
                float(votes.agreement[row]),
                float(votes.support[row]),
                self._neighbors_of(row),
            )
            for row, path in zip(rows.tolist(), self.store._paths_of(rows), strict=True)
        )


def find_outliers(
    store: FeatureStore | str | os.PathLike[str],
    labels: Labels = None,
    *,
    k: int | None = None,
    progress: Progress | None = None,
) -> Outliers:
    """Rank images by their mean cosine distance to the k nearest others.

    With labels, images are also ranked within their class, and those are listed whose neighbors
    agree on another label.

    >>> outliers = find_outliers("features/resnet50", k=5)  # doctest: +SKIP
    >>> outliers[0].rank, len(outliers[0].neighbors)  # doctest: +SKIP
    (1, 5)

    Args:
        store: The store or its folder.
        labels: None for no labels; ``folders`` for the name of the folder that holds the image; a
            CSV file with the columns ``path`` and ``label``; ``FILE.py:FUNCTION`` or a function,
            which gets a path; a mapping of paths; or one label per row.
        k: Number of neighbors; None for 10, or all others if there are fewer.
        progress: Called with the phase (``comparing``, or ``classes`` for the rows of each class),
            the number of rows that are done, and how many there are.

    Raises:
        UsageError: k is too large, or labels are missing or unknown.
        StoreError: The store is damaged, or has fewer than two rows.
    """
    if not isinstance(store, (FeatureStore, str, os.PathLike)):
        raise UsageError(
            f"store: got {type(store).__name__}, expected a FeatureStore or the folder of one"
        )
    opened = store if isinstance(store, FeatureStore) else FeatureStore.open(store)
    if len(opened) < 2:
        raise StoreError(
            f"{opened.path} holds {plural(len(opened), 'row')}; expected at least two to compare"
        )
    count = _checked_k(k, len(opened) - 1)
    names = None
    if labels is not None:
        names = labels_of(opened, labels)
    usable = _usable(opened)
    show = progress or no_progress
    in_class = None
    with np.errstate(invalid="ignore", over="ignore"):  # rows with infinity
        neighbors, distances, method = _neighbors(opened, usable, count, show)
        if names is not None:
            in_class = _class_distances(opened, names, usable, count, show)
    return Outliers(
        opened, neighbors, distances, method=method, labels=names, class_distances=in_class
    )


def _checked_k(k: int | None, available: int) -> int:
    if k is None:
        return min(DEFAULT_K, available)
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 1 <= k <= available:
        raise UsageError(
            f"k: got {k!r}, expected an integer from 1 to {available:,}, the number of other rows"
        )
    return int(k)


def _usable(store: FeatureStore) -> Mask:
    """Return which rows hold finite numbers only, ``(N,)``."""
    usable = np.empty(len(store), bool)
    for rows, block in store.batches():
        usable[rows] = np.isfinite(block.reshape(len(block), -1)).all(axis=1)
    return usable


def _neighbors(
    store: FeatureStore, usable: Mask, k: int, progress: Progress
) -> tuple[Numbers, Floats, str]:
    """Return the k nearest rows of each, the mean distance to them, and how they were found."""
    neighbors = np.full((len(store), k), -1, np.int64)
    distances = np.full(len(store), np.nan)
    rows = np.flatnonzero(usable)
    searcher = Searcher(store)
    sample = _sample(rows)
    method = "exact"
    if len(rows) > MAX_EXACT:
        first = _vectors(store.features, rows[:1])
        method = searcher.nearest(first, k, own_rows=rows[:1]).method
        method = f"sample of {len(sample):,} rows" if method == "exact" else method
    by_sample = method.startswith("sample")
    array = _vectors(store.features, sample) if by_sample else None
    lengths = RowLengths(len(sample))
    for start in range(0, len(rows), BLOCK_ROWS):
        progress("comparing", start, len(rows))
        chunk = rows[start : start + BLOCK_ROWS]
        vectors = _vectors(store.features, chunk)
        if array is None:
            hits = searcher.nearest(vectors, k, own_rows=chunk, exact=method == "exact")
            found, scores = hits.rows, hits.scores
        else:
            own = _positions(sample, chunk)
            near = nearest(array, vectors, k, own_rows=own, lengths=lengths)
            found, scores = np.where(near.rows < 0, -1, sample[near.rows]), near.scores
        neighbors[chunk] = found
        distances[chunk] = _mean_distance(scores)
    progress("comparing", len(rows), len(rows))
    return neighbors, distances, method


def _class_distances(
    store: FeatureStore, labels: Sequence[str], usable: Mask, k: int, progress: Progress
) -> Floats:
    """Return the mean distance of each row to the k nearest of its class; NaN without any."""
    distances = np.full(len(store), np.nan)
    done = 0
    for members in _rows_by_label(labels).values():
        progress("classes", done, len(store))
        done += len(members)
        rows = members[usable[members]]
        sample = rows if len(rows) <= MAX_EXACT else _sample(rows)
        if len(rows) < 2:
            continue
        of_class = KeptRows(store.features, sample)
        lengths = RowLengths(len(sample))
        for start in range(0, len(rows), BLOCK_ROWS):
            chunk = rows[start : start + BLOCK_ROWS]
            found = nearest(
                of_class,
                _vectors(store.features, chunk),
                min(k, len(sample) - 1),
                own_rows=_positions(sample, chunk),
                lengths=lengths,
            )
            distances[chunk] = _mean_distance(found.scores)
    return distances


def _mean_distance(scores: Floats) -> Floats:
    """Return the mean distance to the rows that were found; NaN if there are none."""
    known = ~np.isnan(scores)
    count = known.sum(axis=1)
    total = np.where(known, 1 - scores, 0).sum(axis=1)
    mean: Floats = np.where(count > 0, np.maximum(total, 0) / np.maximum(count, 1), np.nan)
    return mean


def _vectors(features: LazyArray, rows: Numbers) -> npt.NDArray[Any]:
    block = np.asarray(features[rows])
    return block.reshape(len(block), -1)


def _sample(rows: Numbers) -> Numbers:
    """Return some of the rows in ascending order, the same for the same rows."""
    if len(rows) <= SAMPLE_ROWS:
        return rows
    return np.sort(np.random.default_rng(0).choice(rows, SAMPLE_ROWS, replace=False))


def _positions(sample: Numbers, rows: Numbers) -> Numbers:
    """Return where each row is in a sorted sample; -1 for a row that is not in it."""
    at = np.minimum(np.searchsorted(sample, rows), len(sample) - 1)
    return np.where(sample[at] == rows, at, -1)


def _rows_by_label(labels: Sequence[str]) -> dict[str, Numbers]:
    names, codes = np.unique(np.array(labels, object), return_inverse=True)
    order = np.argsort(codes, kind="stable")
    parts = np.split(order, np.cumsum(np.bincount(codes, minlength=len(names)))[:-1])
    return {str(name): part for name, part in zip(names, parts, strict=True)}


@dataclass(frozen=True)
class _Votes:
    """What the neighbors of each row say about its label.

    Attributes:
        names: All labels.
        suggested: ``(N,)``, position of the other label with the most votes.
        agreement: ``(N,)``, share of the votes for it.
        support: ``(N,)``, share of the votes for the row's own label.
    """

    names: Sequence[str]
    suggested: Numbers
    agreement: Floats
    support: Floats


def _votes(labels: Sequence[str], neighbors: Numbers) -> _Votes:
    names, codes = np.unique(np.array(labels, object), return_inverse=True)
    count = len(codes)
    suggested, agreement, support = np.zeros(count, np.int64), np.zeros(count), np.zeros(count)
    weights = 1 / np.arange(1, neighbors.shape[1] + 1)
    step = max(2**22 // max(len(names), 1), 1)
    for start in range(0, count, step):
        own = codes[start : start + step]
        near = neighbors[start : start + step]
        is_there = near >= 0
        lines = np.arange(len(own))
        flat = (lines[:, None] * len(names) + codes[near])[is_there]
        heavy = np.where(is_there, weights, 0)
        votes = np.bincount(flat, heavy[is_there], minlength=len(own) * len(names))
        votes = votes.reshape(len(own), len(names))
        total = np.maximum(heavy.sum(axis=1), TINY)
        chunk = slice(start, start + len(own))
        support[chunk] = votes[lines, own] / total
        votes[lines, own] = -1
        suggested[chunk] = votes.argmax(axis=1)
        agreement[chunk] = np.maximum(votes[lines, suggested[chunk]], 0) / total
    return _Votes([str(name) for name in names], suggested, agreement, support)
