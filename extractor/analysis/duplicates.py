"""``find_duplicates()``: equal files and nearly equal images of a store, or of two stores."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from extractor.analysis.components import Components
from extractor.analysis.duplicate_groups import Duplicates, GroupTable
from extractor.analysis.kept_pairs import KeptPairs
from extractor.analysis.leaks import leaks_between
from extractor.analysis.near_pairs import (
    EXACT_COMPARISONS,
    MAX_PAIRS,
    NearPairs,
    Progress,
    clustered_pairs,
    exact_pairs,
    no_progress,
)
from extractor.analysis.same_rows import Files, SameRows, first_of_equal
from extractor.analysis.unit_rows import Numbers, UnitRows
from extractor.errors import UsageError
from extractor.reading.array import KeptRows, ShardedArray
from extractor.reading.reader import FeatureStore
from extractor.search.derived import ShardKey, shard_keys

__all__ = ["DEFAULT_THRESHOLD", "find_duplicates"]

DEFAULT_THRESHOLD = 0.98
# Rows from which on pairs are kept for the next time; fewer are compared in a second or two.
MIN_KEPT_ROWS = 10_000


def find_duplicates(
    store: FeatureStore | str | os.PathLike[str],
    *,
    threshold: float = DEFAULT_THRESHOLD,
    against: FeatureStore | str | os.PathLike[str] | None = None,
    keep: bool = True,
    progress: Progress | None = None,
) -> Duplicates:
    """Find images whose files are equal, or whose embeddings are nearly so.

    Without ``against``, a group is all images that a chain of near pairs connects; two of them may
    be less similar than the threshold. With it, a group is one image of the store with its matches
    in the other store, for instance an image of a test set that is also in the training set.

    Nothing is deleted. The near pairs of a large store are kept in its folder ``derived``, so that
    the next call only compares new rows.

    >>> duplicates = find_duplicates("features/resnet50", threshold=0.95)  # doctest: +SKIP
    >>> all(len(group.images) > 1 for group in duplicates)  # doctest: +SKIP
    True

    Args:
        store: The store or its folder.
        threshold: Least cosine similarity of near duplicates, above 0 and at most 1.
        against: Another store of the same backbone.
        keep: Whether near pairs are kept for the next call.
        progress: Called with the phase (``clustering``, ``measuring`` the recall or ``comparing``),
            the number of rows that are done, and how many there are.

    Raises:
        UsageError: The threshold is out of range, or ``against`` is the store itself.
        StoreError: A store is damaged, or the two are of different backbones.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float, np.number)):
        raise UsageError(f"threshold: got {threshold!r}, expected a number above 0, at most 1")
    if not 0 < threshold <= 1:
        raise UsageError(f"threshold: got {threshold}, expected a number above 0, at most 1")
    opened, show = _opened(store, "store"), progress or no_progress
    if against is not None:
        return leaks_between(opened, _opened(against, "against"), float(threshold), show)
    return _duplicates_of_one(opened, float(threshold), show, keep=keep)


def _opened(store: object, name: str) -> FeatureStore:
    if isinstance(store, FeatureStore):
        return store
    if isinstance(store, (str, os.PathLike)):
        return FeatureStore.open(store)
    raise UsageError(
        f"{name}: got {type(store).__name__}, expected a FeatureStore or the folder of one"
    )


# ---------------------------------------------------------------------------------------------
# One store


def _duplicates_of_one(
    store: FeatureStore, threshold: float, progress: Progress, *, keep: bool
) -> Duplicates:
    files = Files.of(store)
    kept = KeptPairs.load(store.path, store.manifest, threshold) if keep else None
    rows = _FileRows.of(store, kept)
    same = SameRows.of(rows.features)
    live = np.flatnonzero(rows.row_of >= 0)
    is_present = np.zeros(len(rows.row_of), bool)
    is_present[same.first[live]] = True
    pairs = _pairs_of_one(rows, same, is_present, threshold, kept, progress)
    is_new = pairs is not kept and pairs.is_complete and len(pairs.left) <= MAX_PAIRS
    if keep and is_new and len(store) >= MIN_KEPT_ROWS:
        pairs.save(store.path)
    near = pairs.similarities >= threshold
    near &= is_present[pairs.left] & is_present[pairs.right]
    components = Components(len(rows.row_of))
    components.join(pairs.left[near], pairs.right[near])
    at = np.empty(len(store), np.int64)  # where each row is in the files
    at[rows.row_of[live]] = live
    first_file = np.where(files.hashed, first_of_equal(files.digests), np.arange(len(store)))
    components.join(same.first[at], same.first[at[first_file]])
    labels = components.find(same.first[at])
    table = _table(labels, UnitRows(rows.features, at), files, first_file)
    return Duplicates(
        store,
        None,
        threshold,
        table,
        [files],
        left_out=int((~same.usable[at]).sum()),
        is_exact=pairs.is_exact,
        recalled=(pairs.compared, pairs.sampled),
    )


@dataclass(frozen=True)
class _FileRows:
    """All rows in the files of a store, retired ones included.

    Attributes:
        shards: The shards in the order of the rows.
        features: ``(n, dim)``.
        row_of: ``(n,)``, the row in the store of each; -1 if it is retired.
    """

    shards: tuple[ShardKey, ...]
    features: ShardedArray
    row_of: Numbers

    @classmethod
    def of(cls, store: FeatureStore, kept: KeptPairs | None) -> _FileRows:
        """Return the rows of a store; those of kept pairs first, so that their numbers hold."""
        manifest, features = store.manifest, store.features
        keys = shard_keys(manifest)
        known = {key: number for number, key in enumerate(kept.shards if kept else ())}
        order = sorted(range(len(keys)), key=lambda at: (known.get(keys[at], len(known)), at))
        starts = np.cumsum([0, *(shard.live_rows for shard in manifest.shards)])
        parts, rows = [], [np.empty(0, np.int64)]
        for at in order:
            part = features.parts[at]
            parts.append(part.whole if isinstance(part, KeptRows) else part)
            live = manifest.shards[at].live_mask()
            rows.append(np.where(live, starts[at] + np.cumsum(live) - 1, -1))
        array = ShardedArray(parts, row_shape=features.shape[1:], dtype=features.dtype)
        return cls(tuple(keys[at] for at in order), array, np.concatenate(rows))


def _pairs_of_one(
    rows: _FileRows,
    same: SameRows,
    is_present: npt.NDArray[np.bool_],
    threshold: float,
    kept: KeptPairs | None,
    progress: Progress,
) -> KeptPairs:
    """Return the near pairs among all rows in the files; those that are kept are not compared.

    If there are too many pairs, they are only some that join the same groups. These hold for the
    rows that were compared, so retired ones are left out.
    """
    chosen = np.flatnonzero(same.usable & (same.first == np.arange(len(same.first))))
    pairs = _compared(rows, chosen, threshold, kept, progress)
    if not pairs.is_complete and (kept is not None or not is_present[chosen].all()):
        pairs = _compared(rows, chosen[is_present[chosen]], threshold, None, progress)
    return pairs


def _compared(
    rows: _FileRows,
    chosen: Numbers,
    threshold: float,
    kept: KeptPairs | None,
    progress: Progress,
) -> KeptPairs:
    """Return the near pairs among some rows.

    Args:
        rows: All rows.
        chosen: Those to compare, in ascending order, each with other bytes.
        threshold: Least similarity.
        kept: Near pairs of the first rows that are known.
        progress: As for :func:`find_duplicates`.
    """
    unit = UnitRows(rows.features, chosen)
    numbers = np.arange(len(chosen))
    if kept is not None:
        old = int(np.searchsorted(chosen, kept.rows))
        new = len(chosen) - old
        if not new and kept.rows == len(rows.features):
            return kept
        if new * old + new**2 // 2 > EXACT_COMPARISONS:
            kept = None
    found = NearPairs(unit, threshold if kept is None else kept.threshold)
    is_exact, recalled = True, (0, 0)
    if kept is not None:
        is_exact, recalled = kept.is_exact, (kept.compared, kept.sampled)
        found.add(exact_pairs(unit, numbers[old:], numbers[:old], kept.threshold, progress))
        found.add(exact_pairs(unit, numbers[old:], None, kept.threshold, progress))
    elif len(chosen) ** 2 // 2 <= EXACT_COMPARISONS:
        found.add(exact_pairs(unit, numbers, None, threshold, progress))
    else:
        pairs, recalled = clustered_pairs(unit, threshold, progress)
        found.add(pairs)
        is_exact = False
    left, right, similarities = found.found()
    left, right = chosen[left], chosen[right]
    if kept is not None:
        left, right = np.append(kept.left, left), np.append(kept.right, right)
        similarities = np.append(kept.similarities, similarities)
    return KeptPairs(
        rows.shards,
        found.threshold,
        *recalled,
        is_exact=is_exact,
        is_complete=found.is_complete,
        left=left,
        right=right,
        similarities=similarities,
    )


def _table(labels: Numbers, rows: UnitRows, files: Files, first_file: Numbers) -> GroupTable:
    """Return the groups of rows that have the same label, ``(N,)``."""
    counts = np.bincount(labels, minlength=1)
    members = np.flatnonzero(counts[labels] > 1)
    pixels = files.width[members] * files.height[members]
    order = np.lexsort((members, files.mtime_ns[members], -pixels, labels[members]))
    members = members[order]
    is_first = np.ones(len(members), bool)
    is_first[1:] = labels[members[1:]] != labels[members[:-1]]
    group = np.cumsum(is_first) - 1
    kept = members[is_first]
    similarities = rows.similarities(kept[group], members)
    sizes = np.bincount(group, minlength=len(kept))
    # Large groups first, then by the row to keep; in a group by falling similarity.
    rank = np.empty(len(kept), np.int64)
    rank[np.lexsort((kept, -sizes))] = np.arange(len(kept))
    order = np.lexsort((members, -similarities, ~is_first, rank[group]))
    same_file = first_file[members] == first_file[kept[group]]
    return GroupTable(
        members[order],
        similarities[order],
        same_file[order],
        np.append(0, np.cumsum(np.sort(sizes)[::-1])).astype(np.int64),
        np.zeros(len(kept), np.int64),
    )
