"""Every snippet of the guide to other tools runs where the tool is installed."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.pictures import noise

from extractor import FeatureStore, extract
from extractor.cli import main as cli

GUIDE = Path(__file__).parents[2] / "docs" / "integrations.md"
NAMES = [f"cats/{i:02}.jpg".encode() for i in range(5)] + [b"cats/tom.jpg", b"dogs/00.jpg"]


def sections() -> dict[str, list[tuple[str, str]]]:
    """(language, content) of the fenced blocks of each section, by its title."""
    parts = re.split(r"^## (.*)$", GUIDE.read_text("utf-8"), flags=re.MULTILINE)
    pairs = zip(["", *parts[1::2]], parts[::2], strict=True)
    pattern = r"^```(\w*)\n(.*?)^```$"
    return {title: re.findall(pattern, text, re.M | re.S) for title, text in pairs}


SECTIONS = sections()
OWN = {"Follow a growing folder", ""}
RUN = [title for title, found in SECTIONS.items() if any(kind == "python" for kind, _ in found)]


@pytest.fixture
def folder(
    tmp_path: Path, write_store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A store as the guide assumes it."""
    rows = np.random.default_rng(0).standard_normal((7, 2048), np.float32)
    write_store(tmp_path / "features" / "resnet50", [rows[:4], rows[4:]], names=[
        NAMES[:4], NAMES[4:]
    ])  # fmt: skip
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_commands(content: str) -> None:
    for line in content.splitlines():
        command, *words = shlex.split(line)
        assert command == "extract"
        assert cli.main(words) == 0, line


def imported(code: str) -> set[str]:
    """Packages that a snippet imports."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("title", sorted(set(RUN) - OWN))
def test_snippets_of_a_tool_run(folder: Path, title: str) -> None:
    code = "".join(content for language, content in SECTIONS[title] if language == "python")
    for name in sorted(imported(code)):
        pytest.importorskip(name)
    store = FeatureStore.open("features/resnet50")
    names: dict[str, Any] = {"store": store}
    for language, content in [*SECTIONS[""], *SECTIONS[title]]:
        if language == "sh":
            run_commands(content)
        elif language == "python":
            exec(compile(content, f"{GUIDE.name}: {title}", "exec"), names)
    if "rows" in names and title != "embedding-reader":
        np.testing.assert_array_equal(np.asarray(names["rows"]), store.features[:])
    if "nearest" in names:
        near = [each["path"] if isinstance(each, dict) else each for each in names["nearest"]]
        near = [each[0] if isinstance(each, tuple) else each for each in near]
        rows = store.features[:] / np.linalg.norm(store.features[:], axis=1, keepdims=True)
        order = np.argsort(-rows @ rows[store.index_of("cats/tom.jpg")])[:5]
        assert near == [store.paths[row] for row in order]


def test_snippets_of_a_growing_folder_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    noise(0, 40, 40).save(tmp_path / "images" / "0.png")
    noise(1, 40, 40).save(tmp_path / "images" / "1.png")
    options: dict[str, Any] = {"weights": "random", "device": "cpu", "retire": True}
    extract("images", "test_resnet", "features/resnet50", **options)
    run_commands(SECTIONS[""][-1][1])
    (tmp_path / "images" / "0.png").unlink()
    noise(2, 40, 40).save(tmp_path / "images" / "2.png")
    extract("images", "test_resnet", "features/resnet50", **options)
    (_, commands), (_, code) = SECTIONS["Follow a growing folder"]
    token = json.loads((tmp_path / "vectors" / "_export.json").read_text())["token"]
    line = commands.splitlines()[1].replace('"$(jq -r .token vectors/_export.json)"', token)
    run_commands(line)
    names: dict[str, Any] = {}
    exec(compile(code, GUIDE.name, "exec"), names)
    assert names["changes"]["removed"] == [0]
    assert names["changes"]["token"] == FeatureStore.open("features/resnet50").token
    assert importlib.import_module("pyarrow.parquet").read_table("step1")["path"].to_pylist() == [
        "2.png"
    ]
