"""The plan of a run, compared with a slow and simple model that takes one image at a time."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import extractor.paths as paths_module
import extractor.store.plan as plan_module
from extractor.paths import PackedPaths
from extractor.store.failures import FailureRecord
from extractor.store.index import Images
from extractor.store.plan import Plan, Sight, Snapshot, StoredImages, plan_run

EXAMPLES = max(int(os.environ.get("EXTRACTOR_TEST_EXAMPLES", "0")), 300)
SETTINGS = settings(deadline=None, derandomize=True, max_examples=EXAMPLES, database=None)


class File(NamedTuple):
    """An image as it is now."""

    size: int
    mtime: int
    digest: bytes = b""
    sight: Sight = Sight.READABLE
    decodable: bool = False


class Row(NamedTuple):
    """An image as it was when its row was computed, and whether the row counted."""

    size: int
    mtime: int
    digest: bytes = b""
    counted: bool = True


@dataclass(frozen=True)
class Case:
    """A folder and a store, as dictionaries by path; a shard that is new has no mask."""

    files: dict[bytes, File]
    shards: dict[int, dict[bytes, Row]]
    failures: Sequence[FailureRecord] = ()
    new_failures: Sequence[FailureRecord] = ()
    new_shards: frozenset[int] = frozenset()
    content: bool = False
    keep_missing: bool = False
    retry: bool = False
    others: Mapping[bytes, Sight] = field(default_factory=dict)  # not requested; the rest is gone
    unlisted: Sequence[bytes] = ()
    retire: bool = False
    vanished: int = 0
    excluded: frozenset[bytes] = frozenset()
    many: int = 10
    share: float = 0.1
    dense: int = 4
    block: int = 0  # paths in a packed block; 0 for a list

    def sight(self, path: bytes) -> Sight:
        return self.files[path].sight if path in self.files else self.others.get(path, Sight.GONE)

    def snapshot(self) -> Snapshot:
        paths = sorted(self.files)
        files = [self.files[path] for path in paths]
        return Snapshot(
            self.packed(paths),
            np.array([file.size for file in files], np.int64),
            np.array([file.mtime for file in files], np.int64),
            lambda paths: [self.sight(path) for path in paths],
            lambda places: [files[i].digest for i in places],
            lambda i: files[i].decodable,
            self.unlisted,
            self.excluded.__contains__,
            self.content,
        )

    def stored(self) -> StoredImages:
        shards = {
            number: Images(
                self.packed(rows),
                np.array([row.size for row in rows.values()], np.int64),
                np.array([row.mtime for row in rows.values()], np.int64),
                [row.digest for row in rows.values()],
            )
            for number, rows in self.shards.items()
        }
        live = {
            number: np.array([row.counted for row in rows.values()], bool)
            for number, rows in self.shards.items()
            if number not in self.new_shards
        }
        return StoredImages(shards, live, self.failures, self.new_failures, self.vanished)

    def packed(self, paths: Iterable[bytes]) -> Sequence[bytes]:
        return PackedPaths(paths) if self.block else list(paths)

    def plan(self) -> Plan:
        limits = {"MANY_VANISHED": self.many, "LARGE_SHARE": self.share, "DENSE": self.dense}
        with (
            mock.patch.multiple(plan_module, **limits),
            mock.patch.object(paths_module, "BLOCK", self.block),
        ):
            return plan_run(
                self.snapshot(),
                self.stored(),
                keep_missing=self.keep_missing,
                retry=self.retry,
                retire=self.retire,
            )

    def counted(self, shard: int, path: bytes) -> bool:
        return shard in self.new_shards or self.shards[shard][path].counted


def as_dict(case: Case, made: Plan) -> dict[str, Any]:
    """A plan in terms of paths."""
    paths = sorted(case.files)
    live = {
        (number, path)
        for number, rows in case.shards.items()
        for path, counts in zip(rows, made.live[number].tolist(), strict=True)
        if counts
    }
    assert set(made.live) == set(case.shards)
    moves = {
        (number, list(case.shards[number])[row]): move
        for number, rows in made.moves.items()
        for row, move in rows.items()
    }
    for (_, before), move in moves.items():
        now = case.files[move.path]
        assert move == (move.path, now.size, now.mtime, move.path != before)
    return {
        "todo": [paths[i] for i in made.todo],
        "live": live,
        "failures": list(made.failures),
        "missing": list(made.missing),
        "gone": made.gone,
        "changed": made.changed,
        "rows": made.rows,
        "unseen": made.unseen,
        "vanished": made.vanished,
        "moves": {row: move.path for row, move in moves.items()},
        "moved": made.moved,
    }


def slow_plan(case: Case) -> dict[str, Any]:
    """What the plan must be."""

    def is_same(path: bytes, row: Row) -> bool:
        now = case.files[path]
        if case.content:
            return bool(now.digest) and now.digest == row.digest
        return (now.size, now.mtime) == (row.size, row.mtime)

    def stands(failure: FailureRecord, fresh: bool) -> bool:
        now = case.files[failure.path]
        if (now.size, now.mtime) != (failure.size, failure.mtime_ns):
            return False
        if fresh:
            return True
        if case.retry or failure.reason in ("out-of-memory", "timeout"):
            return False
        return not (failure.reason in ("unreadable", "not-a-file") and now.sight is Sight.READABLE)

    def is_unlisted(path: bytes) -> bool:
        return any(folder == b"" or path.startswith(folder + b"/") for folder in case.unlisted)

    def sight(path: bytes) -> Sight | None:
        """What decides about a row that no unchanged image has; None where it stays anyway."""
        if path not in case.files:
            if is_unlisted(path):
                return Sight.UNSEEN
            if case.keep_missing:
                return None
            return Sight.EXCLUDED if path in case.excluded else case.sight(path)
        now = case.files[path]
        is_unread = case.content and not now.digest and now.sight is Sight.READABLE
        return Sight.UNSEEN if is_unread else now.sight

    def has_failed(path: bytes) -> FailureRecord | None:
        new = [one for one in case.new_failures if one.path == path and stands(one, True)]
        old = [one for one in case.failures if one.path == path and stands(one, False)]
        return [None, *old, *new][-1]

    rows = [(number, path) for number, shard in case.shards.items() for path in shard]
    live = set()
    moves = {}
    open_rows = {}
    for path in {path for _, path in rows}:
        shards = [number for number, other in rows if other == path]
        right = [
            (case.counted(number, path), number)
            for number in shards
            if path in case.files and is_same(path, case.shards[number][path])
        ]
        counted = [number for number in shards if case.counted(number, path)]
        if right:
            number = max(right)[1]
            live.add((number, path))
            row, now = case.shards[number][path], case.files[path]
            if row.mtime != now.mtime and row.size == now.size:
                moves[number, path] = path
        elif counted:
            open_rows[path] = max(counted)
    seen = {path: sight(path) for path in open_rows}
    kept = {path for path in seen if seen[path] in (None, Sight.UNSEEN)}
    live |= {(open_rows[path], path) for path in kept}
    free = [row for row in rows if row not in live]
    free += [
        (open_rows[path], path)
        for path in kept
        if path not in case.files and seen[path] is None and case.sight(path) is Sight.GONE
    ]
    free.sort(
        key=lambda row: (not case.counted(*row), -row[0], list(case.shards[row[0]]).index(row[1]))
    )
    with_row = {path for _, path in live}
    for same_path in (True, False):
        for path, now in sorted(case.files.items()):
            if path in with_row or has_failed(path) or now.size < 0 or not now.digest:
                continue
            for number, before in free:
                old = case.shards[number][before]
                if (old.size, old.digest) != (now.size, now.digest):
                    continue
                if same_path and path != before:
                    continue
                moves[number, before] = path
                free.remove((number, before))
                live.add((number, before))
                with_row.add(path)
                if before not in case.files and open_rows.get(before) == number:
                    kept -= {before}
                break
    gone = {path for path in seen if seen[path] is Sight.GONE and path not in with_row}
    gone -= {path for path in gone if (open_rows[path], path) in moves}
    total = sum(case.counted(number, path) for number, path in rows)
    is_large = len(gone) > case.many and len(gone) > case.share * total
    withheld = gone if (is_large or case.vanished) and not case.retire else set()
    kept |= withheld
    live |= {(open_rows[path], path) for path in withheld}
    with_row |= withheld
    missing = [path for path in kept if path not in case.files]
    ended = [path for number, path in rows if case.counted(number, path)]
    for number, path in live:
        if case.counted(number, path):
            ended.remove(path)
    todo, failures = [], []
    for path in sorted(case.files):
        if path in with_row:
            continue
        failure = has_failed(path)
        if failure is not None:
            failures.append(failure)
        else:
            todo.append(path)
    others = {one.path: one for one in [*case.failures, *case.new_failures]}
    for path in sorted(set(others) - set(case.files) - set(missing)):
        sights = [Sight.UNSEEN, Sight.GONE] if withheld else [Sight.UNSEEN]
        if path not in case.excluded and (is_unlisted(path) or case.sight(path) in sights):
            failures.append(others[path])
            missing.append(path)
    return {
        "todo": todo,
        "live": live,
        "failures": sorted(failures),
        "missing": sorted(missing),
        "gone": sum(path not in case.files for path in ended),
        "changed": sum(path in case.files for path in ended),
        "rows": len(live),
        "unseen": sum(one is Sight.UNSEEN for one in seen.values()),
        "vanished": len(withheld),
        "moves": moves,
        "moved": sum(before != path for (_, before), path in moves.items()),
    }


# Few values, so that equal ones meet.
PATHS = st.sampled_from([b"a.png", b"b.png", b"c/d.png", b"c/\xff.png", b"e.png"])
DIGESTS = st.sampled_from([b"", b"1" * 32, b"2" * 32])
STAMPS = st.integers(1, 2)
SIGHTS = st.sampled_from([Sight.READABLE, Sight.OTHER, Sight.GONE, Sight.UNSEEN])
FILES = st.one_of(
    st.builds(File, st.just(-1), st.just(-1), st.just(b""), SIGHTS),
    st.builds(File, STAMPS, STAMPS, DIGESTS, SIGHTS),
)
ROWS = st.builds(Row, STAMPS, STAMPS, DIGESTS, st.booleans())
REASONS = st.sampled_from(
    ["corrupt", "unreadable", "not-a-file", "out-of-memory", "timeout", "not-finite"]
)
FAILED = st.builds(
    FailureRecord, PATHS, REASONS, st.just("why"), st.sampled_from([-1, 1, 2]), STAMPS
)
FAILURES = st.lists(FAILED, max_size=4, unique_by=lambda one: one.path)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shards = draw(
        st.dictionaries(st.integers(0, 20), st.dictionaries(PATHS, ROWS, max_size=4), max_size=4)
    )
    first_new = draw(st.integers(0, 21))
    return Case(
        draw(st.dictionaries(PATHS, FILES, max_size=5)),
        {number: dict(sorted(rows.items())) for number, rows in shards.items()},
        draw(FAILURES),
        draw(FAILURES),
        frozenset(number for number in shards if number >= first_new),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.dictionaries(PATHS, SIGHTS)),
        draw(st.sampled_from([(), (b"c",), (b"",)])),
        draw(st.booleans()),
        draw(st.sampled_from([0, 0, 1])),
        draw(st.frozensets(PATHS, max_size=2)),
        draw(st.integers(0, 2)),
        draw(st.sampled_from([0.1, 0.5])),
        draw(st.sampled_from([0, 1, 4])),
        draw(st.sampled_from([0, 1, 2, 100])),
    )


@SETTINGS
@given(cases())
def test_plan_equals_that_of_the_simple_model(case: Case) -> None:
    assert as_dict(case, case.plan()) == slow_plan(case)


@SETTINGS
@given(cases())
def test_each_image_has_one_row_or_a_failure_or_is_planned(case: Case) -> None:
    made = as_dict(case, case.plan())
    failed = [failure.path for failure in made["failures"]]
    rows = [made["moves"].get(row, row[1]) for row in made["live"]]
    assert sorted([*made["todo"], *failed, *rows]) == sorted([*case.files, *made["missing"]])
    assert not set(made["missing"]) & set(case.files)


@SETTINGS
@given(cases())
def test_moved_row_stands_for_the_same_content_and_no_row_moves_twice(case: Case) -> None:
    made = as_dict(case, case.plan())
    for (number, before), path in made["moves"].items():
        assert (number, before) in made["live"]
        assert case.files[path].digest == case.shards[number][before].digest != b""
    assert len(set(made["moves"].values())) == len(made["moves"])


@SETTINGS
@given(cases())
def test_row_is_retired_only_if_its_image_changed_or_is_unrequested_or_gone(case: Case) -> None:
    rows = [(number, path) for number, shard in case.shards.items() for path in shard]
    before = [path for number, path in rows if case.counted(number, path)]
    made = as_dict(case, case.plan())
    retired = set(before) - {path for _, path in made["live"]} - set(made["moves"].values())
    excluded = {path for path in case.excluded if path not in case.files}
    retired -= excluded  # nobody wants them
    gone = {path for path in retired if case.sight(path) is Sight.GONE}
    if not case.retire and gone:
        assert not case.vanished
        assert len(gone) <= max(case.many, case.share * len(before))
    for path in retired:
        assert case.sight(path) is not Sight.UNSEEN
        if path not in case.files:
            assert not case.keep_missing
            assert b"" not in case.unlisted
            assert b"c" not in case.unlisted or not path.startswith(b"c/")
        elif case.content:
            assert path in gone or case.files[path].digest != b"" or case.sight(path) is Sight.OTHER


def carried_out(case: Case, made: Plan) -> Case:
    """The store after a run of a plan in which all that was to be computed got a row."""
    paths = sorted(case.files)
    shards: dict[int, dict[bytes, Row]] = {}
    for number, rows in case.shards.items():
        live: dict[bytes, Row] = {}
        retired: dict[bytes, Row] = {}
        for i, (path, row) in enumerate(rows.items()):
            move = made.moves.get(number, {}).get(i)
            if move is not None:
                path, row = move.path, row._replace(size=move.size, mtime=move.mtime_ns)
            kind = live if made.live[number][i] else retired
            kind[path] = row._replace(counted=bool(made.live[number][i]))
        shards[number] = {**retired, **live}  # a retired row of the same path is left out
    todo = [paths[i] for i in made.todo]
    files = {
        path: file._replace(digest=file.digest or b"3" * 32) if path in todo else file
        for path, file in case.files.items()
    }
    if todo:
        fresh = {
            path: Row(files[path].size, files[path].mtime, files[path].digest) for path in todo
        }
        shards[max(shards, default=-1) + 1] = fresh
    return replace(case, files=files, shards=shards, failures=made.failures)


@SETTINGS
@given(cases())
def test_plan_after_a_run_is_empty(case: Case) -> None:
    lasting = [one._replace(reason="corrupt") for one in case.new_failures]
    case = replace(case, new_failures=lasting)
    done = carried_out(case, case.plan())
    done = replace(
        done,
        new_failures=(),
        new_shards=frozenset(),
        retry=False,
        retire=False,
        vanished=case.plan().vanished,
    )
    again = done.plan()
    assert list(again.todo) == []
    assert (again.gone, again.changed, dict(again.moves)) == (0, 0, {})
    assert list(again.failures) == list(done.failures)
    for number, rows in done.shards.items():
        assert again.live[number].tolist() == [row.counted for row in rows.values()]


# ---------------------------------------------------------------------------------------------
# One law each

OLD, NEW = Row(1, 1), Row(2, 2)


def made_of(*arguments: Any, **options: Any) -> dict[str, Any]:
    case = Case(*arguments, **options)
    return as_dict(case, case.plan())


def test_plan_for_an_empty_store_computes_all_images() -> None:
    made = made_of({b"a": File(1, 1), b"b": File(-1, -1, b"", Sight.GONE)}, {})
    assert made["todo"] == [b"a", b"b"]
    assert (made["rows"], made["gone"], made["changed"]) == (0, 0, 0)


def test_plan_without_images_retires_all_rows() -> None:
    made = made_of({}, {0: {b"a": OLD, b"b": OLD}})
    assert (made["live"], made["todo"], made["gone"]) == (set(), [], 2)


@pytest.mark.parametrize("now", [File(2, 1), File(1, 2), File(-1, -1, b"", Sight.GONE)])
def test_changed_size_or_time_retires_a_row(now: File) -> None:
    made = made_of({b"a": now, b"b": File(1, 1)}, {0: {b"a": OLD, b"b": OLD}})
    assert made["todo"] == [b"a"]
    assert made["live"] == {(0, b"b")}
    assert (made["changed"], made["gone"]) == (1, 0)


def test_digests_override_size_and_time() -> None:
    there = {b"same": Row(1, 1, b"1" * 32), b"other": Row(1, 1, b"1" * 32), b"none": Row(1, 1)}
    now = {
        b"same": File(1, 9, b"1" * 32),
        b"other": File(1, 1, b"2" * 32),
        b"none": File(1, 1, b"3" * 32),
    }
    made = made_of(now, {0: there}, content=True)
    assert made["live"] == {(0, b"same")}
    assert made["todo"] == [b"none", b"other"]  # no digest is no proof


@pytest.mark.parametrize(
    ("content", "sizes", "hashed"),
    [
        (False, [1, 2, 1], []),  # the row is claimed by its own image
        (False, [1, 9, 1], []),  # none of this size
        (False, [2, 9, 1], [0]),
        (False, [2, 2, 1], []),
        (True, [1, 2, 1], [1]),
        (True, [2, 2, 1], [1]),
    ],
)
def test_only_images_of_the_size_of_an_unclaimed_row_are_hashed(
    content: bool, sizes: list[int], hashed: list[int]
) -> None:
    asked: list[int] = []

    def digests(places: Sequence[int]) -> list[bytes]:
        asked.extend(places)
        return [b"1" * 32 for _ in places]

    paths = [b"a", b"b", b"c"]
    current = Snapshot(
        paths,
        np.array(sizes),
        np.ones(3, np.int64),
        lambda paths: [Sight.READABLE for path in paths],
        digests,
        check_content=content,
    )
    rows = Images([b"b"], np.array([2]), np.array([1]), [b"1" * 32])
    plan_run(current, StoredImages({0: rows}, {}, [FailureRecord(b"c", "corrupt", "why", 1, 1)]))
    assert asked == hashed


def test_image_that_comes_back_unchanged_regains_its_row() -> None:
    shards = {0: {b"a": OLD._replace(counted=False), b"b": OLD}}
    made = made_of({b"a": File(1, 1), b"b": File(1, 1)}, shards)
    assert made["live"] == {(0, b"a"), (0, b"b")}
    assert (made["todo"], made["changed"], made["gone"]) == ([], 0, 0)


def test_image_changed_back_regains_its_earlier_row() -> None:
    shards = {3: {b"a": NEW}, 1: {b"a": OLD._replace(counted=False)}}
    made = made_of({b"a": File(1, 1)}, shards)
    assert made["live"] == {(1, b"a")}
    assert made["changed"] == 1


def test_latest_of_several_matching_rows_counts() -> None:
    shards = {2: {b"a": OLD}, 10: {b"a": OLD}, 0: {b"a": OLD}}
    assert made_of({b"a": File(1, 1)}, shards)["live"] == {(10, b"a")}
    assert made_of({}, shards, keep_missing=True)["live"] == {(10, b"a")}


def test_keep_missing_keeps_only_rows_that_counted() -> None:
    shards = {
        0: {b"a": OLD, b"b": OLD, b"never": OLD._replace(counted=False)},
        1: {b"a": NEW._replace(counted=False), b"c": OLD},
    }
    made = made_of({b"c": File(2, 2)}, shards, keep_missing=True)
    assert made["live"] == {(0, b"a"), (0, b"b")}
    assert made["missing"] == [b"a", b"b"]
    assert (made["todo"], made["changed"], made["gone"]) == ([b"c"], 1, 0)


def test_rows_of_a_new_shard_count() -> None:
    made = made_of({}, {0: {b"a": OLD._replace(counted=False)}}, keep_missing=True)
    assert made["rows"] == 0
    new = made_of({}, {0: {b"a": OLD}}, new_shards=frozenset({0}), keep_missing=True)
    assert new["live"] == {(0, b"a")}


@pytest.mark.parametrize(
    ("reason", "readable", "retry", "stands"),
    [
        ("corrupt", True, False, True),
        ("corrupt", True, True, False),
        ("not-finite", True, False, True),
        ("out-of-memory", True, False, False),
        ("timeout", True, False, False),
        ("unreadable", False, False, True),
        ("unreadable", True, False, False),
        ("not-a-file", False, False, True),
        ("not-a-file", True, False, False),
        ("unreadable", False, True, False),
    ],
)
def test_failure_remains_until_its_cause_may_be_over(
    reason: str, readable: bool, retry: bool, stands: bool
) -> None:
    failure = FailureRecord(b"a", reason, "why", 1, 1)
    files = {b"a": File(1, 1, b"", Sight.READABLE if readable else Sight.UNSEEN)}
    made = made_of(files, {}, [failure], retry=retry)
    assert made["failures"] == ([failure] if stands else [])
    assert made["todo"] == ([] if stands else [b"a"])
    # What was found since the last publishing is not tried again at once.
    assert made_of(files, {}, [], [failure], retry=retry)["failures"] == [failure]


@pytest.mark.parametrize("reason", ["no-decoder", "not-an-image"])
def test_failure_for_want_of_a_decoder_is_retried_once_it_is_there(reason: str) -> None:
    failure = FailureRecord(b"a", reason, "why", 1, 1)
    for decodable in (False, True):
        made = made_of({b"a": File(1, 1, decodable=decodable)}, {}, [failure])
        assert made["failures"] == ([] if decodable else [failure])
        assert made["todo"] == ([b"a"] if decodable else [])


@pytest.mark.parametrize("now", [File(2, 1), File(1, 2)])
@pytest.mark.parametrize("fresh", [False, True])
def test_failure_ends_when_its_file_changes(now: File, fresh: bool) -> None:
    failure = FailureRecord(b"a", "corrupt", "why", 1, 1)
    failures: tuple[Any, Any] = ([], [failure]) if fresh else ([failure], [])
    made = made_of({b"a": now}, {}, *failures)
    assert (made["failures"], made["todo"]) == ([], [b"a"])
    assert made_of({}, {}, *failures, keep_missing=True)["failures"] == []


def test_row_overrides_failure_and_new_failure_overrides_old() -> None:
    old = FailureRecord(b"a", "corrupt", "older", 1, 1)
    new = FailureRecord(b"a", "truncated", "newer", 1, 1)
    assert made_of({b"a": File(1, 1)}, {}, [old], [new])["failures"] == [new]
    made = made_of({b"a": File(1, 1)}, {0: {b"a": OLD}}, [old], [new])
    assert (made["failures"], made["live"]) == ([], {(0, b"a")})


def test_failures_are_sorted_by_path() -> None:
    old, new = (FailureRecord(path, "corrupt", "why", 1, 1) for path in (b"b", b"a"))
    files = {b"a": File(1, 1), b"b": File(1, 1)}
    assert made_of(files, {}, [old], [new])["failures"] == [new, old]


# ---------------------------------------------------------------------------------------------
# What is not seen is not gone

TWENTY = {b"%02d" % number: OLD for number in range(20)}
CLOSED = File(-1, -1, b"", Sight.UNSEEN)


def test_row_of_an_image_that_cannot_be_seen_stays() -> None:
    made = made_of({b"a": CLOSED, b"b": File(2, 2, b"", Sight.UNSEEN)}, {0: {b"a": OLD, b"b": OLD}})
    assert made["live"] == {(0, b"a"), (0, b"b")}
    assert (made["todo"], made["unseen"], made["changed"]) == ([], 2, 0)
    made = made_of({}, {0: {b"a": OLD}}, others={b"a": Sight.UNSEEN}, retire=True)
    assert (made["missing"], made["unseen"]) == ([b"a"], 1)


def test_rows_below_an_unlisted_folder_stay_whatever_is_there() -> None:
    rows = {b"sub.png": OLD, b"sub/a.png": OLD, b"sub2/a.png": OLD}
    others = dict.fromkeys(rows, Sight.READABLE)
    made = made_of({}, {0: rows}, others=others, unlisted=[b"sub"])
    assert (made["missing"], made["unseen"], made["gone"]) == ([b"sub/a.png"], 1, 2)
    made = made_of({}, {0: rows}, others=others, unlisted=[b""])
    assert (made["missing"], made["unseen"], made["gone"]) == (sorted(rows), 3, 0)


def test_unread_content_is_no_change() -> None:
    there = {b"a": Row(1, 1, b"1" * 32), b"b": Row(1, 1, b"1" * 32)}
    now = {b"a": File(1, 1, b""), b"b": File(1, 1, b"", Sight.OTHER)}
    made = made_of(now, {0: there}, content=True)
    assert (made["live"], made["unseen"], made["todo"]) == ({(0, b"a")}, 1, [b"b"])


@pytest.mark.parametrize(
    ("gone", "of", "stay"), [(10, 20, 0), (11, 20, 11), (11, 109, 11), (11, 110, 0), (20, 20, 20)]
)
@pytest.mark.parametrize("listed", [False, True])
def test_many_vanished_images_keep_their_rows(gone: int, of: int, stay: int, listed: bool) -> None:
    names = [b"%03d" % number for number in range(of)]
    files = {name: File(1, 1) for name in names[gone:]}
    if listed:
        files |= {name: File(-1, -1, b"", Sight.GONE) for name in names[:gone]}
    rows = {0: dict.fromkeys(names, OLD)}
    made = made_of(files | {b"new": File(3, 3)}, rows)
    retried = names[:gone] if listed and not stay else []
    assert (made["vanished"], made["todo"]) == (stay, [*retried, b"new"])
    assert made["rows"] == of - gone + stay
    assert made_of(files, rows, retire=True)["rows"] == of - gone


def test_images_that_are_there_but_not_requested_are_retired_however_many() -> None:
    made = made_of({}, {0: TWENTY}, others=dict.fromkeys(TWENTY, Sight.READABLE))
    assert (made["gone"], made["rows"], made["vanished"]) == (20, 0, 0)


def test_vanished_images_stay_after_the_store_has_grown() -> None:
    rows = {0: {b"a": OLD}, 1: {b"%03d" % number: OLD for number in range(500)}}
    files = {path: File(1, 1) for path in rows[1]}
    assert made_of(files, rows)["gone"] == 1
    made = made_of(files, rows, vanished=12)
    assert (made["gone"], made["vanished"], made["missing"]) == (0, 1, [b"a"])
    assert made_of(files, rows, vanished=12, retire=True)["gone"] == 1


def test_failures_of_what_was_not_seen_stay() -> None:
    failures = [FailureRecord(path, "corrupt", "why", 1, 1) for path in (b"a", b"s/b", b"z")]
    others = {b"a": Sight.UNSEEN, b"s/b": Sight.READABLE}
    made = made_of({}, {}, failures, others=others, unlisted=[b"s"])
    assert (made["failures"], made["missing"]) == (failures[:2], [b"a", b"s/b"])
    assert made_of({}, {0: TWENTY}, failures)["failures"] == failures  # a mount may be away


def test_change_of_what_vanished_is_a_change_of_the_store() -> None:
    case = Case({path: File(1, 1) for path in TWENTY}, {0: TWENTY}, vanished=12)
    assert case.plan().changes(case.stored())
    case = replace(case, vanished=0)
    assert not case.plan().changes(case.stored())


def test_row_of_an_excluded_image_is_retired_without_a_look() -> None:
    rows = {0: {b"a": OLD, b"b": OLD}}
    others = dict.fromkeys(rows[0], Sight.UNSEEN)
    made = made_of({}, rows, others=others, excluded=frozenset([b"a"]))
    assert (made["live"], made["gone"], made["unseen"]) == ({(0, b"b")}, 1, 1)
    kept = made_of({}, rows, others=others, excluded=frozenset([b"a"]), keep_missing=True)
    assert kept["missing"] == [b"a", b"b"]


def test_replaced_row_is_kept_if_its_image_could_not_be_read() -> None:
    case = Case({b"a": File(2, 2), b"b": File(2, 2)}, {0: {b"a": OLD}, 3: {b"b": OLD, b"c": OLD}})
    made = case.plan()
    assert (dict(made.replaced), made.changed) == ({b"a": (0, 0), b"b": (3, 0)}, 2)
    kept = made.keeping([b"b"])
    assert (kept.changed, kept.unseen, kept.kept) == (1, 1, frozenset([b"b"]))
    assert [kept.live[shard].tolist() for shard in (0, 3)] == [[False], [True, False]]
    assert made.live[3].tolist() == [False, False]


# ---------------------------------------------------------------------------------------------
# Content decides where path, size or time is new

ONE, TWO = b"1" * 32, b"2" * 32
ROW_1, ROW_2 = Row(1, 1, ONE), Row(1, 1, TWO)


def test_touched_image_keeps_its_row() -> None:
    made = made_of({b"a": File(1, 9, ONE)}, {0: {b"a": ROW_1}})
    assert (made["todo"], made["changed"], made["moved"]) == ([], 0, 0)
    assert made["moves"] == {(0, b"a"): b"a"}


def test_renamed_image_keeps_its_row() -> None:
    made = made_of({b"b": File(1, 1, ONE)}, {0: {b"a": ROW_1}})
    assert (made["todo"], made["gone"], made["moved"]) == ([], 0, 1)
    assert made["moves"] == {(0, b"a"): b"b"}


@pytest.mark.parametrize("digest", [b"", TWO])
def test_other_or_unknown_content_is_no_move(digest: bytes) -> None:
    made = made_of({b"b": File(1, 1, digest)}, {0: {b"a": ROW_1}})
    assert (made["moves"], made["todo"], made["gone"]) == ({}, [b"b"], 1)
    made = made_of({b"b": File(1, 1, ONE)}, {0: {b"a": Row(1, 1, digest)}})
    assert (made["moves"], made["todo"], made["gone"]) == ({}, [b"b"], 1)


def test_swapped_images_swap_the_paths_of_their_rows() -> None:
    files = {b"a": File(1, 2, TWO), b"b": File(1, 3, ONE)}
    made = made_of(files, {0: {b"a": ROW_1, b"b": ROW_2}})
    assert made["moves"] == {(0, b"a"): b"b", (0, b"b"): b"a"}
    assert (made["todo"], made["changed"], made["moved"]) == ([], 0, 2)


@pytest.mark.parametrize("mtime", [1, 9])
def test_copy_is_new_and_the_original_keeps_its_row(mtime: int) -> None:
    files = {b"a": File(1, 5, ONE), b"b": File(1, mtime, ONE)}
    made = made_of(files, {0: {b"b": ROW_1}})
    assert (made["todo"], made["moved"], made["live"]) == ([b"a"], 0, {(0, b"b")})
    kept = made_of(
        {b"a": files[b"a"]}, {0: {b"b": ROW_1}}, others={b"b": Sight.READABLE}, keep_missing=True
    )
    assert (kept["todo"], kept["missing"], kept["moved"]) == ([b"a"], [b"b"], 0)


def test_moved_image_is_not_missing() -> None:
    made = made_of({b"b": File(1, 1, ONE)}, {0: {b"a": ROW_1}}, keep_missing=True)
    assert (made["missing"], made["moves"]) == ([], {(0, b"a"): b"b"})


def test_row_whose_image_was_not_seen_stays_where_it_is() -> None:
    files = {b"b": File(1, 1, ONE)}
    made = made_of(files, {0: {b"a": ROW_1}}, others={b"a": Sight.UNSEEN})
    assert (made["todo"], made["missing"], made["moves"]) == ([b"b"], [b"a"], {})


def test_counted_row_is_preferred_then_the_latest() -> None:
    ended = ROW_1._replace(counted=False)
    shards = {0: {b"a": ROW_1}, 1: {b"b": ROW_1}, 2: {b"c": ended}, 3: {b"d": ended}}
    made = made_of({b"z": File(1, 1, ONE)}, shards)
    assert made["moves"] == {(1, b"b"): b"z"}
    made = made_of({b"z": File(1, 1, ONE)}, {2: shards[2], 3: shards[3]})
    assert made["moves"] == {(3, b"d"): b"z"}
    made = made_of({b"c": File(1, 9, ONE)}, shards)
    assert made["moves"] == {(2, b"c"): b"c"}


def test_counted_row_is_preferred_to_a_later_one_of_equal_size_and_time() -> None:
    shards = {0: {b"a": ROW_1}, 1: {b"a": ROW_2._replace(counted=False)}}
    assert made_of({b"a": File(1, 1)}, shards)["live"] == {(0, b"a")}


def test_equal_images_keep_one_row_each() -> None:
    made = made_of({b"c": File(1, 1, ONE), b"d": File(1, 1, ONE)}, {0: {b"a": ROW_1, b"b": ROW_1}})
    assert made["moves"] == {(0, b"a"): b"c", (0, b"b"): b"d"}


def test_renamed_folder_is_no_disappearance() -> None:
    rows = {b"old/%02d" % i: Row(1, 1, b"%032d" % i) for i in range(20)}
    files = {b"new/%02d" % i: File(1, 1, b"%032d" % i) for i in range(20)}
    made = made_of(files, {0: rows})
    assert (made["vanished"], made["moved"], made["todo"], made["gone"]) == (0, 20, [], 0)
    made = made_of(files, {0: rows}, vanished=20)
    assert (made["vanished"], made["moved"], made["missing"]) == (0, 20, [])


def test_image_with_a_lasting_failure_is_not_compared() -> None:
    failure = FailureRecord(b"b", "corrupt", "why", 1, 1)
    made = made_of({b"b": File(1, 1, ONE)}, {0: {b"a": ROW_1}}, [failure])
    assert (made["moves"], made["failures"], made["gone"]) == ({}, [failure], 1)


def test_moved_row_is_not_the_replaced_one_of_its_old_path() -> None:
    case = Case({b"a": File(2, 2, TWO), b"b": File(1, 1, ONE)}, {0: {b"a": ROW_1}})
    made = case.plan()
    assert (list(made.todo), dict(made.replaced), made.moved) == ([0], {}, 1)


@pytest.mark.parametrize("is_stored", [False, True])
def test_plan_holds_no_table_of_all_paths(is_stored: bool) -> None:
    count, shards = 40_000, 20
    paths = [b"photos/%04d/img_%07d.jpg" % (i // 1000, i) for i in range(count)]
    numbers = np.arange(count)
    parts = np.split(numbers, shards) if is_stored else []
    stored = StoredImages(
        {
            i: Images(PackedPaths(paths[part[0] : part[-1] + 1]), numbers[part], numbers[part], ())
            for i, part in enumerate(parts)
        },
        {i: np.ones(len(part), bool) for i, part in enumerate(parts)},
    )
    snapshot = Snapshot(PackedPaths(paths), numbers, numbers, lambda paths: [])
    del paths
    tracemalloc.start()
    try:
        made = plan_run(snapshot, stored)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(made.todo) == (0 if is_stored else count)
    assert peak / count < 40  # a table of all paths takes 140
