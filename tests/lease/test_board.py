"""The board: every shard is settled once or given up, whatever happens to the workers."""

from __future__ import annotations

import os
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from extractor.lease.board import HOPELESS_SHARDS, Board
from extractor.lease.lease import Lease, Receipt

EXAMPLES = int(os.environ.get("EXTRACTOR_TEST_EXAMPLES", "15"))
WORKERS = 4


def receipt_of(lease: Lease, worker: int) -> Receipt:
    return Receipt(lease.shard, 8, 0, {"model": 0.1}, 0.1, worker=worker)


def take(board: Board, worker: int, *, ahead: bool = False, idle: int = 0) -> Lease:
    lease = board.take(worker, ahead=ahead, idle=idle)
    assert lease is not None
    return lease


class Workers(RuleBasedStateMachine):
    """Workers that take, finish, prefetch, race, die and report late, in any order."""

    @initialize(shards=st.integers(0, 7), attempts=st.integers(1, 3))
    def begin(self, shards: int, attempts: int) -> None:
        self.board = Board(range(shards), attempts=attempts)
        self.shards = shards
        self.attempts = attempts
        self.held: dict[int, list[Lease]] = {worker: [] for worker in range(WORKERS)}
        self.ghosts: list[tuple[int, Lease]] = []  # leases of dead workers, which may yet report
        self.settled: list[int] = []
        self.losses: Counter[int] = Counter()
        self.suspects: set[bytes] = set()
        self.late: set[int] = set()  # given up, and settled by a late receipt

    @rule(worker=st.integers(0, WORKERS - 1), ahead=st.booleans(), idle=st.integers(0, 2))
    def take(self, worker: int, ahead: bool, idle: int) -> None:
        held, waiting = self.held[worker], self.board.waiting
        lease = self.board.take(worker, ahead=ahead, idle=idle)
        may = not held or (ahead and len(held) == 1 and waiting > idle)
        if held and waiting:  # what failed is leased alone
            taken = {each.shard for each in self.all_held()}
            shards = (n for n in range(self.shards) if self.is_open(n) and n not in taken)
            may = may and not (self.losses[held[0].shard] or self.losses[min(shards)])
        assert (lease is not None) == (may and waiting > 0)
        if lease is not None:
            self.check(lease)
            assert not lease.is_copy
            assert lease.shard not in {each.shard for each in self.all_held()}
            held.append(lease)

    @rule(worker=st.integers(0, WORKERS - 1))
    def copy(self, worker: int) -> None:
        lease = self.board.copy_for(worker)
        holders = Counter(each.shard for each in self.all_held())
        open_alone = {
            shard for shard, count in holders.items() if count == 1 and self.is_open(shard)
        }
        may = not self.board.waiting and not self.held[worker] and open_alone
        assert (lease is not None) == bool(may)
        if lease is not None:
            self.check(lease)
            assert lease.is_copy
            assert lease.shard in open_alone
            self.held[worker].append(lease)

    @rule(worker=st.integers(0, WORKERS - 1), second=st.booleans())
    def finish(self, worker: int, second: bool) -> None:
        if self.held[worker]:
            lease = self.held[worker].pop(-1 if second else 0)
            self.report(worker, lease)

    @rule(
        worker=st.integers(0, WORKERS - 1),
        counts=st.booleans(),
        suspects=st.sets(st.sampled_from([b"a", b"b", b"c"])),
    )
    def die(self, worker: int, counts: bool, suspects: set[bytes]) -> None:
        leases = self.held[worker]
        assert self.board.lose(worker, "killed", suspects=suspects, counts=counts) == tuple(leases)
        self.losses.update(lease.shard for lease in leases[:1] if counts)
        self.suspects |= suspects
        self.ghosts += [(worker, lease) for lease in leases]
        self.held[worker] = []

    @rule(data=st.data())
    def report_late(self, data: st.DataObject) -> None:
        """A worker was taken for dead, and its receipt arrives after all."""
        held = {(worker, each.shard) for worker in self.held for each in self.held[worker]}
        late = [each for each in self.ghosts if (each[0], each[1].shard) not in held]
        if late:
            worker, lease = data.draw(st.sampled_from(late))
            self.ghosts.remove((worker, lease))
            self.report(worker, lease)

    def report(self, worker: int, lease: Lease) -> None:
        is_first = self.board.settle(receipt_of(lease, worker))
        assert is_first == (lease.shard not in self.settled)
        if is_first:
            self.settled.append(lease.shard)

    def check(self, lease: Lease) -> None:
        assert self.is_open(lease.shard)
        assert lease.attempt == self.losses[lease.shard] + 1
        assert set(lease.suspects) == self.suspects

    def all_held(self) -> list[Lease]:
        return [lease for leases in self.held.values() for lease in leases]

    def is_open(self, shard: int) -> bool:
        return shard not in self.settled and shard not in self.board.failed

    @invariant()
    def every_shard_is_somewhere(self) -> None:
        if not hasattr(self, "board"):
            return
        running = {lease.shard for lease in self.all_held() if self.is_open(lease.shard)}
        counts = (len(self.settled), len(self.board.failed), len(running), self.board.waiting)
        assert sum(counts) == self.shards
        assert self.board.is_done == (not running and not self.board.waiting)
        assert self.board.running == {w: tuple(held) for w, held in self.held.items() if held}
        for shard in self.board.failed:
            assert self.losses[shard] >= self.attempts

    def teardown(self) -> None:
        """The workers that are left complete the run."""
        if not hasattr(self, "board"):
            return
        for worker in range(WORKERS):
            while self.held[worker]:
                self.finish(worker, second=False)
        while lease := self.board.take(0):
            self.report(0, lease)
        assert self.board.is_done
        assert sorted([*self.settled, *self.board.failed]) == list(range(self.shards))


def test_every_shard_is_settled_once_or_given_up() -> None:
    run_state_machine_as_test(
        Workers, settings=settings(max_examples=EXAMPLES * 4, stateful_step_count=40, deadline=None)
    )


def test_shards_go_out_in_their_order() -> None:
    board = Board([7, 2, 5])

    assert [take(board, worker).shard for worker in range(3)] == [2, 5, 7]
    assert board.take(3) is None


def test_a_worker_prefetches_only_what_nobody_else_needs() -> None:
    board = Board(range(4))
    take(board, 0)

    assert board.take(0) is None  # it has one, and asks for no second
    assert board.take(0, ahead=True, idle=3) is None
    assert take(board, 0, ahead=True, idle=2).shard == 1
    assert board.take(0, ahead=True) is None  # two are all that it may hold


def test_a_lost_shard_goes_out_first_and_with_the_suspects_of_its_worker() -> None:
    board = Board(range(5))
    take(board, 0)
    take(board, 0, ahead=True)

    lost = board.lose(0, "killed by signal 9", suspects=[b"/bad.jpg"])

    assert [lease.shard for lease in lost] == [0, 1]
    assert take(board, 1) == Lease(0, attempt=2, suspects=(b"/bad.jpg",))
    assert take(board, 2) == Lease(1, attempt=1, suspects=(b"/bad.jpg",))


def test_a_shard_fails_after_three_attempts_and_the_others_complete() -> None:
    board = Board(range(2))
    for attempt in (1, 2, 3):
        assert take(board, attempt).attempt == attempt
        board.lose(attempt, f"error {attempt}")
    board.settle(receipt_of(take(board, 9), 9))

    assert board.is_done
    assert dict(board.failed) == {0: "error 3"}


def test_a_preempted_worker_does_not_count() -> None:
    board = Board(range(1))
    for worker in range(10):
        assert take(board, worker).attempt == 1
        board.lose(worker, "preempted", counts=False)

    assert board.waiting == 1
    assert not board.failed


def test_a_shard_is_not_given_up_while_a_copy_runs() -> None:
    board = Board(range(1), attempts=1)
    take(board, 0)
    copy = board.copy_for(1)
    assert copy == Lease(0, is_copy=True)

    board.lose(0, "killed")

    assert not board.is_done
    assert not board.failed
    assert board.settle(receipt_of(copy, 1))


def test_a_copy_is_of_the_shard_that_runs_for_longest() -> None:
    board = Board(range(4))
    first, second = take(board, 0), take(board, 1)
    prefetched = take(board, 0, ahead=True)
    board.settle(receipt_of(first, 0))  # worker 0 begins its second shard after worker 1 its first
    take(board, 2)

    copies = [board.copy_for(worker) for worker in (3, 4, 5, 6)]

    assert [copy and copy.shard for copy in copies] == [second.shard, prefetched.shard, 3, None]


def test_a_receipt_for_a_prefetched_shard_does_not_rejuvenate_the_first() -> None:
    board = Board(range(3))
    take(board, 0)
    prefetched = take(board, 0, ahead=True)
    take(board, 1)
    board.settle(receipt_of(prefetched, 0))

    copy = board.copy_for(2)
    assert copy is not None
    assert copy.shard == 0


def test_a_copy_prefers_what_runs_to_what_is_prefetched() -> None:
    board = Board(range(3))
    take(board, 0)
    take(board, 0, ahead=True)
    take(board, 1)

    copies = [board.copy_for(worker) for worker in (2, 3, 4)]

    assert [copy and copy.shard for copy in copies] == [0, 2, 1]


def test_there_is_no_copy_while_a_shard_waits() -> None:
    board = Board(range(2))
    take(board, 0)

    assert board.copy_for(1) is None
    take(board, 1)
    assert board.copy_for(1) is None  # it has a shard of its own


def test_the_first_receipt_wins() -> None:
    board = Board(range(1))
    original = take(board, 0)
    copy = board.copy_for(1)
    assert copy is not None

    assert board.settle(receipt_of(copy, 1))
    assert board.is_done
    assert list(board.running) == [0]
    assert not board.settle(receipt_of(original, 0))
    assert not board.running


def test_a_late_receipt_settles_a_shard_that_was_given_up() -> None:
    board = Board(range(1), attempts=1)
    lease = take(board, 0)
    board.lose(0, "not heard of for 60 s")
    assert board.failed

    assert board.settle(receipt_of(lease, 0))
    assert not board.failed


def test_a_run_without_shards_is_done() -> None:
    assert Board([]).is_done


@pytest.mark.parametrize("shards", [15_259])
def test_a_board_holds_the_shards_of_a_billion_images(shards: int) -> None:
    board = Board(range(shards))
    settled = 0
    while lease := board.take(settled % 64):
        settled += board.settle(receipt_of(lease, settled % 64))

    assert (settled, board.is_done) == (shards, True)


def test_shard_whose_images_are_computed_is_not_to_blame() -> None:
    board = Board(range(3))
    assert (board.take(0), board.take(0, ahead=True)) == (Lease(0), Lease(1))
    board.note_computed(0)
    board.lose(0, "killed")
    assert board.take(0) == Lease(0)


def test_shard_that_failed_is_leased_alone() -> None:
    board = Board(range(4))
    assert (board.take(0), board.take(0, ahead=True)) == (Lease(0), Lease(1))
    board.lose(0, "killed")
    assert (board.take(0), board.take(0, ahead=True)) == (Lease(0, attempt=2), None)
    assert (board.take(1), board.take(1, ahead=True)) == (Lease(1), Lease(2))
    board.settle(Receipt(0, 1, 0, {}, 0.0, worker=0))
    board.lose(1, "killed")
    assert (board.take(0), board.take(0, ahead=True)) == (Lease(1, attempt=2), None)


def test_every_worker_gets_a_lease_before_any_gets_a_second() -> None:
    board = Board(range(6))
    handed = [(worker, lease.shard) for worker, lease in board.hand_out([0, 1], workers=3)]
    assert handed == [(0, 0), (1, 1), (0, 2)]  # three shards stay for the workers that start


def test_run_is_hopeless_once_all_shards_failed_and_none_was_written() -> None:
    boards = [Board(range(9), attempts=1) for _ in range(2)]
    boards[1].settle(receipt_of(take(boards[1], 0), 0))
    for _ in range(HOPELESS_SHARDS):
        assert not any(board.is_hopeless for board in boards)
        for board in boards:
            take(board, 0)
            board.lose(0, "broken")
    assert [board.is_hopeless for board in boards] == [True, False]
