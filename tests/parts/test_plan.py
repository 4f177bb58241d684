"""The plan that parts share survives its way through a file, whatever names it holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from extractor.lease.paths_file import write_paths
from extractor.options import Options
from extractor.parts.plan import PartPlan, PlannedImages, PlannedStore, state_of, stored_lines
from extractor.parts.request import UnlistedImages, differences, part_request
from extractor.store.claim import SharedFolder
from extractor.store.failures import FailureRecord
from extractor.store.format import PLAN, PLAN_PATHS, STAGING
from extractor.store.plan import Move, Plan

ODD = b"a\xff\n\x80.png"  # neither UTF-8 nor one line


@pytest.fixture
def folder(tmp_path: Path) -> SharedFolder:
    """Output folder with a staging folder in it."""
    (tmp_path / "out" / STAGING).mkdir(parents=True)
    (tmp_path / "out" / STAGING / "job.json").write_text("{}")
    return SharedFolder(tmp_path / "out")


def plan_of(folder: SharedFolder, count: int = 3) -> PartPlan:
    plan = Plan(
        range(count),
        {0: np.array([True, False, True]), 7: np.zeros(2, bool)},
        [FailureRecord(ODD, "empty", "no bytes", 0, 5)],
        [b"gone.png", ODD],
        2,
        1,
        3,
        4,
        replaced={ODD: (0, 1)},
        moves={7: {1: Move(ODD, 10, 2**60, True), 0: Move(b"b", 1, -1, False)}},
    )
    store = PlannedStore(state_of(folder), False, 0, count, 1024, "0" * 64, False, plan)
    request = {"models": ["m"], "options": {"dtype": "float32"}}
    return PartPlan(request, "/root\udcff", 9, 32, [store], 0, 5, {".txt": 5})


def test_plan_is_read_as_it_was_written(folder: SharedFolder) -> None:
    written = plan_of(folder)
    written.write(folder.staging)
    read = PartPlan.read([folder])
    assert read is not None
    assert replace(read, stores=()) == replace(written, stores=(), unlisted=[])
    (before,), (now,) = written.stores, read.stores
    assert replace(now, plan=before.plan) == before
    for shard, live in before.plan.live.items():
        assert np.array_equal(now.plan.live[shard], live)
    assert replace(now.plan, live={}) == replace(before.plan, live={})


def test_plan_of_another_state_or_a_damaged_one_is_none(folder: SharedFolder) -> None:
    assert PartPlan.read([folder]) is None
    plan_of(folder).write(folder.staging)
    assert PartPlan.read([folder]) is not None
    (folder.staging / "job.json").write_text("{ }")  # another run
    assert PartPlan.read([folder]) is None
    plan_of(folder).write(folder.staging)
    (folder.out / "store.json").write_text("{}")  # published, or replaced
    assert PartPlan.read([folder]) is None
    plan_of(folder).write(folder.staging)
    text = (folder.staging / PLAN).read_text()
    for damaged in (text[:-9], "[]", text.replace('"version": 1', '"version": 9')):
        (folder.staging / PLAN).write_text(damaged)
        assert PartPlan.read([folder]) is None


@pytest.mark.parametrize("count", [1, 1023, 1024, 1025, 3000])
def test_images_of_a_plan_are_read_as_they_are_needed(folder: SharedFolder, count: int) -> None:
    paths = [b"%d/" % i + ODD for i in range(count)]
    write_paths(folder.staging / PLAN_PATHS, paths)
    images = PlannedImages.of(plan_of(folder, count), [folder])
    assert len(images) == count
    assert list(images.paths) == paths
    assert list(images.paths[count - 1 :]) == paths[-1:]
    assert images.full_path(count - 1) == b"/root\xff/" + paths[-1]
    with pytest.raises(IndexError, match=str(count)):
        images.paths[count]


def test_lines_of_a_list_keep_empty_ones(tmp_path: Path) -> None:
    lines = [b"", b"a", b"", ODD, b"a", b""]
    assert list(stored_lines(write_paths(tmp_path / "lines", lines).folder)) == lines


def test_request_ignores_what_each_part_may_choose() -> None:
    chosen = Options(part="1/2", workers=3, threads=2, devices="cpu", max_failure_rate=0.5)
    request = part_request(["a", b"b"], ["m"], chosen)
    assert differences(request, part_request(("a", Path("b")), ["m"], Options())) == []
    others = part_request("a", ["n"], Options(dtype="float16"))
    assert [text.partition(":")[0] for text in differences(request, others)] == [
        "inputs",
        "models",
        "dtype",
    ]


def test_images_that_no_part_listed_are_named_by_their_identity() -> None:
    def fail() -> None:
        raise AssertionError("the images are listed")

    images = UnlistedImages(["/photos"], fail)  # type: ignore[arg-type]
    assert part_request(images, ["m"], Options())["inputs"] == ["/photos"]
