"""Fixtures of small stores."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.stores import describe_store, fill, make_records, parts, tree, write_store
from support.vectors import make_store

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
