"""A store keeps the size of its shards; a new one takes it from its siblings or its images."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.networks import mean_pixel
from support.pictures import noise

from extractor import FeatureStore, extract
from extractor.errors import InterruptedRunError, StoreError
from extractor.images.listing import list_images
from extractor.models import embedding
from extractor.options import Options
from extractor.report import Progress, Report
from extractor.run.up_to_date import up_to_date_report
from extractor.store.format import RUN, with_checksum
from extractor.upkeep.compact import compact

CPU: dict[str, Any] = {"device": "cpu", "workers": 1}


@pytest.fixture(autouse=True)
def mean_model(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Models by name; the list holds the names that were loaded."""
    loaded: list[str] = []

    def load(model: str, *_: object) -> object:
        loaded.append(model)
        return mean_pixel(size=(8, 8) if model == "mean" else (4, 4))

    monkeypatch.setattr(embedding, "load", load)
    return loaded


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Seven images."""
    (tmp_path / "photos").mkdir()
    for i in range(7):
        noise(i, 8, 8).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


def sizes_of(out: Path) -> tuple[int, list[int]]:
    manifest = FeatureStore.open(out).manifest
    return manifest.description.shard_images, [shard.images for shard in manifest.shards]


def add(photos: Path, *names: str) -> None:
    for i, name in enumerate(names):
        noise(100 + i, 8, 8).save(photos / name)


def after(count: int) -> Callable[[], bool]:
    calls = iter(range(100))
    return lambda: next(calls) >= count


def test_new_store_is_cut_by_the_number_of_its_images(photos: Path, tmp_path: Path) -> None:
    extract(photos, "mean", tmp_path / "out", **CPU)
    assert sizes_of(tmp_path / "out") == (1024, [7])
    extract(photos, "mean", tmp_path / "large", batch_size=100, **CPU)
    assert sizes_of(tmp_path / "large") == (2048, [7])


def test_store_keeps_the_size_that_was_chosen_for_it(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    extract(photos, "mean", out, shard_images=3, batch_size=2, **CPU)
    add(photos, "7.png", "8.png", "9.png", "a.png")
    extract(photos, "mean", out, **CPU)
    assert sizes_of(out) == (3, [3, 3, 1, 3, 1])
    with pytest.raises(StoreError, match=r"shard_images: 3 there, 4 now.*with --shard-images 3"):
        extract(photos, "mean", out, shard_images=4, **CPU)
    extract(photos, "mean", out, overwrite=True, **CPU)
    assert sizes_of(out) == (1024, [11])


@pytest.mark.parametrize("overwrite", [False, True])
def test_interrupted_run_keeps_the_size_that_was_chosen_for_it(
    photos: Path, tmp_path: Path, overwrite: bool
) -> None:
    out = tmp_path / "out"
    with pytest.raises(InterruptedRunError, match="stopped after 5 of 7"):
        extract(photos, "mean", out, shard_images=3, batch_size=2, stop=after(6), **CPU)
    report = extract(photos, "mean", out, overwrite=overwrite, batch_size=2, **CPU)
    assert (report.resumed, report.rows) == (5, 7)
    assert sizes_of(out) == (3, [3, 3, 1])


def test_batch_that_was_chosen_fits_into_the_shards_of_the_store(
    photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    extract(photos, "mean", out, shard_images=3, batch_size=32, **CPU)
    add(photos, "7.png")
    report = extract(photos, "mean", out, batch_size=32, **CPU)
    assert report.stores[0].added == 1
    assert FeatureStore.open(out).manifest.description.computation["batch_size"] == 3


def test_new_store_takes_the_size_of_its_sibling_and_shares_its_pass(
    photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    extract(photos, "mean", out / "mean", shard_images=3, batch_size=2, **CPU)
    shutil.rmtree(photos)
    photos.mkdir()
    add(photos, "a.png", "b.png", "c.png", "d.png")
    reports: list[Progress] = []
    options: dict[str, Any] = {"retire": True, "progress": reports.append, **CPU}
    extract(photos, ["mean", "small"], out, **options)
    assert sizes_of(out / "mean") == (3, [3, 3, 1, 3, 1])
    assert sizes_of(out / "small") == (3, [3, 1])
    assert max(report.total for report in reports) == 4  # one pass fills both


def test_siblings_of_different_sizes_keep_theirs(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name, size in (("mean", 3), ("small", 5)):
        extract(photos, name, out / name, shard_images=size, batch_size=2, **CPU)
    add(photos, "7.png", "8.png", "9.png", "a.png")
    extract(photos, ["mean", "small"], out, **CPU)
    assert sizes_of(out / "mean") == (3, [3, 3, 1, 3, 1])
    assert sizes_of(out / "small") == (5, [5, 2, 4])
    for name in ("mean", "small"):
        extract(photos, name, tmp_path / "fresh", **CPU, overwrite=True)
        fresh, grown = (FeatureStore.open(tmp_path / "fresh"), FeatureStore.open(out / name))
        assert np.array_equal(fresh.features[:], grown.features[np.argsort(grown.paths)])


@pytest.mark.parametrize(("size", "after_growth"), [(3, 3), (1024, 1024), (65_536, 1024)], ids=str)
def test_compact_chooses_anew_unless_the_size_is_a_chosen_one(
    photos: Path, tmp_path: Path, size: int, after_growth: int
) -> None:
    out = tmp_path / "out"
    extract(photos, "mean", out, shard_images=size, **CPU)
    before, after = compact(out)  # is compact for its size
    assert before is after
    add(photos, "00.png")
    extract(photos, "mean", out, **CPU)
    compact(out)
    assert sizes_of(out) == (after_growth, [3, 3, 2] if size == 3 else [8])
    before, after = compact(out)
    assert before is after
    assert extract(photos, "mean", out, **CPU).resumed == 8


def test_size_that_is_not_repeated_needs_no_model_to_be_up_to_date(
    photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    extract(photos, "mean", out, shard_images=3, batch_size=2, **CPU)
    run = json.loads((out / RUN).read_text())
    run["request"]["options"]["shard_images"] = 65_536  # as earlier versions wrote it
    run["checksum"] = ""
    (out / RUN).write_text(with_checksum(json.dumps(run, indent=2, ensure_ascii=True) + "\n"))

    def report(size: int | None) -> Report | None:
        options = Options(shard_images=size, batch_size=2, **CPU)
        return up_to_date_report(list_images(photos), ["mean"], str(out), options)

    for size in (None, 3):
        known = report(size)
        assert known is not None
        assert known.resumed == 7
    assert report(4) is None
