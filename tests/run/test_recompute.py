"""Rows are drawn again from what the manifest says, and compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from support.pictures import noise

from extractor import FeatureStore, extract, load_backbone
from extractor.cli import main as cli
from extractor.compute.embed import embed
from extractor.errors import WeightsError
from extractor.loading.options import LoaderOptions
from extractor.models.embedding import EmbeddingSpec
from extractor.run.recompute import recompute


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for i in range(5):
        noise(i, 60 + i, 50).save(tmp_path / "in" / f"{i}.png")
    return tmp_path / "in"


MODEL = "torchvision:squeezenet1_1"


def slow(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (MODEL, {}),
        (MODEL, {"seed": 3, "dtype": "float16", "normalize": True}),
        slow(MODEL, {"image_size": 96, "resize": "squash", "mean": (0.5, 0.5, 0.5)}),
        (MODEL, {"layers": ["features.7"], "pool": "gem:4"}),
        (MODEL, {"layers": ["features.5", "features.7"], "concat": True}),
        slow(MODEL, {"layers": ["features.7"], "pool": "none", "image_size": 64}),
        slow(f"{MODEL}+resnet18", {}),
        slow(MODEL, {"precision": "bfloat16"}),
        (f"{MODEL}+resnet18", {"precision": "mixed"}),
        slow("torchvision:resnet18", {"bypass": ["layer4.1"], "image_size": 64}),
    ],
)
def test_recompute_confirms_unchanged_rows(
    folder: Path, tmp_path: Path, model: str, settings: dict[str, Any]
) -> None:
    store = extract(folder, model, tmp_path / "s", weights="random", device="cpu", **settings).store
    assert list(recompute(store, 5, device="cpu")) == []


def test_recompute_uses_the_weights_prefix_of_the_store(folder: Path, tmp_path: Path) -> None:
    networks: dict[str, torch.Tensor] = {}
    for seed, prefix in enumerate(("student.", "teacher.")):
        torch.manual_seed(seed)
        network = torchvision.models.squeezenet1_1()
        networks |= {prefix + key: value for key, value in network.state_dict().items()}
    torch.save({"state_dict": networks}, tmp_path / "w.pth")
    weights = tmp_path / "w.pth"
    settings: dict[str, Any] = {"weights": weights, "weights_prefix": "teacher", "device": "cpu"}
    store = extract(folder, MODEL, tmp_path / "s", **settings).store
    assert store.manifest.description.backbone["prefix"] == "teacher."
    assert list(recompute(store, 5, weights=str(weights), device="cpu")) == []


def test_recompute_uses_precision_of_store(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[Any] = []

    def spy(specs: Sequence[EmbeddingSpec], *rest: Any, **options: Any) -> Any:
        computed.extend(backbone.precision for backbone in specs[0].backbones)
        return embed(specs, *rest, **options)

    monkeypatch.setattr("extractor.run.recompute.embed", spy)
    settings: dict[str, Any] = {"weights": "random", "device": "cpu", "precision": "mixed"}
    store = extract(folder, MODEL, tmp_path / "s", **settings).store
    assert list(recompute(store, 2, device="cpu")) == []
    assert computed == ["mixed"]


def test_recompute_allows_the_pixels_of_the_stored_images(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"weights": "random", "device": "cpu", "max_pixels": 64 * 50}
    store = extract(folder, MODEL, tmp_path / "s", **settings).store
    limits: list[int] = []

    def spy(**options: Any) -> LoaderOptions:
        limits.append(options["max_pixels"])
        return LoaderOptions(**options)

    monkeypatch.setattr("extractor.run.recompute.MAX_PIXELS", 100)
    monkeypatch.setattr("extractor.run.recompute.LoaderOptions", spy)
    assert list(recompute(store, 5, device="cpu")) == []
    assert limits == [64 * 50]


def test_different_row_is_named(folder: Path, tmp_path: Path) -> None:
    store = extract(folder, MODEL, tmp_path / "s", weights="random", device="cpu").store
    array = np.load(store.path / "features/00000.npy")
    array[3] = array[1]
    np.save(store.path / "features/00000.npy", array)
    (problem,) = recompute(FeatureStore.open(store.path), 5, device="cpu")
    assert problem.startswith("row 3: ")
    assert "gives another row now, off by" in problem


def test_missing_image_is_named(folder: Path, tmp_path: Path) -> None:
    store = extract(folder, MODEL, tmp_path / "s", weights="random", device="cpu").store
    (folder / "2.png").unlink()
    (problem,) = recompute(store, 100, device="cpu")
    assert "cannot be decoded any more" in problem


def test_weights_of_user_are_required_and_compared(folder: Path, tmp_path: Path) -> None:
    def save(name: str, seed: int) -> Path:
        module = load_backbone(MODEL, weights="random", seed=seed, device="cpu").module
        torch.save(module.state_dict(), tmp_path / name)
        return tmp_path / name

    mine, other = save("mine.pth", 1), save("other.pth", 2)
    store = extract(folder, MODEL, tmp_path / "s", weights=mine, device="cpu").store
    assert list(recompute(store, 1, device="cpu")) == []  # run.json says where they are
    mine = mine.rename(tmp_path / "moved.pth")
    with pytest.raises(WeightsError, match=r"with mine\.pth .*name that file with weights=FILE"):
        list(recompute(store, 1, device="cpu"))
    with pytest.raises(WeightsError, match=r"the weights of .* changed: got SHA-256"):
        list(recompute(store, 1, device="cpu", weights=str(other)))
    words = ["verify", str(store.path), "--recompute", "3", "--device", "cpu"]
    assert cli.main([*words, "--weights", str(mine), "--images"]) == 0
    assert cli.main(words) == 1
