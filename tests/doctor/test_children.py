"""Checks in child processes: a crash, a hang or an error ends one group only."""

from __future__ import annotations

from pathlib import Path

import pytest

from extractor.doctor import children
from extractor.doctor.children import examine

CHECKS = {
    "crash": "    os.abort()\n",
    "exit": "    os._exit(3)\n",
    "leave": "    sys.exit(4)\n",
    "hang": "    time.sleep(100)\n",
    "error": "    raise ValueError('odd')\n",
    "noise": "    print('noise'); os.system('echo noise')\n    yield Finding('second', 'ok', '')\n"
    "    yield Finding('third', 'ok', '')\n",
}


@pytest.mark.parametrize(
    ("group", "state", "text"),
    [
        ("crash", "broken", "ended the interpreter by signal SIGABRT"),
        ("exit", "broken", "ended the interpreter with exit code 3"),
        ("leave", "broken", "ended the interpreter with exit code 4"),
        ("hang", "broken", "no answer within 2 seconds"),
        ("error", "broken", "ValueError: odd"),
        ("noise", "ok", ""),
    ],
)
def test_end_of_a_child_is_a_finding_of_its_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str, state: str, text: str
) -> None:
    code = (
        "import os, sys, time\n"
        "from extractor.doctor.finding import Finding\n"
        "def check(_):\n"
        "    yield 'first'\n    yield Finding('first', 'ok', 'works')\n    yield 'second'\n"
    )
    (tmp_path / "checks_of_a_test.py").write_text(code + CHECKS[group])
    monkeypatch.syspath_prepend(tmp_path)
    group_of_three = ("checks_of_a_test:check", ("first", "second", "third"))
    monkeypatch.setattr(children, "GROUPS", {"group": group_of_three, "out": ("", ())})
    # The child looks its group up by itself.
    child = children.CHILD.replace(
        "from extractor.doctor.children import report",
        f"from extractor.doctor import children\nchildren.GROUPS['group'] = {group_of_three!r}\n"
        "report = children.report",
    )
    monkeypatch.setattr(children, "CHILD", child)
    first, second, *rest = examine(None, limit_seconds=2)
    assert (first.name, first.state, first.text) == ("first", "ok", "works")
    assert (second.name, second.state, second.text) == ("second", state, text)
    others = [(each.name, each.state, each.text) for each in rest]
    if group == "noise":
        assert others == [("third", "ok", "")]
    elif group == "error":  # the child ends as it should
        assert others == []
    else:
        assert others == [("third", "warning", "not checked: second failed")]
