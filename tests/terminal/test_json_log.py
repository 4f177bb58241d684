"""Lines of the log for programs."""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

import pytest

from extractor.terminal.json_log import Events


def test_lines_of_several_threads_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [letter * 10_000 for letter in "abcd"]  # more than a stream keeps in its buffer
    events = Events()
    events.wanted = True

    def write(message: str) -> None:
        for number in range(50):
            events.write("output", message=message, number=number)

    lines: list[dict[str, Any]] = []
    ours, theirs = os.pipe()  # holds 64 KiB, so that threads wait while they write
    with os.fdopen(theirs, "w") as log, os.fdopen(ours, encoding="utf-8") as read:
        monkeypatch.setattr(sys, "stderr", log)
        threads = [threading.Thread(target=write, args=(text,), daemon=True) for text in messages]
        for thread in threads:
            thread.start()
        for _ in range(50 * len(messages)):
            lines.append(json.loads(read.readline()))
        for thread in threads:
            thread.join()
    for message in messages:
        assert [line["number"] for line in lines if line["message"] == message] == [*range(50)]
