"""The number of images sets the size of a new store's shards."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extractor.store.job import MAX_SHARD_IMAGES, SHARD_STEP, shard_images_for


@pytest.mark.parametrize(
    ("images", "size", "shards"),
    [
        (0, 1024, 0),
        (1, 1024, 1),
        (100_000, 1024, 98),
        (262_144, 1024, 256),
        (262_145, 2048, 129),
        (1_000_000, 4096, 245),
        (10_000_000, 39_936, 251),
        (100_000_000, 65_536, 1526),
        (1_000_000_000, 65_536, 15_259),
    ],
)
def test_size_of_shards_follows_the_number_of_images(images: int, size: int, shards: int) -> None:
    assert shard_images_for(images, 32) == shard_images_for(images, 128) == size
    assert -(-images // size) == shards


@pytest.mark.parametrize(
    ("batch_size", "size"),
    [(1, 1024), (1024, 1024), (48, 1024), (65, 2048), (100, 2048), (1000, 16_384), (2048, 32_768)],
)
def test_shard_has_sixteen_batches_unless_they_fill_it(batch_size: int, size: int) -> None:
    assert shard_images_for(10, batch_size) == size


@given(st.integers(0, 2 * 10**9), st.integers(1, 65_536))
def test_size_of_shards_is_a_multiple_within_bounds(images: int, batch_size: int) -> None:
    size = shard_images_for(images, batch_size)
    assert size % SHARD_STEP == 0
    assert max(SHARD_STEP, batch_size) <= size <= MAX_SHARD_IMAGES
    assert size <= shard_images_for(images + 1, batch_size)
    if images > 256 * SHARD_STEP and size < MAX_SHARD_IMAGES and SHARD_STEP % batch_size == 0:
        assert 128 < -(-images // size) <= 256
