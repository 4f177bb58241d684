"""Images dated where 64 bits of nanoseconds do not reach get rows like all others."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.callbacks import stop_after
from support.networks import mean_pixel, normalized

from extractor import FeatureStore, extract
from extractor.models import embedding
from extractor.store.format import STAGING
from extractor.upkeep.verify import verify, verify_images

SIZES: dict[str, Any] = {"shard_images": 3, "batch_size": 2, "workers": 1, "device": "cpu"}
SECONDS = {"2446.png": 15_032_399_935, "1600.png": -11_676_096_000, "1960.png": -315_619_200}


@pytest.fixture(autouse=True)
def mean_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "load", lambda *_: mean_pixel(size=(4, 4)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "in"
    made.mkdir()
    for level, name in enumerate(["a.png", "b.png", *SECONDS], 10):
        Image.new("RGB", (5, 5), (level,) * 3).save(made / name)
        if name in SECONDS:
            os.utime(made / name, ns=(0, SECONDS[name] * 10**9))
    if (made / "2446.png").stat().st_mtime_ns < 2**63:
        pytest.skip("this file system does not keep such dates")
    return made


@pytest.mark.parametrize("check", ["stat", "content"])
def test_far_dates_get_rows_and_stay_up_to_date(folder: Path, tmp_path: Path, check: Any) -> None:
    out = tmp_path / "out"
    assert extract(folder, "mean", out, **SIZES, check=check).stores[0].added == 5
    report = extract(folder, "mean", out, **SIZES, check=check)
    assert (report.resumed, report.rows, report.exit_code) == (5, 5, 0)
    Image.new("RGB", (5, 5), (99,) * 3).save(folder / "c.png")
    assert extract(folder, "mean", out, **SIZES, check=check).stores[0].added == 1
    store = FeatureStore.open(out)
    for path, mtime_ns in zip(store.paths, store.column("mtime_ns"), strict=True):
        there = (folder / path).stat().st_mtime_ns  # some file systems keep no date before 1901
        assert mtime_ns == min(max(there, -(2**63)), 2**63 - 1)
    assert np.allclose(store[store.index_of("2446.png")], normalized((12,) * 3), atol=1e-5)
    assert list(verify(out)) == []
    assert list(verify_images(out)) == []


def test_far_date_of_a_failure_is_not_tried_again(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (folder / "2446.png").write_bytes(b"no image")
    os.utime(folder / "2446.png", ns=(0, SECONDS["2446.png"] * 10**9))
    assert extract(folder, "mean", out, **SIZES).failed == 1
    assert extract(folder, "mean", out, **SIZES).resumed == 5


@pytest.mark.parametrize("overwrite", [False, True])
def test_work_with_a_time_that_no_index_holds_is_computed_again(
    folder: Path, tmp_path: Path, overwrite: bool
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Exception, match="stopped after"):
        extract(folder, "mean", out, **SIZES, stop=stop_after(2))
    journals = (out / STAGING / "journal").glob("*.jsonl")
    (journal,) = [path for path in journals if path.stat().st_size]
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    lines[-1]["records"][0][2] = SECONDS["2446.png"] * 10**9
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert extract(folder, "mean", out, **SIZES, overwrite=overwrite).rows == 5
    assert list(verify(out)) == []
