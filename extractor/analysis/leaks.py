"""Images of one store that are also in another, such as a test set and a training set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from extractor.analysis.duplicate_groups import Duplicates, GroupTable
from extractor.analysis.near_pairs import (
    EXACT_COMPARISONS,
    MAX_PAIRS,
    Pairs,
    Progress,
    clustered_pairs,
    exact_pairs,
)
from extractor.analysis.same_rows import Files, SameRows, first_of_equal
from extractor.analysis.unit_rows import Numbers, UnitRows
from extractor.reading.groups import StoreGroup
from extractor.reading.reader import FeatureStore

__all__ = ["leaks_between"]

MAX_MATCHES = 20  # images of the other store in one group

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


def leaks_between(
    store: FeatureStore, other: FeatureStore, threshold: float, progress: Progress
) -> Duplicates:
    """Return a group for each image of a store that has matches in another store.

    Args:
        store: The store.
        other: The other store.
        threshold: Least cosine similarity.
        progress: As for :func:`find_duplicates`.

    Raises:
        StoreError: The stores are of different backbones.
        UsageError: They are the same.
    """
    both = StoreGroup([store, other])
    same = SameRows.of(both.features)
    chosen = np.unique(same.first[same.usable])
    rows = UnitRows(both.features, chosen)
    in_store = np.isin(chosen, same.first[: len(store)])
    sizes = np.bincount(same.first[len(store) :], minlength=len(both))[chosen]
    in_other = sizes > 0
    matches = _Matches(rows, sizes, threshold)
    equal = np.flatnonzero(in_store & in_other)
    matches.add([(equal, equal)])
    left, right = np.flatnonzero(in_store), np.flatnonzero(in_other)
    is_exact, recalled = len(left) * len(right) <= EXACT_COMPARISONS, (0, 0)
    if is_exact:
        pairs = exact_pairs(rows, left, right, threshold, progress)
    else:
        pairs, recalled = clustered_pairs(rows, threshold, progress)
    matches.add(_across(pairs, in_store, in_other, is_ordered=is_exact))
    matches.trim()
    files = [Files.of(store), Files.of(other)]
    table = _Expansion(same.first, chosen, files, len(store)).table(matches, both)
    return Duplicates(
        store,
        other,
        threshold,
        table,
        files,
        left_out=int((~same.usable[: len(store)]).sum()),
        is_exact=is_exact,
        recalled=recalled,
    )


def _across(
    pairs: Iterable[Pairs], in_store: Mask, in_other: Mask, *, is_ordered: bool
) -> Iterator[Pairs]:
    """Yield pairs of a row of the store and one of the other; a row may be in both."""
    for left, right in pairs:
        orders = [(left, right)] if is_ordered else [(left, right), (right, left)]
        for ours, theirs in orders:
            kept = in_store[ours] & in_other[theirs] & (ours != theirs)
            if kept.any():
                yield ours[kept], theirs[kept]


class _Matches:
    """The most similar rows of the other store for each row of the store.

    Args:
        rows: The rows.
        sizes: ``(n,)``, how many rows of the other store have the bytes of each.
        threshold: Least similarity.
    """

    def __init__(self, rows: UnitRows, sizes: Numbers, threshold: float) -> None:
        self.totals = np.zeros(len(rows), np.int64)
        self._sizes = sizes
        self.left = self.right = np.empty(0, np.int64)
        self.similarities: Floats = np.empty(0)
        self._rows = rows
        self._threshold = threshold
        self._new: list[tuple[Numbers, Numbers, Floats]] = []
        self._count = 0

    def add(self, candidates: Iterable[Pairs]) -> None:
        """Add those pairs that reach the threshold."""
        for left, right in candidates:
            similarities = self._rows.similarities(left, right)
            # Rows of the same bytes are equal, whatever the rounding.
            similarities[left == right] = 1
            near = similarities >= self._threshold
            self._new.append((left[near], right[near], similarities[near]))
            np.add.at(self.totals, left[near], self._sizes[right[near]])
            self._count += int(near.sum())
            if self._count > MAX_PAIRS:
                self.trim()

    def trim(self) -> None:
        """Keep the best matches of each row."""
        found = [(self.left, self.right, self.similarities), *self._new]
        left, right, similarities = (np.concatenate(part) for part in zip(*found, strict=True))
        order = np.lexsort((right, -similarities, left))
        left, right, similarities = left[order], right[order], similarities[order]
        kept = np.arange(len(left)) - np.searchsorted(left, left) <= MAX_MATCHES
        self.left, self.right, self.similarities = left[kept], right[kept], similarities[kept]
        self._new.clear()
        self._count = 0


class _Expansion:
    """From rows that differ to all rows of both stores.

    Args:
        first: ``(N,)``, the first row with the same bytes.
        chosen: Rows that were compared.
        files: Files of both stores.
        count: Number of rows of the store.
    """

    def __init__(self, first: Numbers, chosen: Numbers, files: list[Files], count: int) -> None:
        self._first = first
        self._chosen = chosen
        self._count = count
        digests = np.concatenate([each.digests for each in files])
        hashed = np.concatenate([each.hashed for each in files])
        self._file = np.where(hashed, first_of_equal(digests), np.arange(len(hashed)))
        self._by_row = _Inverse(first[count:])
        self._by_file = _Inverse(self._file[count:])

    def table(self, matches: _Matches, both: StoreGroup) -> GroupTable:
        """Return a group for each row of the store with matches, in the order of the rows."""
        pairs = _Inverse(matches.left)
        number_of = {row: number for number, row in enumerate(self._chosen.tolist())}
        is_near = np.isin(self._first[: self._count], self._chosen[matches.left])
        is_equal = np.isin(self._file[: self._count], self._file[self._count :])
        rows = np.flatnonzero(is_near | is_equal).tolist()
        others, omitted = [], []
        for row in rows:
            number = number_of.get(int(self._first[row]), -1)
            same_file = self._by_file.of(int(self._file[row]))
            right = matches.right[pairs.of(number)]
            near = [self._by_row.of(int(self._chosen[each])) for each in right]
            # Equal files first; the others by falling similarity.
            found = list(dict.fromkeys(np.concatenate([same_file, *near]).tolist()))
            others.append([each + self._count for each in found[:MAX_MATCHES]])
            total = int(matches.totals[number]) if len(right) else 0
            total += len(np.setdiff1d(same_file, np.concatenate([same_file[:0], *near])))
            omitted.append(total - len(others[-1]))
        counts = [1 + len(each) for each in others]
        members = np.array(
            [each for row, near in zip(rows, others, strict=True) for each in (row, *near)],
            np.int64,
        )
        heads = np.repeat(np.array(rows, np.int64), np.array(counts, np.int64))
        unit = UnitRows(both.features, np.arange(len(both)))
        return GroupTable(
            members,
            unit.similarities(heads, members),
            self._file[heads] == self._file[members],
            np.append(0, np.cumsum(counts)).astype(np.int64),
            np.array(omitted, np.int64),
        )


class _Inverse:
    """Positions of each value of an array."""

    def __init__(self, values: Numbers) -> None:
        self._order = np.argsort(values, kind="stable")
        self._values = values[self._order]

    def of(self, value: int) -> Numbers:
        """Return the positions of a value in ascending order, ``(n,)``."""
        start, end = np.searchsorted(self._values, [value, value + 1])
        return self._order[start:end]
