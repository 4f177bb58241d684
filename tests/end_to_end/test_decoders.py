"""Files whose decoder is missing are failures until it is installed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.networks import mean_pixel
from support.tiffs import dng

from extractor import FeatureStore, extract
from extractor.images import plugins
from extractor.images.containers.kinds import RAW
from extractor.models import embedding

SIZES: dict[str, Any] = {"shard_images": 3, "batch_size": 2, "workers": 1, "device": "cpu"}


@pytest.fixture(autouse=True)
def mean_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "load", lambda *_: mean_pixel(size=(4, 4)))


@pytest.fixture
def without_rawpy(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Hide rawpy, and return a function that brings it back."""
    monkeypatch.setitem(sys.modules, RAW.module, None)
    plugins._import.cache_clear()

    def install() -> None:
        monkeypatch.undo()
        monkeypatch.setattr(embedding, "load", lambda *_: mean_pixel(size=(4, 4)))
        plugins._import.cache_clear()

    return install


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "in"
    made.mkdir()
    Image.new("RGB", (5, 5), (10, 10, 10)).save(made / "a.png")
    levels = np.full((64, 96, 3), 30000.0)
    (made / "b.dng").write_bytes(dng(levels, Image.new("RGB", (16, 12), (255, 0, 0))))
    (made / "c").write_bytes(dng(levels, Image.new("RGB", (16, 12), (255, 0, 0))))
    (made / "d.psb").write_bytes(b"8BPS\0\2" + bytes(100))
    (made / "notes.txt").write_text("text")
    return made


def failures_of(out: Path) -> dict[str, str]:
    entries = [json.loads(line) for line in (out / "failures.jsonl").read_bytes().splitlines()]
    return {entry["path"]: entry["error"] for entry in entries}


def test_files_without_their_decoder_are_failures(
    folder: Path, tmp_path: Path, without_rawpy: Callable[[], None]
) -> None:
    report = extract(folder, "mean", tmp_path / "out", **SIZES)
    assert (report.rows, report.failed, report.exit_code) == (1, 3, 3)
    assert failures_of(tmp_path / "out") == dict.fromkeys(("b.dng", "c", "d.psb"), "no-decoder")
    again = extract(folder, "mean", tmp_path / "out", **SIZES)
    assert (again.resumed, again.failed) == (4, 3)


def test_next_run_decodes_what_an_installed_extra_can_decode(
    folder: Path, tmp_path: Path, without_rawpy: Callable[[], None]
) -> None:
    out = tmp_path / "out"
    extract(folder, "mean", out, **SIZES)
    without_rawpy()
    pytest.importorskip("rawpy")
    report = extract(folder, "mean", out, **SIZES)
    assert report.stores[0].added == 2
    assert failures_of(out) == {"d.psb": "no-decoder"}
    store = FeatureStore.open(out)
    widths = dict(zip(store.paths, store.column("width"), strict=True))
    assert (widths["b.dng"], widths["c"]) == (96, 96)
    assert np.array_equal(store[store.index_of("b.dng")], store[store.index_of("c")])
    again = extract(folder, "mean", out, **SIZES)
    assert (again.resumed, again.stores[0].added) == (4, 0)
