"""Leases reach a worker in the order in which they arrive."""

from __future__ import annotations

from extractor.lease.lease import Lease
from extractor.workers.lease_queue import LeaseQueue


def test_leases_come_in_the_order_of_their_arrival() -> None:
    leases = LeaseQueue()
    for shard in range(3):
        leases.put(Lease(shard))
    assert leases.wait()
    assert [leases.take() for _ in range(4)] == [Lease(0), Lease(1), Lease(2), None]


def test_end_ends_waiting() -> None:
    leases = LeaseQueue()
    leases.put(None)
    assert not leases.wait()
    assert leases.take() is None
