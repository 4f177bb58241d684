"""What README and guides show is what happens."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import check_prose
import numpy as np
import pytest
from support.pictures import noise

import extractor
from extractor.cli.main import VERBS
from extractor.terminal.parser import build_parser

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = check_prose.pages()


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a page in a language."""
    pattern = rf"^```{language}\n(.*?)^```$"
    return re.findall(pattern, page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text("utf-8")):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("name", ["README.md", "docs/usage.md", "docs/models.md"])
def test_every_shown_command_parses(name: str) -> None:
    shown = re.findall(r"^\$ (.*)$", "".join(blocks(ROOT / name, "console")), re.MULTILINE)
    lines = ["extract --help", *"".join(blocks(ROOT / name, "sh")).splitlines(), *shown]
    for line in lines[1:]:
        words = shlex.split(line, comments=True)
        if words[:1] == ["extract"] and words[1] not in VERBS:
            parsed = vars(build_parser().parse_args(words[1:]))
            assert parsed.get("inputs") or parsed.get("image_list"), line


def test_readme_shows_eight_options_that_exist() -> None:
    section = README.read_text("utf-8").partition("## Eight options")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `-")]
    known = {flag for action in build_parser()._actions for flag in action.option_strings}
    assert len(rows) == 8
    for row in rows:
        assert set(re.findall(r"`(--?[\w-]+)`", row.split("|")[1])) <= known, row


def test_readme_search_finds_other_images_best_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = next(block for block in blocks(README, "python") if "store.search" in block)
    (folder,) = re.findall(r'open\("(.*?)"\)', code)
    (query,) = re.findall(r'search\("(.*?)"', code)
    (tmp_path / "images" / query).parent.mkdir(parents=True)
    for number in range(8):
        noise(number, 40, 30).save(tmp_path / "images" / f"{number}.png")
    noise(99, 40, 30).save(tmp_path / "images" / query)
    noise(99, 40, 30).save(tmp_path / "images" / "copy.png")
    monkeypatch.chdir(tmp_path)
    extractor.extract("images", model="test_resnet", weights="random", out=folder, device="cpu")

    exec(compile(code, README.name, "exec"), {})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert float(lines[0][0]) > 0.99  # the same pixels, but for the compression
    assert lines[0][1] == "copy.png"
    similarities = [float(similarity) for similarity, _ in lines]
    assert len(lines) == 5
    assert np.all(np.diff(similarities) <= 0)


def test_readme_shows_as_many_neighbors_as_its_code_prints() -> None:
    text = README.read_text("utf-8")
    after = text.partition("store.search(")[2]
    (count,) = re.findall(r"^\S+, k=(\d+)\)", after, re.M)
    output = re.findall(r"^```\w*\n(.*?)^```$", after.partition("```\n")[2], re.M | re.S)[0]
    assert len(output.splitlines()) == int(count)
