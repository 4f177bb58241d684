from __future__ import annotations

import generate_docs
import pytest

from extractor.cli.main import VERBS


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (generate_docs.ARGUMENTS, generate_docs.option_arguments()),
        (generate_docs.COMMAND_LINE, generate_docs.command_line()),
    ],
    ids=["option_arguments.py", "cli.md"],
)
def test_generated_files_are_up_to_date(path: generate_docs.Path, text: str) -> None:
    assert path.read_text("utf-8") == text, "run python scripts/generate_docs.py"


def test_cli_docs_describe_every_verb() -> None:
    text = generate_docs.command_line()
    assert all(f"### `extract {verb}`\n" in text for verb in VERBS)


def test_check_fails_on_an_outdated_file(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: generate_docs.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(generate_docs, "ROOT", tmp_path)
    monkeypatch.setattr(generate_docs, "ARGUMENTS", tmp_path / "a.py")
    monkeypatch.setattr(generate_docs, "COMMAND_LINE", tmp_path / "a.md")
    assert generate_docs.main([]) == 0
    assert generate_docs.main(["--check"]) == 0
    (tmp_path / "a.md").write_text("old")
    assert generate_docs.main(["--check"]) == 1
    assert "a.md is out of date" in capsys.readouterr().out
