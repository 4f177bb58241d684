"""Which worker has which shard. Knows no processes, no files and no clock."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

from extractor.lease.lease import ATTEMPTS, Lease, Receipt

__all__ = ["HOPELESS_SHARDS", "Board"]

HOPELESS_SHARDS = 3  # that failed for good, without one that was written


class Board:
    """All shards of a run: waiting, leased, settled, or failed for good.

    Waiting shards are handed out in their order, so a lost shard is the next to go out again. A
    worker holds at most two leases: it computes the first, and loads images of the second.

    Args:
        shards: Indices of the shards to compute.
        attempts: Number of workers that may fail on a shard before it is given up.
    """

    def __init__(self, shards: Iterable[int], *, attempts: int = ATTEMPTS) -> None:
        self._queue = sorted(set(shards))  # a heap, which may hold shards that were settled since
        self._waiting = set(self._queue)
        self._open = set(self._queue)
        self._attempts = attempts
        self._losses: dict[int, int] = {}
        self._errors: dict[int, str] = {}
        self._failed: dict[int, str] = {}
        self._computed: set[int] = set()  # shards of which only the files are left to finish
        self._suspects: dict[bytes, None] = {}
        self._held: dict[int, list[Lease]] = {}
        self._begun: dict[int, int] = {}  # worker -> when its first lease began, in ticks
        self._tick = 0
        self._has_receipt = False

    @property
    def waiting(self) -> int:
        """Number of shards that no worker has."""
        return len(self._waiting)

    @property
    def running(self) -> Mapping[int, tuple[Lease, ...]]:
        """Leases of each worker that has some, the oldest first."""
        return {worker: tuple(leases) for worker, leases in self._held.items()}

    @property
    def failed(self) -> Mapping[int, str]:
        """Last error of each shard that was given up."""
        return MappingProxyType(self._failed)

    @property
    def is_done(self) -> bool:
        """Whether every shard is settled or given up; a copy may still run."""
        return not self._open

    @property
    def is_hopeless(self) -> bool:
        """Whether all shards fail, not only some."""
        return not self._has_receipt and len(self._failed) >= HOPELESS_SHARDS

    def hand_out(self, ready: Sequence[int], workers: int) -> Iterator[tuple[int, Lease]]:
        """Yield a lease for every worker, then a second one whose images it decodes meanwhile.

        Args:
            ready: Numbers of the workers that are ready.
            workers: Number of all workers, with those that still start.
        """
        idle = workers - sum(worker in self._held for worker in ready)
        for ahead in (False, True):
            for worker in ready:
                lease = self.take(worker, ahead=ahead, idle=idle if ahead else 0)
                if lease is not None:
                    yield worker, lease

    def take(self, worker: int, *, ahead: bool = False, idle: int = 0) -> Lease | None:
        """Return a lease of the next shard, or None if there is none for this worker.

        A shard that failed is leased alone, so that no other one fails with it.

        Args:
            worker: Number of the worker.
            ahead: Whether the worker may hold a second lease. It gets one if enough shards are
                left for workers that have none.
            idle: Number of workers that have no lease yet, such as those that still start.
        """
        held = self._held.get(worker, ())
        if held and (not ahead or len(held) > 1 or self.waiting <= idle):
            return None
        while self._queue and self._queue[0] not in self._waiting:
            heapq.heappop(self._queue)
        if not self._queue:
            return None
        shard = self._queue[0]
        if held and any(each in self._losses for each in (held[0].shard, shard)):
            return None
        heapq.heappop(self._queue)
        self._waiting.remove(shard)
        return self._hand_out(worker, shard)

    def copy_for(self, worker: int) -> Lease | None:
        """Return a second lease of the shard that runs for longest, or None if there is none.

        A slow worker delays the end of a run. So an idle worker may race it once no shard waits.
        No shard runs more than twice at the same time.
        """
        if self._waiting or self._held.get(worker):
            return None
        holders: dict[int, list[int]] = {}
        for holder, leases in self._held.items():
            for lease in leases:
                holders.setdefault(lease.shard, []).append(holder)
        alone = {
            shard: found[0]
            for shard, found in holders.items()
            if len(found) == 1 and shard in self._open
        }
        if not alone:
            return None

        def age(shard: int) -> tuple[bool, int]:
            holder = alone[shard]
            is_prefetched = self._held[holder][0].shard != shard
            return is_prefetched, self._begun[holder]

        return self._hand_out(worker, min(alone, key=age), is_copy=True)

    def settle(self, receipt: Receipt) -> bool:
        """Note that a shard is written, and return whether this receipt is the first.

        A receipt counts even if its worker was given up before it arrived.
        """
        self._has_receipt = True
        self._release(receipt.worker, receipt.shard)
        if receipt.shard not in self._open and receipt.shard not in self._failed:
            return False
        self._open.discard(receipt.shard)
        self._waiting.discard(receipt.shard)
        self._failed.pop(receipt.shard, None)
        return True

    def note_computed(self, shard: int) -> None:
        """Note that all images of a shard are computed, so that it is not to blame from now on."""
        self._computed.add(shard)

    def lose(
        self, worker: int, error: str, *, suspects: Iterable[bytes] = (), counts: bool = True
    ) -> tuple[Lease, ...]:
        """Take back the leases of a worker that died, and return them.

        Args:
            worker: Number of the worker.
            error: What happened to it, in one sentence.
            suspects: Full paths of the images that it was decoding.
            counts: Whether a shard may be to blame: the oldest one whose images are not all
                computed. A machine that was taken away is no fault of a shard.
        """
        leases = tuple(self._held.pop(worker, ()))
        self._begun.pop(worker, None)
        self._suspects.update(dict.fromkeys(suspects))
        if leases and counts:
            shards = [lease.shard for lease in leases]
            shard = next((each for each in shards if each not in self._computed), shards[0])
            self._losses[shard] = self._losses.get(shard, 0) + 1
            self._errors[shard] = error
        for lease in leases:
            if lease.shard in self._open and not self._is_held(lease.shard):
                self._put_back(lease.shard)
        return leases

    def _hand_out(self, worker: int, shard: int, *, is_copy: bool = False) -> Lease:
        attempt = self._losses.get(shard, 0) + 1
        lease = Lease(shard, attempt, is_copy, tuple(self._suspects))
        held = self._held.setdefault(worker, [])
        held.append(lease)
        if len(held) == 1:
            self._start(worker)
        return lease

    def _start(self, worker: int) -> None:
        self._tick += 1
        self._begun[worker] = self._tick

    def _put_back(self, shard: int) -> None:
        if self._losses.get(shard, 0) >= self._attempts:
            self._open.remove(shard)
            self._failed[shard] = self._errors[shard]
        else:
            self._waiting.add(shard)
            heapq.heappush(self._queue, shard)

    def _release(self, worker: int, shard: int) -> None:
        held = self._held.get(worker, [])
        rest = [lease for lease in held if lease.shard != shard]
        if not rest:
            self._held.pop(worker, None)
            self._begun.pop(worker, None)
            return
        self._held[worker] = rest
        if rest[0] != held[0]:
            self._start(worker)

    def _is_held(self, shard: int) -> bool:
        return any(lease.shard == shard for leases in self._held.values() for lease in leases)
