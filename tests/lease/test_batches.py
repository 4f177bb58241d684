"""Images to shards to batches."""

from __future__ import annotations

import pytest

from extractor.lease.batches import BatchPlan, plan_batches


@pytest.mark.parametrize("images", [1, 2, 7, 24, 25])
@pytest.mark.parametrize("shard_images", [1, 5, 8, 100])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_plan_covers_each_image_once_and_no_batch_spans_shards(
    images: int, shard_images: int, batch_size: int
) -> None:
    plan = list(plan_batches(images, shard_images=shard_images, batch_size=batch_size))
    assert [i for b in plan for i in range(b.start, b.stop)] == list(range(images))
    for batch in plan:
        assert {i // shard_images for i in range(batch.start, batch.stop)} == {batch.shard}
        assert 1 <= batch.stop - batch.start <= batch_size
        assert (batch.start - batch.shard * shard_images) % batch_size == 0


def test_plan_of_no_images_is_empty() -> None:
    assert list(plan_batches(0, shard_images=5, batch_size=2)) == []
    assert next(plan_batches(1, shard_images=5, batch_size=2)) == BatchPlan(0, 0, 1)
