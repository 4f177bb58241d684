"""What a machine does to a run: overflows, memory and disks that are full."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.networks import mean_pixel
from torch import nn

from extractor import extract
from extractor.compute import embed as inference
from extractor.errors import StoreError
from extractor.models import embedding
from extractor.models.backbone import Backbone
from extractor.models.embedding import EmbeddingPart, EmbeddingSpec
from extractor.options import Options
from extractor.run import output as filling
from extractor.store.lock import Lock


class Far(nn.Module):
    """A hundred thousand times the mean: more than float16 holds, but for dark channels."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean((2, 3)) * 1e5


@pytest.fixture
def far_model(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A model that overflows in half precision; returns the precisions that it is loaded in."""
    loaded = []

    def load(model: str, options: Options, *_: object) -> Backbone:
        loaded.append(options.precision)
        precision = "float16" if options.precision == "float16" else "float32"
        return replace(mean_pixel(), module=Far()).to(torch.device("cpu"), precision)

    monkeypatch.setattr(embedding, "load", load)
    return loaded


def test_what_half_precision_cannot_hold_is_computed_in_float32(
    photos: Path, tmp_path: Path, far_model: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    exact = extract(photos, "far", tmp_path / "float32", batch_size=4)
    half = extract(photos, "far", tmp_path / "float16", batch_size=4, precision="float16")
    assert len(far_model) == 3  # times that it was loaded: for each run, and to mend
    assert (half.rows, half.failed) == (exact.rows, 0) == (11, 0)
    expected, rows = exact.store.features[:], half.store.features[:]
    assert (abs(expected) > 65_504).any()
    # One that held more is float32 to the last bit, the others keep eleven bits.
    over = (abs(expected) > 65_600).any(axis=1)
    assert np.array_equal(rows[over], expected[over])
    np.testing.assert_allclose(rows, expected, rtol=5e-3, atol=200)
    assert [record.message for record in caplog.records if "overflows" in record.message] == [
        "half precision overflows for some images; computing them in float32"
    ]


@pytest.mark.usefixtures("far_model")
def test_what_stays_infinite_is_a_failure_of_its_image(photos: Path, tmp_path: Path) -> None:
    report = extract(
        photos, "far", tmp_path / "out", batch_size=4, precision="float16", dtype="float16"
    )
    assert report.failed > 0
    assert report.rows + report.failed == 11
    assert {one["error"] for one in report.failures} == {"not-finite"}
    assert np.isfinite(report.store.features[:]).all()


@pytest.mark.parametrize("fits", [1, 3, 4, 5])
def test_a_full_device_gets_smaller_parts_and_keeps_them(
    fits: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step = inference._Step([EmbeddingSpec("mean", (EmbeddingPart(mean_pixel()),))], normalize=False)
    sizes = []
    embed = Backbone.embed

    def crowded(backbone: Backbone, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sizes.append(len(pixels))
        if len(pixels) > fits:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return embed(backbone, pixels)

    pictures = torch.randint(0, 256, (8, 24, 32, 3), dtype=torch.uint8)
    (expected,) = step([pictures], lambda: None)
    monkeypatch.setattr(Backbone, "embed", crowded)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    (rows,) = step.in_parts([pictures])
    assert torch.equal(rows, expected)
    warned = len(caplog.records)
    assert warned == len([size for size in sizes if size > fits]) > 0
    sizes.clear()
    (rows,) = step.in_parts([pictures])
    assert torch.equal(rows, expected)
    assert max(sizes) <= fits
    assert len(caplog.records) == warned


def test_a_device_that_takes_no_single_image_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(backbone: Backbone, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Backbone, "embed", full)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    step = inference._Step([EmbeddingSpec("mean", (EmbeddingPart(mean_pixel()),))], normalize=False)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="CUDA out of memory"):
        step.in_parts([torch.zeros(4, 24, 32, 3, dtype=torch.uint8)])


def test_a_disk_without_room_is_told_before_anything_is_computed(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5000))
    monkeypatch.setattr(filling, "INDEX_BYTES", 2**20)
    with pytest.raises(StoreError, match=r"about 11.0 MiB are needed and 0.0 MiB are free"):
        extract(photos, mean_pixel(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert extract(photos, mean_pixel(), tmp_path / "out").rows == 11


def test_a_disk_that_fills_up_costs_nothing_that_is_there(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from extractor.store import journal

    extract(photos, mean_pixel(), tmp_path / "expected", batch_size=2)
    out = tmp_path / "out"
    calls = iter(range(1000))
    append = journal.Journal.append

    def full(self: journal.Journal, *arguments: object) -> None:
        if next(calls) == 3:
            raise OSError(28, os.strerror(28))
        append(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(journal.Journal, "append", full)
    with pytest.raises(StoreError, match=r"No space left on device.*nothing .* is lost"):
        extract(photos, mean_pixel(), out, batch_size=2)
    report = extract(photos, mean_pixel(), out, batch_size=2)
    assert report.resumed == 6
    expected = (tmp_path / "expected/features/00000.npy").read_bytes()
    assert (out / "features/00000.npy").read_bytes() == expected


def test_where_nothing_can_be_locked_it_is_refused_unless_asked_for(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def flock(descriptor: int, how: int) -> None:
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(StoreError, match=r"does not support locks.*--no-lock"):
        extract(photos, mean_pixel(), tmp_path / "out")
    assert extract(photos, mean_pixel(), tmp_path / "out", lock=False).rows == 11
    with pytest.raises(StoreError, match="does not support locks"):
        Lock(tmp_path / "lock").__enter__()


def test_where_nothing_can_be_synced_a_run_says_so_and_goes_on(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from extractor.store import atomic as files

    def fsync(descriptor: int) -> None:
        raise OSError(22, os.strerror(22))

    monkeypatch.setattr(os, "fsync", fsync)
    files._warn_about_sync.cache_clear()
    assert extract(photos, mean_pixel(), tmp_path / "out").rows == 11
    assert len([one for one in caplog.records if "mind power cuts" in one.message]) == 1
