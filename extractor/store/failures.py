"""Images without a row: ``failures.jsonl``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from extractor.errors import StoreDamagedError

__all__ = ["FailureRecord", "failure_lines", "read_failures"]


class FailureRecord(NamedTuple):
    """One image without a row.

    Attributes:
        path: path relative to the root.
        reason: one word for programs.
        message: one sentence for people.
        size: bytes of the file when it failed, -1 if unknown.
        mtime_ns: modification time of the file when it failed, -1 if unknown.
    """

    path: bytes
    reason: str
    message: str
    size: int = -1
    mtime_ns: int = -1

    def to_list(self) -> list[str | int]:
        """Return the values in a form that JSON can hold."""
        return [os.fsdecode(self.path), *self[1:]]

    @classmethod
    def from_list(cls, values: Sequence[Any]) -> FailureRecord:
        """Return the record that :meth:`to_list` took apart."""
        return cls(os.fsencode(values[0]), *values[1:])


def failure_lines(failures: Iterable[FailureRecord]) -> bytes:
    """Return the content of ``failures.jsonl``: one JSON object per line, in ASCII."""
    lines = []
    for failure in failures:
        entry = {
            "path": os.fsdecode(failure.path),
            "error": failure.reason,
            "message": failure.message,
            "size": failure.size,
            "mtime_ns": failure.mtime_ns,
        }
        lines.append(json.dumps(entry, ensure_ascii=True) + "\n")
    return "".join(lines).encode("ascii")


def read_failures(path: Path) -> list[FailureRecord]:
    """Read a file that :func:`failure_lines` wrote.

    Raises:
        StoreDamagedError: the file holds something else.
        OSError: the file cannot be read.
    """
    keys = ("error", "message", "size", "mtime_ns")
    try:
        entries = [json.loads(line) for line in path.read_bytes().splitlines()]
        return [
            FailureRecord(os.fsencode(entry["path"]), *(entry[key] for key in keys))
            for entry in entries
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreDamagedError(f"{path} is damaged: {error}") from error
