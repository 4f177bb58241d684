"""Evaluation sizes that timm publishes: of training and of tests."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support.pictures import noise
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from extractor import Backbone, Preprocess, extract, load_backbone
from extractor.cli import main as cli
from extractor.errors import ExtractorError, UsageError
from extractor.options import Options
from extractor.run.recompute import recompute

DOCS = Path(__file__).parents[2] / "docs" / "models.md"

TWO_SIZES = ("test_mambaout", "resnet10t.c3_in1k", "fasternet_t0.in1k", "mobilenetv3_large_100")


def is_tested_otherwise(tag: str) -> bool:
    config: Any = timm.get_pretrained_cfg(tag)
    size, crop = config.test_input_size, config.test_crop_pct
    return (size or config.input_size, crop or config.crop_pct) != (
        config.input_size,
        config.crop_pct,
    )


def load(model: str, **options: Any) -> Backbone:
    return load_backbone(model, weights="random", device="cpu", **options)


def transform(model: str, *, test: bool) -> list[Any]:
    """Numbers of timm's own evaluation transform: resize, crop."""
    with torch.device("meta"):
        network = timm.create_model(model)
    config = resolve_model_data_config(network, use_test_size=test)
    steps = create_transform(**config).transforms
    resize, crop = steps[0], steps[1]
    edges = resize.size if isinstance(resize.size, int) else min(resize.size)
    return [edges, tuple(crop.size)]


@pytest.mark.parametrize("test_size", [False, True])
@pytest.mark.parametrize("model", TWO_SIZES)
def test_size_is_that_of_timm(model: str, test_size: bool) -> None:
    preprocess = load(model, test_size=test_size).preprocess
    expected = transform(model, test=test_size)
    assert [min(preprocess.resize_size), preprocess.input_size] == expected


def test_both_sizes_are_known() -> None:
    for test_size in (False, True):
        backbone = load("test_mambaout", test_size=test_size)
        assert [each.input_size for each in backbone.evaluations] == [(160, 160), (192, 192)]
        assert backbone.preprocess == backbone.evaluations[test_size]
    assert load("test_resnet").evaluations == ()


def test_other_changes_apply_at_the_test_size() -> None:
    preprocess = load("resnet10t.c3_in1k", test_size=True, resize="squash").preprocess
    assert (preprocess.resize, preprocess.input_size) == ("squash", (224, 224))
    assert preprocess.resize_size == tuple(transform("resnet10t.c3_in1k", test=True)[:1] * 2)


@pytest.mark.parametrize("options", [{"image_size": 96}, {"crop_pct": 1.0}])
def test_test_size_excludes_other_sizes(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="test size: it sets the image size and the crop; leave"):
        Options(test_size=True, **options)


@pytest.mark.parametrize("model", ["test_resnet", "torchvision:squeezenet1_1"])
def test_model_with_one_size_says_so(model: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        backbone = load(model, test_size=True)
    assert backbone.preprocess == load(model).preprocess
    size = backbone.preprocess.size_text
    assert f"{model} has one size only: {size}" in caplog.messages


def test_networks_of_the_user_have_their_own_size(tmp_path: Path) -> None:
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    backbone = Backbone.from_module(network, head=None, preprocess=Preprocess.standard(8))
    noise(1, 20, 20).save(tmp_path / "1.png")
    with pytest.raises(UsageError, match="test size: the backbone is built already"):
        extract(tmp_path / "1.png", backbone, tmp_path / "s", test_size=True)
    (tmp_path / "m.py").write_text("def make():\n    raise AssertionError\n")
    with pytest.raises(UsageError, match=r"test size: .*m\.py:make chooses its own"):
        load_backbone(f"{tmp_path}/m.py:make", device="cpu", test_size=True)


@pytest.mark.parametrize("test_size", [False, True])
def test_summary_and_manifest_name_the_size(
    test_size: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise(1, 60, 50).save(tmp_path / "1.png")
    words = ["-m", "test_mambaout", "--weights", "random", "--device", "cpu"]
    words += ["-o", str(tmp_path / "s"), str(tmp_path / "1.png"), *["--test-size"] * test_size]
    assert cli.main(words) == 0
    said = " ".join("".join(capsys.readouterr()).split())
    own, other = ((192, "training size 160 x 160"), (160, "test size 192 x 192"))[not test_size]
    assert f"image size {own} x {own} (resize {own} x {own}); {other}" in said
    assert ("--test-size takes it" in said) is not test_size
    report = extract(tmp_path / "1.png", "test_mambaout", tmp_path / "t", weights="random")
    assert report.store.manifest.description.preprocess["input_size"] == [160, 160]


def test_store_of_the_test_size_can_be_recomputed(tmp_path: Path) -> None:
    noise(1, 60, 50).save(tmp_path / "1.png")
    common: dict[str, Any] = {"weights": "random", "device": "cpu"}
    store = extract(
        tmp_path / "1.png", "test_mambaout", tmp_path / "s", **common, test_size=True
    ).store
    assert store.manifest.description.preprocess["input_size"] == [192, 192]
    assert list(recompute(store, 1, device="cpu")) == []
    with pytest.raises(ExtractorError, match="input_size"):  # the other size makes other rows
        extract(tmp_path / "1.png", "test_mambaout", tmp_path / "s", **common)


def test_show_names_both_sizes_of_a_tag(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "show", "resnet50.a1_in1k"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"images +224 x 224, resize shortest to 235 x 235, bicubic\n", shown)
    assert re.search(r"test size +288 x 288, resize shortest to 288 x 288; use --test-size", shown)
    assert cli.main(["models", "show", "resnet50.tv_in1k"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"images +224 x 224, resize shortest to 256 x 256, bilinear\n", shown)
    assert "test size" not in shown


def test_documentation_counts_the_tags_with_two_sizes() -> None:
    text = " ".join(DOCS.read_text("utf-8").split())
    found = re.search(r"Of its ([\d,]+) pretrained tags, timm ([\d.]+) tests (\d+) at", text)
    assert found is not None
    if found.group(2) != timm.__version__:
        pytest.skip(f"the documentation counts those of timm {found.group(2)}")
    tags = timm.list_pretrained()
    counts = sum(map(is_tested_otherwise, tags)), len(tags)
    assert counts == (int(found.group(3)), int(found.group(1).replace(",", "")))
