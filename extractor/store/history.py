"""Changes between the states of a store, by the ids of its rows: ``history.jsonl``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from extractor.errors import StoreDamagedError

__all__ = [
    "Changes",
    "HistoryEntry",
    "are_in",
    "difference",
    "history_lines",
    "id_ranges",
    "net_changes",
    "parse_history",
    "parse_id_ranges",
    "trimmed",
]

# A store keeps its last states. A reader that missed more of them does a full sync.
MAX_STATES = 100
MAX_BYTES = 16 * 2**20

Ids = npt.NDArray[np.int64]


def id_ranges(ids: Iterable[int]) -> str:
    """Return ids as text, in ascending order.

    >>> id_ranges([7, 0, 1, 2])
    '0-2,7'
    """
    values = _sorted_ids(ids)
    if not len(values):
        return ""
    starts = np.concatenate([[True], np.diff(values) > 1])
    firsts = values[starts].tolist()
    lasts = values[np.concatenate([starts[1:], [True]])].tolist()
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(firsts, lasts, strict=True))


def parse_id_ranges(text: str) -> Ids:
    """Return the ids that :func:`id_ranges` wrote, ascending.

    Raises:
        ValueError: The text has another form.
    """
    pieces: list[Ids] = []
    last = -1
    for part in filter(None, text.split(",")):
        first, dash, end = part.partition("-")
        start, stop = int(first), int(end if dash else first) + 1
        if not last < start < stop:
            raise ValueError(f"got ids {part!r} after {last}, expected ascending ranges")
        pieces.append(np.arange(start, stop, dtype=np.int64))
        last = stop - 1
    return np.concatenate(pieces) if pieces else np.empty(0, np.int64)


@dataclass(frozen=True)
class HistoryEntry:
    """What one publication changed.

    Attributes:
        since: Token of the state before; empty if there was none.
        created: When the state was published, ISO 8601 in UTC.
        added: ``(n,)`` int64, ids that count now and did not before, ascending.
        removed: ``(n,)`` int64, ids that counted before and do not now, ascending.
        moved: ``(n,)`` int64, ids that counted before and now, under another path now.
        changed: ``(n, 2)`` int64, pairs of a removed id and the added id at the same path.
    """

    since: str
    created: str
    added: Ids
    removed: Ids
    moved: Ids
    changed: Ids

    @classmethod
    def of(
        cls,
        since: str,
        created: str,
        *,
        added: Iterable[int] = (),
        removed: Iterable[int] = (),
        moved: Iterable[int] = (),
        changed: Iterable[tuple[int, int]] = (),
    ) -> HistoryEntry:
        """Return an entry of ids in any order."""
        pairs = np.array(sorted(changed), np.int64).reshape(-1, 2)
        return cls(
            since, created, _sorted_ids(added), _sorted_ids(removed), _sorted_ids(moved), pairs
        )

    def to_line(self) -> bytes:
        """Return one line of JSON in ASCII."""
        content = {
            "since": self.since,
            "created": self.created,
            "added": id_ranges(self.added),
            "removed": id_ranges(self.removed),
            "moved": id_ranges(self.moved),
            "changed": self.changed.tolist(),
        }
        return json.dumps(content, ensure_ascii=True).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> HistoryEntry:
        """Parse what :meth:`to_line` wrote.

        Raises:
            ValueError: The line has another form.
        """
        try:
            content = json.loads(line)
            return cls(
                str(content["since"]),
                str(content["created"]),
                parse_id_ranges(content["added"]),
                parse_id_ranges(content["removed"]),
                parse_id_ranges(content["moved"]),
                np.array(content["changed"], np.int64).reshape(-1, 2),
            )
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"a damaged line: {error}") from error


@dataclass(frozen=True)
class Changes:
    """Difference between an earlier state of a store and the present one.

    An index that removes the rows of :attr:`removed` and adds those of :attr:`added` is in sync.
    An image whose content changed counts in both, since its new content has a new id.

    >>> from extractor import FeatureStore  # doctest: +SKIP
    >>> changes = FeatureStore.open("features/resnet50").changes_since("")  # doctest: +SKIP
    >>> changes.added[:3], len(changes.removed), bool(changes)  # doctest: +SKIP
    (array([0, 1, 2]), 0, True)

    Attributes:
        token: Token of the present state, for the next call.
        added: ``(n,)`` int64, ids that are new, ascending.
        removed: ``(n,)`` int64, ids that are no longer in the store, ascending.
        changed: ``(n, 2)`` int64, pairs of a removed id and of the added id that took its path.
        moved: ``(n,)`` int64, ids whose path may differ; their vectors are the same.
    """

    token: str
    added: Ids
    removed: Ids
    changed: Ids
    moved: Ids

    def __bool__(self) -> bool:
        """Return whether anything changed."""
        return bool(len(self.added) or len(self.removed) or len(self.moved))


def net_changes(entries: Iterable[HistoryEntry], token: str) -> Changes:
    """Return the difference between the state before the first entry and that after the last.

    Args:
        entries: Consecutive entries, oldest first.
        token: Token of the state after the last entry.
    """
    # Arrays, since a set of numbers takes ten times their memory.
    added = removed = moved = np.empty(0, np.int64)
    successor: dict[int, int] = {}  # id at the start -> id at the same path now
    origin: dict[int, int] = {}  # the reverse
    for entry in entries:
        removed = _union(removed, difference(entry.removed, added))
        added, moved = difference(added, entry.removed), difference(moved, entry.removed)
        back = entry.added[are_in(entry.added, removed)]  # perhaps under another path
        removed, moved = difference(removed, back), _union(moved, back)
        added = _union(added, difference(entry.added, back))
        for old, new in entry.changed.tolist():
            first = origin.pop(old, old)
            successor[first], origin[new] = new, first
        moved = _union(moved, difference(entry.moved, added))
    pairs = np.array(sorted(successor.items()), np.int64).reshape(-1, 2)
    pairs = pairs[are_in(pairs[:, 0], removed) & are_in(pairs[:, 1], added)]
    return Changes(token, added, removed, pairs, moved)


def are_in(ids: Ids, known: Ids) -> npt.NDArray[np.bool_]:
    """Return whether each id is among the known ones.

    Args:
        ids: ``(n,)``.
        known: Ascending.

    Returns:
        ``(n,)``
    """
    if not len(known):
        return np.zeros(len(ids), bool)
    at = np.searchsorted(known, ids)
    found: npt.NDArray[np.bool_] = known[np.minimum(at, len(known) - 1)] == ids
    return found


def difference(ids: Ids, gone: Ids) -> Ids:
    """Return the ids that are not among those that are gone; both are ascending."""
    if len(gone) >= len(ids):
        return ids[~are_in(ids, gone)]
    few = gone[are_in(gone, ids)]
    return np.delete(ids, np.searchsorted(ids, few)) if len(few) else ids


def _union(ids: Ids, more: Ids) -> Ids:
    """Return two ascending arrays as one, in which no id occurs twice."""
    new = difference(more, ids)
    if not len(ids):
        return new
    return np.insert(ids, np.searchsorted(ids, new), new) if len(new) else ids


def trimmed(entries: Sequence[HistoryEntry]) -> list[HistoryEntry]:
    """Return the entries that a store keeps: the last ones within the limits, at least one."""
    kept: list[HistoryEntry] = []
    size = 0
    for entry in reversed(entries[-MAX_STATES:]):
        size += len(entry.to_line())
        if kept and size > MAX_BYTES:
            break
        kept.append(entry)
    return kept[::-1]


def history_lines(entries: Iterable[HistoryEntry]) -> bytes:
    """Return the content of ``history.jsonl``: one JSON object per line, oldest first."""
    return b"".join(entry.to_line() for entry in entries)


def parse_history(content: bytes, name: str) -> list[HistoryEntry]:
    """Parse what :func:`history_lines` wrote.

    Args:
        content: Bytes of the file.
        name: Path of the file, for error messages.

    Raises:
        StoreDamagedError: The content has another form.
    """
    try:
        return [HistoryEntry.from_line(line) for line in content.splitlines()]
    except ValueError as error:
        raise StoreDamagedError(f"{name} is damaged: {error}") from error


def _sorted_ids(ids: Iterable[Any]) -> Ids:
    values = ids if isinstance(ids, np.ndarray) else np.fromiter(ids, np.int64)
    if values.dtype == np.int64 and (values[1:] > values[:-1]).all():
        return values
    return np.unique(values.astype(np.int64, copy=False))
