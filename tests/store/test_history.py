"""Changes between states: the net of several entries, and the file that keeps them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extractor.errors import StoreError
from extractor.store.history import (
    MAX_BYTES,
    MAX_STATES,
    HistoryEntry,
    history_lines,
    id_ranges,
    net_changes,
    parse_history,
    parse_id_ranges,
    trimmed,
)

# A state is a mapping of paths to contents. A content keeps the id that it got at that path.
PATHS = st.sampled_from("abcd")
STATES = st.lists(st.dictionaries(PATHS, st.integers(0, 3), max_size=4), min_size=1, max_size=8)


class Ledger:
    """Assigns ids as a store does: one for each content at a path, and the old one on return."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, int], int] = {}

    def ids(self, state: dict[str, int]) -> dict[str, int]:
        return {
            path: self.known.setdefault((path, content), len(self.known))
            for path, content in state.items()
        }


def entry_between(before: dict[str, int], after: dict[str, int], since: str) -> HistoryEntry:
    changed = [(before[p], after[p]) for p in before.keys() & after.keys() if before[p] != after[p]]
    added = set(after.values()) - set(before.values())
    removed = set(before.values()) - set(after.values())
    return HistoryEntry.of(since, "", added=added, removed=removed, changed=changed)


@given(STATES)
def test_net_changes_lead_from_the_first_state_to_the_last(states: list[dict[str, int]]) -> None:
    ledger = Ledger()
    ids = [ledger.ids(state) for state in states]
    entries = [entry_between(a, b, str(i)) for i, (a, b) in enumerate(itertools.pairwise(ids))]
    changes = net_changes(entries, "now")
    first, last = set(ids[0].values()), set(ids[-1].values())
    assert changes.added.tolist() == sorted(last - first)
    assert changes.removed.tolist() == sorted(first - last)
    assert changes.token == "now"


@given(STATES)
def test_net_changed_pairs_share_a_path(states: list[dict[str, int]]) -> None:
    full = [{path: state.get(path, 0) for path in "abcd"} for state in states]  # no path vanishes
    ledger = Ledger()
    ids = [ledger.ids(state) for state in full]
    entries = [entry_between(a, b, str(i)) for i, (a, b) in enumerate(itertools.pairwise(ids))]
    pairs = {tuple(pair) for pair in net_changes(entries, "").changed.tolist()}
    expected = {(ids[0][p], ids[-1][p]) for p in "abcd" if ids[0][p] != ids[-1][p]}
    assert pairs == expected


def test_net_changes_report_a_move_once() -> None:
    moves = [HistoryEntry.of("", "", moved=[4]), HistoryEntry.of("", "", moved=[4, 9])]
    assert net_changes(moves, "").moved.tolist() == [4, 9]


def test_net_changes_count_no_move_of_a_new_or_removed_row() -> None:
    entries = [
        HistoryEntry.of("", "", added=[4], moved=[1]),
        HistoryEntry.of("", "", removed=[1], moved=[4]),
    ]
    changes = net_changes(entries, "")
    assert (changes.added.tolist(), changes.removed.tolist()) == ([4], [1])
    assert changes.moved.tolist() == []


def test_row_that_comes_back_is_neither_added_nor_removed() -> None:
    entries = [HistoryEntry.of("", "", removed=[3]), HistoryEntry.of("", "", added=[3])]
    changes = net_changes(entries, "")
    assert (len(changes.added), len(changes.removed)) == (0, 0)
    assert changes.moved.tolist() == [3]  # its path may be another one


def test_changes_are_false_only_if_nothing_changed() -> None:
    assert not net_changes([], "t")
    assert net_changes([HistoryEntry.of("", "", moved=[1])], "t")


@given(st.sets(st.integers(0, 2**40), max_size=30))
def test_id_ranges_are_parsed_back(ids: set[int]) -> None:
    assert parse_id_ranges(id_ranges(ids)).tolist() == sorted(ids)


@given(st.integers(0, 2**40), st.integers(1, 10_000))
@settings(max_examples=20)
def test_consecutive_ids_are_one_range(start: int, count: int) -> None:
    text = id_ranges(np.arange(start, start + count))
    assert text == (f"{start}-{start + count - 1}" if count > 1 else f"{start}")


@pytest.mark.parametrize("text", ["3-1", "2,1", "0-2,2", "x", "1--2", "-1", "1;2"])
def test_damaged_ranges_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"ids|invalid literal"):
        parse_id_ranges(text)


def test_history_is_parsed_back() -> None:
    entries = [
        HistoryEntry.of("", "2026-01-01T00:00:00+00:00", added=range(5)),
        HistoryEntry.of("ab", "t", added=[5], removed=[2], moved=[3], changed=[(2, 5)]),
    ]
    content = history_lines(entries)
    assert content.isascii()
    assert content.count(b"\n") == 2
    assert history_lines(parse_history(content, "f")) == content
    assert parse_history(b"", "f") == []


@pytest.mark.parametrize(
    "line", [b"{}", b"[]", b"3", b"{", b'{"since": "", "created": "", "added": 3}']
)
def test_damaged_history_is_refused(line: bytes) -> None:
    with pytest.raises(StoreError, match=r"OUT/history\.jsonl is damaged"):
        parse_history(line + b"\n", "OUT/history.jsonl")


def test_history_keeps_the_last_states() -> None:
    entries = [HistoryEntry.of(str(i), "") for i in range(MAX_STATES + 5)]
    assert [entry.since for entry in trimmed(entries)] == [str(i) for i in range(5, MAX_STATES + 5)]


def test_history_keeps_one_state_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_BYTES > 10_000
    monkeypatch.setattr("extractor.store.history.MAX_BYTES", 100)
    entries = [HistoryEntry.of(str(i), "", added=range(0, 200, 2)) for i in range(3)]
    assert [entry.since for entry in trimmed(entries)] == ["2"]
