"""Rows that overflow in half precision are computed in float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.networks import mean_pixel
from torch import nn

from extractor import extract
from extractor.models import embedding
from extractor.models.backbone import Backbone
from extractor.options import Options


class Far(nn.Module):
    """Return 100,000 times the mean, which exceeds float16 except in dark channels."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean((2, 3)) * 1e5


@pytest.fixture
def far_model(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Load a model that overflows in half precision; return the precisions of all loads."""
    loaded = []

    def load(model: str, options: Options, *_: object) -> Backbone:
        loaded.append(options.precision)
        precision = "float16" if options.precision == "float16" else "float32"
        return replace(mean_pixel(), module=Far()).to(torch.device("cpu"), precision)

    monkeypatch.setattr(embedding, "load", load)
    return loaded


def test_overflowing_rows_are_computed_in_float32(
    photos: Path, tmp_path: Path, far_model: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    exact = extract(photos, "far", tmp_path / "float32", batch_size=4)
    half = extract(photos, "far", tmp_path / "float16", batch_size=4, precision="float16")
    assert len(far_model) == 3  # once per run, and once for the retry
    assert (half.rows, half.failed) == (exact.rows, 0) == (11, 0)
    expected, rows = exact.store.features[:], half.store.features[:]
    assert (abs(expected) > 65_504).any()
    # Rows that exceed float16 are exact; the others keep eleven bits.
    over = (abs(expected) > 65_600).any(axis=1)
    assert np.array_equal(rows[over], expected[over])
    np.testing.assert_allclose(rows, expected, rtol=5e-3, atol=200)
    assert [record.message for record in caplog.records if "overflows" in record.message] == [
        "half precision overflows for some images; computing them in float32"
    ]


@pytest.mark.usefixtures("far_model")
def test_rows_infinite_even_in_float32_are_failures(photos: Path, tmp_path: Path) -> None:
    report = extract(
        photos, "far", tmp_path / "out", batch_size=4, precision="float16", dtype="float16"
    )
    assert report.failed > 0
    assert report.rows + report.failed == 11
    assert {failure["error"] for failure in report.failures} == {"not-finite"}
    assert np.isfinite(report.store.features[:]).all()
