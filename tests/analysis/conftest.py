"""Fixtures of small stores, and of images that come and go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.networks import mean_pixel
from support.stores import describe_store, fill, make_records, parts, tree, write_store
from support.vectors import make_store

from extractor import extract
from extractor.reading.reader import FeatureStore

__all__ = [
    "describe_store",
    "fill",
    "make_records",
    "make_store",
    "parts",
    "tree",
    "write_store",
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep nothing in the cache of the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Pictures:
    """Images of one color each, and the store of their embeddings."""

    def __init__(self, folder: Path) -> None:
        self.images, self.out = folder / "images", folder / "store"

    def add(self, name: str, color: tuple[int, int, int], size: tuple[int, int] = (64, 48)) -> Path:
        path = self.images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, color).save(path)
        return path

    def run(self, **options: Any) -> FeatureStore:
        return extract(self.images, mean_pixel(), self.out, device="cpu", **options).store


@pytest.fixture
def pictures(tmp_path: Path) -> Pictures:
    """Four red and four blue images in two folders."""
    made = Pictures(tmp_path)
    for i in range(4):
        made.add(f"red/{i}.png", (250, 30 * i, 10), (64, 48))
        made.add(f"blue/{i}.png", (10, 40 * i, 250), (30, 60))
    return made
