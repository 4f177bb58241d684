"""The plan of a run, compared with a slow and simple model that takes one image at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extractor.store.failures import FailureRecord
from extractor.store.index import Images
from extractor.store.plan import Plan, Snapshot, StoredImages, plan_run

EXAMPLES = max(int(os.environ.get("EXTRACTOR_TEST_EXAMPLES", "0")), 300)
SETTINGS = settings(deadline=None, derandomize=True, max_examples=EXAMPLES, database=None)


class File(NamedTuple):
    """An image as it is now."""

    size: int
    mtime: int
    digest: bytes = b""
    readable: bool = True
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

    def snapshot(self) -> Snapshot:
        paths = sorted(self.files)
        files = [self.files[path] for path in paths]
        return Snapshot(
            paths,
            np.array([file.size for file in files], np.int64),
            np.array([file.mtime for file in files], np.int64),
            lambda i: files[i].readable,
            (lambda places: [files[i].digest for i in places]) if self.content else None,
            lambda i: files[i].decodable,
        )

    def stored(self) -> StoredImages:
        shards = {
            number: Images(
                list(rows),
                np.array([row.size for row in rows.values()], np.int64),
                np.array([row.mtime for row in rows.values()], np.int64),
                [row.digest for row in rows.values()] if self.content else [],
            )
            for number, rows in self.shards.items()
        }
        live = {
            number: np.array([row.counted for row in rows.values()], bool)
            for number, rows in self.shards.items()
            if number not in self.new_shards
        }
        return StoredImages(shards, live, self.failures, self.new_failures)

    def plan(self) -> Plan:
        return plan_run(
            self.snapshot(), self.stored(), keep_missing=self.keep_missing, retry=self.retry
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
    return {
        "todo": [paths[i] for i in made.todo],
        "live": live,
        "failures": list(made.failures),
        "missing": list(made.missing),
        "gone": made.gone,
        "changed": made.changed,
        "rows": made.rows,
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
        if case.retry or failure.reason == "out-of-memory":
            return False
        return not (failure.reason in ("unreadable", "not-a-file") and now.readable)

    rows = [(number, path) for number, shard in case.shards.items() for path in shard]
    live = set()
    missing = []
    for path in {path for _, path in rows}:
        shards = [number for number, other in rows if other == path]
        if path in case.files:
            right = [number for number in shards if is_same(path, case.shards[number][path])]
        else:
            right = [
                number for number in shards if case.keep_missing and case.counted(number, path)
            ]
            missing += [path] if right else []
        live |= {(max(right), path)} if right else set()
    ended = [path for number, path in rows if case.counted(number, path)]
    for number, path in live:
        if case.counted(number, path):
            ended.remove(path)
    todo, failures = [], []
    for path in sorted(case.files):
        if any(path == other for _, other in live):
            continue
        new = [one for one in case.new_failures if one.path == path and stands(one, True)]
        old = [one for one in case.failures if one.path == path and stands(one, False)]
        if new or old:
            failures.append([*old, *new][-1])
        else:
            todo.append(path)
    return {
        "todo": todo,
        "live": live,
        "failures": failures,
        "missing": sorted(missing),
        "gone": sum(path not in case.files for path in ended),
        "changed": sum(path in case.files for path in ended),
        "rows": len(live),
    }


# Few values, so that equal ones meet.
PATHS = st.sampled_from([b"a.png", b"b.png", b"c/d.png", b"c/\xff.png", b"e.png"])
DIGESTS = st.sampled_from([b"", b"1" * 32, b"2" * 32])
STAMPS = st.integers(1, 2)
FILES = st.one_of(
    st.just(File(-1, -1, b"", False)), st.builds(File, STAMPS, STAMPS, DIGESTS, st.booleans())
)
ROWS = st.builds(Row, STAMPS, STAMPS, DIGESTS, st.booleans())
REASONS = st.sampled_from(["corrupt", "unreadable", "not-a-file", "out-of-memory", "not-finite"])
FAILED = st.builds(
    FailureRecord, PATHS, REASONS, st.just("why"), st.sampled_from([-1, 1, 2]), STAMPS
)
FAILURES = st.lists(FAILED, max_size=4, unique_by=lambda one: one.path)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shards = draw(
        st.dictionaries(
            st.integers(0, 20), st.dictionaries(PATHS, ROWS, min_size=1, max_size=4), max_size=4
        )
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
    rows = [path for _, path in made["live"]]
    assert sorted([*made["todo"], *failed, *rows]) == sorted([*case.files, *made["missing"]])
    assert not set(made["missing"]) & set(case.files)


def carried_out(case: Case, made: Plan) -> Case:
    """The store after a run of a plan in which all that was to be computed got a row."""
    paths = sorted(case.files)
    shards = {
        number: {
            path: row._replace(counted=bool(counts))
            for (path, row), counts in zip(rows.items(), made.live[number], strict=True)
        }
        for number, rows in case.shards.items()
    }
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
    done = replace(done, new_failures=(), new_shards=frozenset(), retry=False)
    again = done.plan()
    assert list(again.todo) == []
    assert (again.gone, again.changed) == (0, 0)
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
    made = made_of({b"a": File(1, 1), b"b": File(-1, -1)}, {})
    assert made["todo"] == [b"a", b"b"]
    assert (made["rows"], made["gone"], made["changed"]) == (0, 0, 0)


def test_plan_without_images_retires_all_rows() -> None:
    made = made_of({}, {0: {b"a": OLD, b"b": OLD}})
    assert (made["live"], made["todo"], made["gone"]) == (set(), [], 2)


@pytest.mark.parametrize("now", [File(2, 1), File(1, 2), File(-1, -1)])
def test_changed_size_or_time_retires_a_row(now: File) -> None:
    made = made_of({b"a": now, b"b": File(1, 1)}, {0: {b"a": OLD, b"b": OLD}})
    assert made["todo"] == [b"a"]
    assert made["live"] == {(0, b"b")}
    assert (made["changed"], made["gone"]) == (1, 0)


def test_digests_override_size_and_time() -> None:
    there = {b"same": Row(1, 1, b"1" * 32), b"other": Row(1, 1, b"1" * 32), b"none": Row(1, 1)}
    now = {b"same": File(1, 9, b"1" * 32), b"other": File(1, 1, b"2" * 32), b"none": File(1, 1)}
    made = made_of(now, {0: there}, content=True)
    assert made["live"] == {(0, b"same")}
    assert made["todo"] == [b"none", b"other"]  # no digest is no proof


def test_only_images_with_a_row_are_hashed() -> None:
    asked: list[int] = []

    def digests(places: Sequence[int]) -> list[bytes]:
        asked.extend(places)
        return [b"1" * 32 for _ in places]

    stamps = np.array([1, 1, 1])
    current = Snapshot([b"a", b"b", b"c"], stamps, stamps, lambda i: True, digests)
    rows = Images([b"b", b"z"], np.array([1, 1]), np.array([1, 1]), [b"1" * 32] * 2)
    made = plan_run(
        current, StoredImages({0: rows}, {}, [FailureRecord(b"c", "corrupt", "why", 1, 1)])
    )
    assert asked == [1]
    assert list(made.todo) == [0]


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
    files = {b"a": File(1, 1, b"", readable)}
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
