"""``failures.jsonl`` survives a round trip, and damage to it is reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from extractor.errors import StoreError
from extractor.store.failures import FailureRecord, failure_lines, read_failures

FAILURES = [
    FailureRecord(b"a/\xff.jpg", "truncated", "got 3 bytes\nexpected 9", 3, 10**18),
    FailureRecord("ä".encode(), "empty", "0 µ"),
]


@pytest.mark.parametrize("failures", [[], FAILURES[:1], FAILURES])
def test_failures_survive_a_round_trip(tmp_path: Path, failures: list[FailureRecord]) -> None:
    path = tmp_path / "failures.jsonl"
    path.write_bytes(failure_lines(failures))
    assert path.read_bytes().isascii()
    assert read_failures(path) == failures


@pytest.mark.parametrize("content", [b"{", b"[]\n", b'{"path": "a"}\n', b"3\n", b"\xff\n"])
def test_damaged_failures_are_rejected(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "failures.jsonl"
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"failures\.jsonl is damaged"):
        read_failures(path)


def test_record_survives_a_round_trip_through_json_values() -> None:
    for failure in FAILURES:
        assert FailureRecord.from_list(failure.to_list()) == failure
