from __future__ import annotations

import re

import generate_docs
import pytest

from extractor.cli.main import VERBS
from extractor.images.formats import candidate_suffixes


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


def test_table_of_formats_is_up_to_date() -> None:
    text = generate_docs.PIXELS.read_text("utf-8")
    if generate_docs.FORMATS_BEGIN.format(version=generate_docs.PILLOW_MAJOR) not in text:
        pytest.skip("the table was made with another version of Pillow")
    assert text == generate_docs.pixels_page(text), "run python scripts/generate_docs.py"


def test_table_of_formats_lists_every_suffix_that_counts() -> None:
    cells = re.findall(r"`(\.\w+)`", generate_docs.formats_table())
    assert len(cells) == len(set(cells))
    assert set(cells) | {".fpx", ".mic"} >= candidate_suffixes() >= set(cells)


def test_cli_docs_describe_every_verb() -> None:
    text = generate_docs.command_line()
    assert all(f"### `extract {verb}`\n" in text for verb in VERBS)
    assert "| `--speed`, `--no-speed` |" in text  # a switch that can be turned off by name


def test_check_fails_on_an_outdated_file(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: generate_docs.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(generate_docs, "ROOT", tmp_path)
    monkeypatch.setattr(generate_docs, "ARGUMENTS", tmp_path / "a.py")
    monkeypatch.setattr(generate_docs, "COMMAND_LINE", tmp_path / "a.md")
    monkeypatch.setattr(generate_docs, "PIXELS", tmp_path / "pixels.md")
    (tmp_path / "pixels.md").write_text(
        generate_docs.FORMATS_BEGIN.format(version=1) + generate_docs.FORMATS_END
    )
    assert generate_docs.main([]) == 0
    assert generate_docs.main(["--check"]) == 0
    (tmp_path / "a.md").write_text("old")
    assert generate_docs.main(["--check"]) == 1
    assert "a.md is out of date" in capsys.readouterr().out
