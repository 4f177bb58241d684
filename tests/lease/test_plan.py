"""A run is cut into shards that are counted through all its passes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extractor.lease.plan import PassPlan, RunPlan, StoreTarget
from extractor.store.format import Description

PASSES = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 20)), min_size=1, max_size=4)


def describe(root: str = "/data") -> Description:
    embedding = {"dim": 3, "shape": [3], "dtype": "float32"}
    return Description({}, embedding, {}, {}, root, 2, {})


def plan_of(passes: list[tuple[int, int]]) -> RunPlan:
    target = StoreTarget(Path("out/.extractor-partial"), describe(), first=0, spec=0)
    return RunPlan([PassPlan([target], images, size) for images, size in passes])


@given(PASSES)
def test_shards_cover_every_image_once(passes: list[tuple[int, int]]) -> None:
    shards = list(plan_of(passes))
    covered = [(shard.pass_index, image) for shard in shards for image in shard.images]
    expected = [(k, image) for k, (images, _) in enumerate(passes) for image in range(images)]
    assert covered == expected


@given(PASSES)
def test_shards_of_a_pass_are_counted_from_zero(passes: list[tuple[int, int]]) -> None:
    plan = plan_of(passes)
    for index, each in enumerate(plan.passes):
        own = [shard.in_pass for shard in plan if shard.pass_index == index]
        assert own == list(range(each.shards))
    assert len(plan) == sum(each.shards for each in plan.passes)


@pytest.mark.parametrize("shard", [-1, 3])
def test_shard_outside_of_the_plan_is_an_error(shard: int) -> None:
    with pytest.raises(IndexError, match=rf"shard {shard} of 3"):
        plan_of([(5, 2)])[shard]


def test_pass_without_images_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected a store and an image"):
        plan_of([(0, 2)])


@pytest.mark.parametrize(
    ("root", "path", "expected"),
    [
        ("/data", b"/data/cats/tom.jpg", b"cats/tom.jpg"),
        ("/data/", b"/data/cats/tom.jpg", b"cats/tom.jpg"),
        ("/", b"/tom.jpg", b"tom.jpg"),
    ],
)
def test_path_in_store_is_relative_to_its_root(root: str, path: bytes, expected: bytes) -> None:
    target = StoreTarget(Path("out"), describe(root=root), first=0, spec=0)
    assert target.path_in_store(path) == expected
