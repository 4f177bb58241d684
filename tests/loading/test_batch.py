"""A batch keeps rows and outcomes together, whatever happens to its buffers."""

from __future__ import annotations

from support.loading import RecordingOwner, buffers, encoded_jpeg, make_batch

from extractor.images.types import Failure, ImageInfo

INFO = ImageInfo(-1, -1, 5, 5)


def test_rows_after_the_last_image_are_black() -> None:
    batch = make_batch(images=2, batch_size=4)
    assert (batch.rows[0][2:] == 0).all()
    assert (batch.rows[0][:2] == 201).all()


def test_images_are_claimed_in_order_and_once() -> None:
    batch = make_batch(images=3)
    assert [batch.claim() for _ in range(3)] == [0, 1, 2]
    assert not batch.has_unclaimed


def test_batch_is_complete_when_every_image_has_an_outcome() -> None:
    batch = make_batch(images=2)
    batch.settle(1, INFO)
    assert not batch.is_complete
    batch.settle(0, Failure("corrupt", "broken"))
    assert batch.is_complete
    assert batch.outcomes == [Failure("corrupt", "broken"), INFO]


def test_rows_of_failed_and_encoded_images_are_black() -> None:
    batch = make_batch(images=3)
    batch.settle(0, Failure("corrupt", "broken"))
    batch.settle(1, INFO, encoded_jpeg(10))
    batch.settle(2, INFO)
    assert [int(row.max()) for row in batch.rows[0][:3]] == [0, 0, 201]
    assert list(batch.encoded) == [1]
    assert batch.encoded_bytes == 10


def test_moving_keeps_the_rows_and_leaves_the_old_buffers_alone() -> None:
    batch = make_batch(images=2)
    old, new = batch.rows[0], buffers(4, level=0)
    batch.rows[0][0] = 7
    batch.move_to(new)
    old[:] = 99  # an abandoned thread goes on writing
    assert batch.pictures is new
    assert (batch.rows[0][0] == 7).all()
    assert (new[0][1] == 201).all()


def test_batch_calls_its_owner() -> None:
    owner = RecordingOwner()
    batch = make_batch(owner=owner)
    batch.settle(0, INFO, encoded_jpeg(10))
    with batch.alone_on(3):
        assert owner.resting_cores == [3]
    batch.decode_on_host()
    assert owner.is_decoding_on_host
    batch.release()
    assert owner.released == [batch]
    assert batch.encoded == {}
