"""Leases and receipts: what they refuse, and that they cross processes."""

from __future__ import annotations

import pickle

import pytest

from extractor.lease.lease import Lease, Receipt


def test_a_lease_and_a_receipt_survive_pickling() -> None:
    lease = Lease(3, attempt=2, is_copy=True, suspects=(b"/a/\xff.jpg",))
    receipt = Receipt(3, images=10, failed=1, seconds={"model": 0.5}, wall_seconds=1.0, worker=4)

    assert pickle.loads(pickle.dumps([lease, receipt])) == [lease, receipt]


@pytest.mark.parametrize(("shard", "attempt"), [(-1, 1), (0, 0)])
def test_a_lease_has_a_shard_and_an_attempt(shard: int, attempt: int) -> None:
    with pytest.raises(ValueError, match="expected a shard from 0 and an attempt from 1"):
        Lease(shard, attempt)


def test_a_receipt_has_no_more_failures_than_images() -> None:
    with pytest.raises(ValueError, match="5 failures of 4 images"):
        Receipt(0, images=4, failed=5, seconds={}, wall_seconds=1.0)
