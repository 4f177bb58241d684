"""Every command and every program of docs/search.md runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from support.pictures import noise

from extractor import extract
from extractor.cli import main as cli

GUIDE = Path(__file__).parents[2] / "docs" / "search.md"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of 12 cats and 13 dogs, and photos that it does not hold."""
    names = [f"cats/{i:02d}" for i in range(11)] + ["cats/tom"]
    names += [f"dogs/{i:02d}" for i in range(13)]
    for seed, name in enumerate(names):
        path = tmp_path / "images" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(seed, 32, 40).save(path)
    (tmp_path / "new-photos").mkdir()
    for seed, name in enumerate(["photo", "new-photos/a", "new-photos/b"], 100):
        noise(seed, 32, 40).save(tmp_path / f"{name}.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    extract("images", "test_resnet", "features/resnet50", weights="random", device="cpu")
    return tmp_path


def test_every_example_of_the_search_guide_runs(here: Path) -> None:
    pytest.importorskip("faiss")
    names = {"content": (here / "photo.jpg").read_bytes(), "picture": noise(1, 32, 40)}
    ran = {"sh": 0, "python": 0}
    for language, content in re.findall(
        r"^```(\w+)\n(.*?)^```$", GUIDE.read_text("utf-8"), re.MULTILINE | re.DOTALL
    ):
        ran[language] += 1
        if language == "python":
            exec(compile(content, GUIDE.name, "exec"), names)
        for line in content.splitlines() if language == "sh" else ():
            # 25 rows vary in 24 directions.
            for part in line.replace("--pca 256", "--pca 16").split("&&"):
                command, *words = shlex.split(part, comments=True)
                if command == "extract":
                    assert cli.main(words) == 0, line
    assert ran == {"sh": 3, "python": 1}
    assert (here / "hits.png").stat().st_size > 0
    assert len(list((here / "features/resnet50/derived").glob("*.faiss"))) == 3
