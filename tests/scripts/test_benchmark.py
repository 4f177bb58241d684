"""The throughput benchmark: its figures, and the values derived from them."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from rivals import measure
from support.pictures import noise
from throughput import Results

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmarks" / "throughput.py"
MODEL = "torchvision:squeezenet1_0"
OTHERS = ("timm", "timm-tuned", "img2vec_pytorch", "transformers")


@pytest.fixture
def jpegs(tmp_path: Path) -> Path:
    folder = tmp_path / "jpegs"
    folder.mkdir()
    for i in range(12):
        noise(i, 300, 400).save(folder / f"{i:02d}.jpg")
    return folder


def task(images: Path, **changes: Any) -> Namespace:
    fields = {"images": str(images), "model": MODEL, "weights": "random", "device": "cpu"}
    return Namespace(**{**fields, "precision": "auto", "compile": None, **changes})


@pytest.mark.slow
def test_limit_and_share_follow_from_rates(jpegs: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(jpegs), "--model", MODEL, "--weights", "random"]
    command += ["--device", "cpu", "--repeats", "1", "--copies", "2", "--eager"]
    command += ["--json", str(tmp_path / "figures.json"), "--without", *OTHERS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())

    decode, model, ours = figures["decode"], figures["model_alone"], figures["extract"]
    assert figures["images"] == 24
    assert min(decode, model, ours, figures["share"]) > 0
    assert figures["limit"] == pytest.approx(1 / (1 / decode + 1 / model))
    assert figures["share"] == pytest.approx(ours / figures["limit"])

    (theirs,) = [turn["images_per_second"] for turn in figures["sides"]["common-recipe"]]
    assert figures["ratios"] == {"common-recipe": [pytest.approx(ours / theirs)]}
    for side, turns in figures["sides"].items():
        rate = turns[0]["images_per_second"]
        assert figures["rates"][side] == {"median": rate, "min": rate, "max": rate}
    assert figures["missing"] == dict.fromkeys(OTHERS, "left out")

    exact, *others = figures["configurations"]
    assert (exact["precision"], exact["least_cosine"]) == ("float32", 1.0)
    assert {other["precision"] for other in others} >= {"bfloat16"}
    assert figures["best"]["images_per_second"] == model
    assert "common-recipe" in done.stdout


def test_gpu_limit_is_the_slower_part() -> None:
    rates = {"decode": (300.0, 500.0), "model": (1000.0, 400.0), "extract": (150.0, 300.0)}
    sides = {
        side: [{"images_per_second": rate, "images": 9} for rate in both]
        for side, both in rates.items()
    }
    results = Results("resnet50", "random", 2, {"device": "cuda:0"}, {}, sides=sides)
    assert results.limit == 400.0
    assert results.shares == [0.5, 0.75]


def test_unmeasurable_side_has_a_reason(jpegs: Path) -> None:
    assert measure(task(jpegs, side="timm")) == {"reason": "not a model of timm"}
    failed = measure(task(jpegs / "nowhere", side="extract"))
    assert failed["reason"].startswith("failed: cannot read ")
