"""Workers on this machine: every shard is computed once, whatever happens to them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from support import fake_worker
from support.fake_worker import FakeSetup

from extractor.errors import ExtractorError, InterruptedRunError, UsageError
from extractor.lease.board import HOPELESS_SHARDS, Board
from extractor.lease.lease import Receipt
from extractor.workers import local
from extractor.workers.local import LocalWorkers


class Heard:
    """Keeps all that an engine says."""

    def __init__(self, ticks: int = 10**9) -> None:
        self.receipts: list[Receipt] = []
        self.done: dict[int, int] = {}
        self.suspects: list[bytes] = []
        self.warnings: list[str] = []
        self._ticks = ticks

    def on_batch(self, worker: int, shard: int, done: int, failed: int) -> None:
        self.done[shard] = done

    def on_receipt(self, receipt: Receipt) -> None:
        self.receipts.append(receipt)

    def on_suspects(self, worker: int, suspects: list[bytes]) -> None:
        self.suspects += suspects

    def on_warning(self, worker: int, message: str) -> None:
        self.warnings.append(message)

    def on_tick(self) -> None:
        self._ticks -= 1
        if self._ticks <= 0:
            raise InterruptedRunError(0, 1)


@pytest.fixture(autouse=True)
def fake_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "START", fake_worker.START)


def workers(
    folder: Path, board: Board, heard: Heard, count: int = 2, **changes: Any
) -> LocalWorkers:
    setups = [FakeSetup(folder / f"in-flight-{number}", **changes) for number in range(count)]
    return LocalWorkers(cast(Any, setups), board, heard)


def children() -> set[str]:
    """Process ids of the children of this process."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_every_shard_has_one_receipt(tmp_path: Path) -> None:
    before, heard = children(), Heard()
    workers(tmp_path, Board(range(20)), heard, count=3).run()
    assert sorted(receipt.shard for receipt in heard.receipts) == list(range(20))
    assert {receipt.worker for receipt in heard.receipts} <= {0, 1, 2}
    assert heard.done == dict.fromkeys(range(20), 3)
    assert children() == before


def test_killed_worker_costs_no_shard(tmp_path: Path) -> None:
    board, heard = Board(range(8)), Heard()
    workers(tmp_path, board, heard, deaths={0: 1, 3: 2, 7: 1}).run()
    assert sorted(receipt.shard for receipt in heard.receipts) == list(range(8))
    assert not board.failed
    assert set(heard.suspects) == {b"/images/0.jpg", b"/images/3.jpg", b"/images/7.jpg"}
    assert sum("SIGKILL" in message for message in heard.warnings) == 4


def test_shard_that_fails_three_times_is_left_out(tmp_path: Path) -> None:
    board, heard = Board(range(6)), Heard()
    workers(tmp_path, board, heard, deaths={2: 3}).run()
    assert sorted(receipt.shard for receipt in heard.receipts) == [0, 1, 3, 4, 5]
    assert list(board.failed) == [2]
    assert "SIGKILL" in board.failed[2]


def test_run_ends_early_if_every_shard_fails(tmp_path: Path) -> None:
    board, heard = Board(range(50)), Heard()
    workers(tmp_path, board, heard, deaths=dict.fromkeys(range(50), 3)).run()
    assert not heard.receipts
    assert HOPELESS_SHARDS <= len(board.failed) < 10


@pytest.mark.parametrize(
    ("kind", "expected", "message"),
    [
        ("UsageError", UsageError, "^not the same weights$"),
        ("DeviceError", ExtractorError, "^no worker could start: not the same weights$"),
        ("KeyError", ExtractorError, "^no worker could start: not the same weights$"),
    ],
)
def test_error_before_the_first_shard_ends_the_run(
    tmp_path: Path, kind: str, expected: type[Exception], message: str
) -> None:
    engine = workers(tmp_path, Board([0]), Heard(), failure=(kind, "not the same weights"))
    with pytest.raises(expected, match=message):
        engine.run()


def test_worker_that_cannot_start_leaves_the_run_to_others(tmp_path: Path) -> None:
    heard = Heard()
    healthy = FakeSetup(tmp_path / "in-flight-0")
    broken = FakeSetup(tmp_path / "in-flight-1", failure=("DeviceError", "no memory"))
    LocalWorkers(cast(Any, [healthy, broken]), Board(range(30)), heard).run()
    assert len(heard.receipts) == 30
    expected = "worker 2 did not start (no memory); the run goes on without it"
    assert set(heard.warnings) <= {"the same for all", expected}


def test_workers_that_are_killed_at_the_start_are_tried_again(tmp_path: Path) -> None:
    heard = Heard()
    with pytest.raises(ExtractorError, match="no worker could start: SIGKILL, maybe out of"):
        workers(tmp_path, Board([0]), heard, count=1, dies_at_start=True).run()
    assert sum("takes its place" in message for message in heard.warnings) == 2


def test_interrupted_run_leaves_no_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "GRACE_SECONDS", 0.5)
    before = children()
    engine = workers(tmp_path, Board([0]), Heard(ticks=3), is_deaf=True)
    begun = time.monotonic()
    with pytest.raises(InterruptedRunError, match="stopped"):
        engine.run()
    assert time.monotonic() - begun < 30
    assert children() == before


@pytest.fixture
def interrupts() -> Iterator[None]:
    """An alarm interrupts, as Ctrl-C does in a notebook."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt("Ctrl-C")

    before = [signal.signal(number, interrupt) for number in (signal.SIGALRM, signal.SIGINT)]
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in zip((signal.SIGALRM, signal.SIGINT), before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("interrupts")
def test_second_ctrl_c_leaves_no_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "GRACE_SECONDS", 50)
    before = children()
    engine = workers(tmp_path, Board([0]), Heard(ticks=1), is_deaf=True)
    signal.setitimer(signal.ITIMER_REAL, 2)  # while it waits for the workers
    with pytest.raises(KeyboardInterrupt, match="Ctrl-C"):
        engine.run()
    assert children() == before


@pytest.mark.usefixtures("interrupts")
def test_ctrl_c_while_a_worker_starts_leaves_no_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "GRACE_SECONDS", 0.5)
    start = subprocess.Popen

    def popen(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        process = start(*arguments, **options)
        os.kill(os.getpid(), signal.SIGINT)
        return process

    monkeypatch.setattr(subprocess, "Popen", popen)
    before = children()
    with pytest.raises(KeyboardInterrupt, match="Ctrl-C"):
        workers(tmp_path, Board([0]), Heard(), is_deaf=True).run()
    assert children() == before
