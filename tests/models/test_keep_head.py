"""Networks that keep their classifier, compared with the libraries' own forward pass."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from support.pictures import noise
from torch import nn

from extractor import Backbone, Preprocess, extract, load_backbone
from extractor.errors import ModelError, UsageError, WeightsError
from extractor.run.recompute import recompute

SEED = 3

# Every kind of head: one layer, a block that pools, a hidden layer, two heads, a convolution.
QUICK = (
    "test_vit",
    "test_resnet",
    "test_convnext",
    "test_efficientnet",
    "mobilenetv3_small_050",
    "levit_128s",
    "torchvision:squeezenet1_1",
    "torchvision:mobilenet_v3_small",
    "torchvision:googlenet",
    "torchvision:regnet_y_400mf",
)
SLOW = (
    "cait_xxs24_224",
    "crossvit_tiny_240",
    "deit_tiny_distilled_patch16_224",
    "densenet121",
    "efficientformer_l1",
    "efficientvim_m1_dist",
    "inception_next_atto",
    "inception_v3",
    "resnet50_clip.openai",
    "swin_tiny_patch4_window7_224",
    "vgg11",
    "vit_base_patch32_clip_224.openai",
    "torchvision:densenet121",
    "torchvision:inception_v3",
    "torchvision:vgg11",
    "torchvision:vit_b_32",
)


def published(model: str, **arguments: Any) -> nn.Module:
    """The network as its library builds it, with random weights."""
    library, _, name = model.rpartition(":")
    torch.manual_seed(SEED)
    if library != "torchvision":
        return timm.create_model(name, **arguments).eval()
    if name in ("googlenet", "inception_v3"):
        arguments |= {"transform_input": True, "aux_logits": False, "init_weights": False}
    module: nn.Module = torchvision.models.get_model(name, weights=None, **arguments)
    return module.eval()


def pixels(backbone: Backbone) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, *backbone.preprocess.input_size, generator=generator)


def assert_same_output(backbone: Backbone, network: nn.Module) -> None:
    with torch.inference_mode():
        expected = network(pixels(backbone))
    got = backbone(pixels(backbone))
    assert got.shape == expected.shape == (2, backbone.dim)
    assert expected.std() > 0
    assert (got - expected).abs().max() / expected.abs().max() < 1e-5


@pytest.mark.parametrize(
    "model", [*QUICK, *(pytest.param(model, marks=pytest.mark.slow) for model in SLOW)]
)
def test_kept_head_gives_the_output_of_the_network(model: str) -> None:
    backbone = load_backbone(model, weights="random", seed=SEED, device="cpu", keep_head=True)
    network = published(model)
    for each in (backbone.module, network):  # some classifiers begin with zeros
        generator = torch.Generator().manual_seed(2)
        for parameter in each.parameters():
            if not parameter.any():
                parameter.data.uniform_(-1, 1, generator=generator)
    assert_same_output(backbone, network)
    assert (backbone.heads, backbone.outputs[0].definition) == ((), "head")
    without = load_backbone(model, weights="random", device="cpu")
    assert (without.heads, without.kept_heads) == (backbone.kept_heads, ())


@pytest.mark.slow
def test_kept_head_may_project() -> None:
    """The head of a CLIP model has as many outputs as the space that texts and images share."""
    backbone = load_backbone(
        "vit_base_patch32_clip_224.openai", weights="random", device="cpu", keep_head=True
    )
    assert (backbone.dim, backbone.kept_heads) == (512, ("head",))


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    "model",
    ["test_vit", "test_convnext", "torchvision:squeezenet1_1", "torchvision:mobilenet_v3_small"],
)
@pytest.mark.parametrize("classes", [7, 1000])
def test_head_has_the_classes_of_the_checkpoint(
    classes: int, model: str, prefix: str, tmp_path: Path
) -> None:
    network = published(model, num_classes=classes)
    state = {prefix + key: value for key, value in network.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    backbone = load_backbone(model, weights=tmp_path / "w.pth", device="cpu", keep_head=True)
    assert backbone.dim == classes
    assert_same_output(backbone, network)


@pytest.mark.parametrize("model", ["test_vit", "torchvision:squeezenet1_1"])
def test_checkpoint_without_classifier_is_refused(model: str, tmp_path: Path) -> None:
    without = load_backbone(model, weights="random", device="cpu").module
    torch.save(without.state_dict(), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"the file has no classifier \(.*leave --keep-head out"):
        load_backbone(model, weights=tmp_path / "w.pth", device="cpu", keep_head=True)


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    torch.save(published("test_resnet").state_dict(), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"do not fit.*They are those of timm:test_resnet"):
        load_backbone("test_vit", weights=tmp_path / "w.pth", device="cpu", keep_head=True)


def test_published_weights_are_loaded_with_their_head(empty_caches: Path) -> None:
    folder = empty_caches / "huggingface" / "hub" / "models--timm--test_vit.r160_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    (folder / "snapshots" / ("a" * 40)).mkdir(parents=True)
    network = published("test_vit")
    save_file(network.state_dict(), folder / "snapshots" / ("a" * 40) / "model.safetensors")
    backbone = load_backbone("test_vit", device="cpu", keep_head=True)
    assert backbone.provenance.weights == "hub"
    assert_same_output(backbone, network)


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "test_vit"])
def test_model_without_classifier_has_none_to_keep(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = timm.get_pretrained_cfg(model)
    assert config is not None
    config.num_classes = 0
    monkeypatch.setitem(timm.models._registry._model_pretrained_cfgs, model, config)
    with pytest.raises(ModelError, match="has no classifier to keep; leave --keep-head out"):
        load_backbone(model, weights="random", device="cpu", keep_head=True)


# ---------------------------------------------------------------------------------------------
# Layers


@pytest.mark.parametrize(
    ("model", "layer"),
    [
        ("test_vit", "head"),
        ("test_convnext", "head"),
        ("test_convnext", "head.fc"),
        ("torchvision:mobilenet_v3_small", "classifier"),
        ("torchvision:mobilenet_v3_small", "classifier.3"),
    ],
)
def test_layer_of_a_replaced_head_warns_and_a_kept_one_answers(
    model: str, layer: str, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"weights": "random", "seed": SEED, "device": "cpu"}
    inside = load_backbone(model, layers=[layer], **options)
    (warning,) = [text for text in caplog.messages if "layer" in text]
    assert f"layer {layer}: the classifier {', '.join(inside.heads)} is replaced" in warning
    assert "use --keep-head for its own output" in warning
    pre_logits = load_backbone(model, **options)
    assert torch.equal(inside(pixels(inside)), pre_logits(pixels(inside)))
    caplog.clear()
    kept = load_backbone(model, layers=[layer], keep_head=True, **options)
    assert_same_output(kept, published(model))
    assert not [text for text in caplog.messages if "layer" in text]
    assert kept.outputs[0].definition == "layer"


def test_other_layers_do_not_warn(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_backbone("test_convnext", weights="random", device="cpu", layers=["head.norm", "stem"])
    assert not [text for text in caplog.messages if "layer" in text]


def test_layer_of_a_module_without_classifier_warns(caplog: pytest.LogCaptureFixture) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 16), nn.Linear(16, 10))
    backbone = Backbone.from_module(network, head="2", preprocess=Preprocess.standard(8))
    assert backbone.at_layers(["2"]).dim == 16
    assert "keep the classifier for its own output" in caplog.text


# ---------------------------------------------------------------------------------------------
# Networks of the user


def test_given_backbone_keeps_what_it_has(tmp_path: Path) -> None:
    noise(1, 20, 20).save(tmp_path / "1.png")
    backbone = load_backbone("test_vit", weights="random", device="cpu")
    with pytest.raises(UsageError, match="keep head: the backbone is built already"):
        extract(tmp_path / "1.png", backbone, tmp_path / "s", keep_head=True)


def test_function_of_the_user_keeps_what_it_returns(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text("def make():\n    raise AssertionError\n")
    with pytest.raises(UsageError, match=r"keep head: .* makes its own network"):
        load_backbone(f"{tmp_path}/m.py:make", device="cpu", keep_head=True)


# ---------------------------------------------------------------------------------------------
# Stores


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("test_vit", {}),
        ("test_vit", {"layers": ["head"]}),
        ("torchvision:squeezenet1_1", {"normalize": True}),
        ("test_vit+torchvision:squeezenet1_1", {}),
    ],
)
def test_store_of_a_kept_head_can_be_recomputed_and_extended(
    model: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    noise(1, 60, 50).save(tmp_path / "in" / "1.png")
    common: dict[str, Any] = {"weights": "random", "device": "cpu", "image_size": 64, **settings}

    def run(**options: Any) -> Any:
        return extract(tmp_path / "in", model, tmp_path / "s", **common, **options)

    store = run(keep_head=True).store
    described = store.manifest.description
    parts = described.backbone.get("parts", [described.backbone])
    assert store.features.shape == (1, 1000 * len(parts))
    for part in parts:
        assert part["kept_heads"]
        assert part["heads"] == []
    if not settings.get("layers"):
        outputs = described.embedding.get("parts", [described.embedding])
        assert {output["definition"] for output in outputs} == {"head"}
    assert list(recompute(store, 5, device="cpu")) == []
    noise(2, 60, 50).save(tmp_path / "in" / "2.png")
    before = np.array(store.features[0])
    grown = run(keep_head=True).store
    assert (grown.features.shape[0], bool((grown.features[0] == before).all())) == (2, True)
    with pytest.raises(Exception, match="kept_heads"):
        run()
