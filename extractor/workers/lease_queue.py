"""Leases that have arrived at a worker and wait for it."""

from __future__ import annotations

import queue

from extractor.lease.lease import Lease

__all__ = ["LeaseQueue"]


class LeaseQueue:
    """Leases in the order of their arrival; None ends them. For one consumer at a time."""

    def __init__(self) -> None:
        self._leases: queue.SimpleQueue[Lease | None] = queue.SimpleQueue()
        self._first: Lease | None = None

    def put(self, lease: Lease | None) -> None:
        """Add a lease, or the end."""
        self._leases.put(lease)

    def wait(self) -> bool:
        """Wait for a lease, and return whether there is one. False is the end."""
        self._first = self._leases.get()
        return self._first is not None

    def take(self) -> Lease | None:
        """Return the next lease if it is there already."""
        if (first := self._first) is not None:
            self._first = None
            return first
        try:
            return self._leases.get_nowait()
        except queue.Empty:
            return None
