"""A small store of generated images, and a client of its page."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.pictures import noise

from extractor import extract

NEEDED = ("starlette", "uvicorn", "httpx")
if not all(importlib.util.find_spec(name) for name in NEEDED):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``images`` and the store ``out``: six rows, two the same, and a failure."""
    folder = tmp_path_factory.mktemp("view")
    for number in range(5):
        path = folder / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(number, 40, 30 + 60 * (number == 2)).save(path)
    noise(3, 40, 30).save(folder / "images" / "copy.png")
    (folder / "images" / "broken.png").write_bytes(b"no image")
    extract(folder / "images", "test_resnet", folder / "out", weights="random", device="cpu")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """The same as ``made``, to be changed. The store still names the images of ``made``."""
    shutil.copytree(made, tmp_path / "view", ignore=shutil.ignore_patterns("derived"))
    return tmp_path / "view"


@pytest.fixture
def app(folder: Path) -> Any:
    """The page of ``folder``, without a token."""
    from extractor import view_app

    return view_app(folder / "out", root=folder / "images", device="cpu")


@pytest.fixture
def client(app: Any) -> Any:
    """Client of the page of ``folder``."""
    from starlette.testclient import TestClient

    return TestClient(app)
