"""Embeddings against references that share no code with ours: the libraries' own models."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from support.weights import publish
from torch import nn

from extractor import Backbone, Preprocess, load_backbone
from extractor.errors import DeviceError, ModelError, UsageError, WeightsError
from extractor.models import from_torchvision
from extractor.models.digests import sha256_of_state
from extractor.models.load import with_changes
from extractor.options import Options

# The classifier of one member of each family, read off torchvision's source by hand.
TORCHVISION = {
    "alexnet": "classifier.6",
    "convnext_tiny": "classifier.2",
    "densenet121": "classifier",
    "efficientnet_b0": "classifier.1",
    "efficientnet_v2_s": "classifier.1",
    "googlenet": "fc",
    "inception_v3": "fc",
    "maxvit_t": "classifier.5",
    "mnasnet0_5": "classifier.1",
    "mobilenet_v2": "classifier.1",
    "mobilenet_v3_small": "classifier.3",
    "regnet_y_400mf": "fc",
    "resnet18": "fc",
    "resnext50_32x4d": "fc",
    "shufflenet_v2_x0_5": "fc",
    "squeezenet1_1": "classifier.1",
    "swin_t": "head",
    "swin_v2_t": "head",
    "vgg11": "classifier.6",
    "vit_b_32": "heads.head",
    "wide_resnet50_2": "fc",
}

TIMM = [
    "beit_base_patch16_224",
    "cait_xxs24_224",
    "convnext_atto",
    "deit_tiny_distilled_patch16_224",
    "densenet121",
    "efficientnet_lite0",
    "inception_v3",
    "maxvit_rmlp_pico_rw_256",
    "mnasnet_small",
    "mobilenetv3_small_050",
    "regnety_002",
    "resnet18",
    "resnext26ts",
    "swin_tiny_patch4_window7_224",
    "tf_efficientnetv2_b0",
    "vgg11",
    "vit_tiny_patch16_224",
    "xception41",
]


# Large models, which take seconds each.
SLOW = {
    "beit_base_patch16_224",
    "cait_xxs24_224",
    "convnext_tiny",
    "efficientnet_v2_s",
    "inception_v3",
    "maxvit_t",
    "resnext50_32x4d",
    "swin_t",
    "swin_tiny_patch4_window7_224",
    "swin_v2_t",
    "vgg11",
    "vit_b_32",
    "wide_resnet50_2",
    "xception41",
}


def sized(names: Iterable[str]) -> list[Any]:
    """Parameters of a test, those of large models marked as slow."""
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in names]


def picture(size: tuple[int, int]) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape
    worst = (got - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
    assert worst < 1e-4


@pytest.mark.parametrize("name", sized(TORCHVISION))
def test_torchvision_embedding_is_the_input_of_the_classifier(name: str) -> None:
    backbone = load_backbone(f"torchvision:{name}", weights="random", device="cpu")
    head = TORCHVISION[name]
    assert backbone.heads == (head,)
    assert type(backbone.module.get_submodule(head)) is nn.Identity

    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"transform_input": True, "init_weights": False}
    untouched = torchvision.models.get_model(name, weights=None, **options).eval()
    untouched.load_state_dict(backbone.module.state_dict(), strict=False)
    seen: list[torch.Tensor] = []
    untouched.get_submodule(head).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    pixels = picture(backbone.preprocess.input_size)
    with torch.inference_mode():
        untouched(pixels)
    expected = seen[0].mean((2, 3)) if seen[0].ndim == 4 else seen[0]
    assert backbone.dim == expected.shape[1]
    assert expected.std() > 0
    assert_close(backbone(pixels), expected)


@pytest.mark.parametrize("name", sized(TIMM))
def test_timm_embedding_is_its_pre_logits(name: str) -> None:
    backbone = load_backbone(f"timm:{name}", weights="random", device="cpu")
    untouched = timm.create_model(name).eval()
    untouched.load_state_dict(backbone.module.state_dict(), strict=False)
    pixels = picture(backbone.preprocess.input_size)
    with torch.inference_mode():
        features = untouched.forward_features(pixels)
        expected = untouched.forward_head(features, pre_logits=True)
    assert backbone.dim == untouched.head_hidden_size == expected.shape[1]
    assert expected.std() > 0
    assert_close(backbone(pixels), expected)


def test_every_head_of_a_distilled_model_is_replaced() -> None:
    backbone = load_backbone("deit_tiny_distilled_patch16_224", weights="random", device="cpu")
    assert backbone.heads == ("head", "head_dist")


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_are_off(name: str) -> None:
    backbone = load_backbone(f"torchvision:{name}", weights="random", device="cpu")
    assert not [key for key in backbone.module.state_dict() if key.lower().startswith("aux")]


def test_bare_name_prefers_timm() -> None:
    def provenance(name: str) -> str:
        return load_backbone(name, weights="random", device="cpu").provenance.model

    assert provenance("resnet18") == "timm:resnet18"
    assert provenance("torchvision:resnet18") == "torchvision:resnet18"
    assert provenance("squeezenet1_1") == "torchvision:squeezenet1_1"  # timm has none


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("resnet5", r"unknown model 'resnet5'; did you mean .*resnet50"),
        ("timm:squeezenet1_0", "unknown model 'timm:squeezenet1_0'"),
        ("torchvision:vit_tiny_patch16_224", "unknown model"),
        ("keras:resnet50", "unknown library 'keras'; expected timm:NAME"),
        ("", "unknown model ''"),
        ("torchvision:fcn_resnet50", "unknown model"),
    ],
)
def test_unknown_model_is_an_error(name: str, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        load_backbone(name, weights="random", device="cpu")


def test_random_weights_depend_on_the_seed_only() -> None:
    def digest(seed: int) -> str:
        torch.rand(3)  # the caller's own generator has no say
        backbone = load_backbone("resnet18", weights="random", seed=seed, device="cpu")
        return backbone.provenance.sha256

    assert digest(0) == digest(0) != digest(1)


def test_random_weights_keep_the_callers_generator() -> None:
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    load_backbone("resnet18", weights="random", device="cpu")
    assert torch.equal(torch.rand(4), expected)


def test_random_weights_cause_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    load_backbone("resnet18", weights="random", seed=3, device="cpu")
    assert "RANDOM weights (seed 3)" in caplog.text


def test_pixels_must_have_four_axes() -> None:
    backbone = load_backbone("resnet18", weights="random", device="cpu")
    with pytest.raises(UsageError, match=r"got shape \(3, 32, 32\), expected \(B, 3, H, W\)"):
        backbone(torch.zeros(3, 32, 32))


def test_network_is_in_eval_mode_and_frozen() -> None:
    module = load_backbone("torchvision:alexnet", weights="random", device="cpu").module
    assert not any(child.training for child in module.modules())
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_half_precision_stays_near_float32(precision: Any, device: str) -> None:
    pixels = picture((64, 64))
    exact = load_backbone("resnet18", weights="random", device="cpu")(pixels)
    backbone = load_backbone("resnet18", weights="random", device=device, precision=precision)
    rows = backbone(pixels)
    assert next(backbone.module.parameters()).dtype == getattr(torch, precision)
    assert rows.dtype == torch.float32
    cosine = torch.nn.functional.cosine_similarity(rows.cpu(), exact)
    assert cosine.min() > 0.999


def test_absent_device_is_an_error() -> None:
    with pytest.raises(UsageError, match="device: got 'tpu', expected auto, cpu"):
        load_backbone("resnet18", weights="random", device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match=r"device cuda: .*--device cpu"):
            load_backbone("resnet18", weights="random", device="cuda")
    else:
        with pytest.raises(DeviceError, match="device cuda:99: only cuda:0 to"):
            load_backbone("resnet18", weights="random", device="cuda:99")


# ---------------------------------------------------------------------------------------------
# Weights, laid out as the libraries' caches are


def torchvision_cache(
    patch: pytest.MonkeyPatch, home: Path, name: str, tag: str = "DEFAULT", **options: Any
) -> nn.Module:
    """Put random weights where torchvision would download them, as its own builder makes them."""
    torch.manual_seed(2)
    model = torchvision.models.get_model(name, weights=None, **options)
    publish(patch, home, torchvision.models.get_model_weights(name)[tag], model.state_dict())
    return model


@pytest.mark.parametrize("name", ["googlenet", "inception_v3", "densenet121", "mnasnet0_5"])
def test_cached_torchvision_weights_match_torchvision(
    name: str, empty_caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = (
        {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    )
    torchvision_cache(monkeypatch, empty_caches, name, **options)
    backbone = load_backbone(f"torchvision:{name}", device="cpu")
    theirs = torchvision.models.get_model(name, weights="DEFAULT").eval()
    seen: list[torch.Tensor] = []
    head = theirs.get_submodule(TORCHVISION[name])
    head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    pixels = picture((96, 96))
    with torch.inference_mode():
        theirs(pixels)
    assert_close(backbone(pixels), seen[0])
    assert backbone.provenance.weights == "hub"
    assert backbone.provenance.tag == torchvision.models.get_model_weights(name).DEFAULT.name


def test_old_densenet_keys_are_renamed(tmp_path: Path) -> None:
    model = torchvision.models.densenet121(weights=None)
    old = {
        key.replace("norm1.", "norm.1.").replace("norm2.", "norm.2.").replace("conv1.", "conv.1.")
        .replace("conv2.", "conv.2.") if "denselayer" in key else key: value
        for key, value in model.state_dict().items()
    }  # fmt: skip
    torch.save(old, tmp_path / "old.pth")
    backbone = load_backbone("torchvision:densenet121", weights=tmp_path / "old.pth", device="cpu")
    pixels = picture((64, 64))
    with torch.inference_mode():
        features = torch.relu(model.eval().features(pixels)).mean((2, 3))
    assert_close(backbone(pixels), features)


def test_torchvision_tag_selects_the_transform(
    empty_caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchvision_cache(monkeypatch, empty_caches, "resnet50", "IMAGENET1K_V1")
    backbone = load_backbone("torchvision:resnet50", weights="IMAGENET1K_V1", device="cpu")
    assert backbone.provenance.tag == "IMAGENET1K_V1"
    assert backbone.preprocess.resize_size == (256, 256)  # V2, the default, has 232


def test_library_file_name_selects_its_transform(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "resnet50-0676ba61.pth"
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), path)
    backbone = load_backbone("torchvision:resnet50", weights=path, device="cpu")
    assert backbone.preprocess.resize_size == (256, 256)
    assert backbone.provenance.weights == "file"
    (record,) = caplog.records  # it has the name of published weights, and is something else
    assert f"{path} has the name of published weights but another content" in record.getMessage()
    assert "expected 0676ba61" in record.getMessage()


@pytest.mark.parametrize("model", ["torchvision:squeezenet1_1", "timm:test_resnet"])
def test_digits_in_a_name_of_the_users_cause_no_warning(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "mine-20240101.pth"
    library, name = model.split(":")
    build = timm.create_model if library == "timm" else torchvision.models.get_model
    torch.save(build(name).state_dict(), path)
    load_backbone(model, weights=path, device="cpu")
    assert caplog.records == []


def test_vit_has_the_image_size_of_its_weights() -> None:
    entries = torchvision.models.ViT_B_16_Weights
    entry = entries.IMAGENET1K_SWAG_E2E_V1
    with torch.device("meta"):
        network = from_torchvision._network("vit_b_16", entry)
    assert network.image_size == 384


def timm_cache(home: Path, name: str) -> nn.Module:
    """Put random weights where the hub's cache would have them."""
    from safetensors.torch import save_file

    torch.manual_seed(2)
    model = timm.create_model(name)
    repository = model.pretrained_cfg["hf_hub_id"].replace("/", "--")
    folder = home / "huggingface" / "hub" / f"models--{repository}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("c0ffee")
    (folder / "snapshots" / "c0ffee").mkdir(parents=True)
    save_file(model.state_dict(), folder / "snapshots" / "c0ffee" / "model.safetensors")
    return model


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "tf_efficientnet_lite0"])
def test_cached_timm_weights_are_used(name: str, empty_caches: Path) -> None:
    model = timm_cache(empty_caches, name).eval()
    backbone = load_backbone(name, device="cpu")
    pixels = picture(backbone.preprocess.input_size)
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(pixels), pre_logits=True)
    assert_close(backbone(pixels), expected)
    assert backbone.provenance.weights == "hub"
    assert backbone.provenance.revision == "c0ffee"
    assert backbone.provenance.tag == model.pretrained_cfg["tag"]
    assert "state_dict" not in backbone.module.pretrained_cfg


def test_timm_tag_works_in_name_and_in_weights(empty_caches: Path) -> None:
    timm_cache(empty_caches, "resnet18.a1_in1k")
    by_name = load_backbone("resnet18.a1_in1k", device="cpu").provenance
    by_weights = load_backbone("resnet18", weights="a1_in1k", device="cpu").provenance
    assert by_name == by_weights
    assert by_name.tag == "a1_in1k"


@pytest.mark.parametrize("model", ["resnet18", "torchvision:resnet18"])
def test_unknown_tag_lists_the_known_ones(model: str) -> None:
    with pytest.raises(WeightsError, match=r"unknown weights 'NOPE'; .*(a1_in1k|IMAGENET1K_V1)"):
        load_backbone(model, weights="NOPE", device="cpu")


@pytest.mark.parametrize("model", ["resnet18", "torchvision:resnet18"])
def test_missing_weights_error_says_where_and_what_to_try(
    model: str, empty_caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("extractor.models.weight_files._reachable", lambda url: False)
    with pytest.raises(
        WeightsError, match=rf"Looked in {empty_caches}.*--weights FILE.*--weights random"
    ):
        load_backbone(model, device="cpu")


def headless(state: dict[str, torch.Tensor], head: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in state.items() if not key.startswith(head)}


@pytest.mark.parametrize("model", ["timm:resnet18", "torchvision:resnet18"])
@pytest.mark.parametrize("layout", ["plain", "state_dict", "model", "ddp", "safetensors", "head"])
def test_file_layout_does_not_change_the_backbone(model: str, layout: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None)  # timm's has the same key names
    state = network.state_dict()
    path = tmp_path / "weights.pth"
    if layout == "plain":
        torch.save(state, path)
    elif layout in ("state_dict", "model"):
        torch.save({layout: state, "epoch": 3, "best": 0.7}, path)
    elif layout == "ddp":
        torch.save({"module." + key: value for key, value in state.items()}, path)
    elif layout == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(headless(state, "fc."), path)
    else:
        other_classes = {"fc.weight": torch.zeros(37, 512), "fc.bias": torch.zeros(37)}
        torch.save({**state, **other_classes}, path)
    backbone = load_backbone(model, weights=path, device="cpu")
    pixels = picture((64, 64))
    network.fc = nn.Identity()
    with torch.inference_mode():
        assert_close(backbone(pixels), network.eval()(pixels))
    assert backbone.provenance.source == path.name


# ---------------------------------------------------------------------------------------------
# Changes in place


def test_changes_of_the_network_return_the_backbone_itself() -> None:
    backbone = load_backbone("test_resnet", weights="random", device="cpu")
    assert backbone.bypass(["maxpool"]) is backbone
    assert backbone.bypassed == ("maxpool",)
    assert backbone.fold() is backbone
    assert backbone.folded
    assert backbone.to(torch.device("cpu"), "bfloat16") is backbone
    assert backbone.precision == "bfloat16"
    assert backbone.dtype == next(backbone.module.parameters()).dtype == torch.bfloat16


def test_at_layers_leaves_the_original_backbone_alone() -> None:
    backbone = load_backbone("test_resnet", weights="random", device="cpu")
    pixels = picture((64, 64))
    before = backbone(pixels)
    inner = backbone.at_layers(["layer2"])
    assert inner is not backbone
    assert inner.module is backbone.module
    assert inner.dim != backbone.dim
    assert torch.equal(backbone(pixels), before)


def test_a_layer_is_trained_on_embeddings() -> None:
    backbone = load_backbone("test_resnet", weights="random", device="cpu")
    layer = nn.Linear(backbone.dim, 2)
    layer(backbone(picture((64, 64)))).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().max() > 0


def test_embedding_ignores_autocast_of_the_caller() -> None:
    backbone = load_backbone("test_resnet", weights="random", device="cpu")
    pixels = picture((64, 64))
    with torch.autocast("cpu", torch.bfloat16):
        inside = backbone(pixels)
    assert torch.equal(inside, backbone(pixels))


def test_network_in_training_mode_is_refused_and_stays_in_it() -> None:
    backbone = load_backbone("test_resnet", weights="random", device="cpu")
    backbone.module.train().requires_grad_(True)
    pixels = picture((64, 64))
    for call in (
        lambda: backbone(pixels),
        lambda: backbone.at_layers(["layer2"]),
        lambda: backbone.bypass(["maxpool"]),
        backbone.fold,
    ):
        with pytest.raises(UsageError, match=r"is in training mode.*call backbone\.module\.eval"):
            call()
    backbone.images_at_a_time(2)
    assert backbone.module.training
    assert all(parameter.requires_grad for parameter in backbone.module.parameters())
    backbone.module.eval()
    assert backbone(pixels).shape == (2, backbone.dim)


@pytest.mark.parametrize(
    ("pixels", "match"),
    [
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "got torch.uint8, expected floating point"),
        (np.zeros((1, 3, 64, 64), np.float32), r"got ndarray, expected a tensor \(B, 3, H, W\)"),
    ],
)
def test_pixels_that_are_not_normalized_floats_are_refused(pixels: Any, match: str) -> None:
    backbone = load_backbone("test_resnet", weights="random", device="cpu")
    with pytest.raises(UsageError, match=match):
        backbone(pixels)


def test_devices_have_names_as_for_load_backbone() -> None:
    backbone = load_backbone("test_resnet", weights="random", device="cpu")
    assert backbone.to("cpu", "bfloat16").device == torch.device("cpu")
    with pytest.raises(DeviceError, match="unknown device 'nonsense'"):
        backbone.to("nonsense")
    with pytest.raises(UsageError, match=r"device: got torch\.float16, expected a torch\.device"):
        backbone.to(torch.float16)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="precision: got 'half', expected one of float32"):
        backbone.to("cpu", "half")


# ---------------------------------------------------------------------------------------------
# The program around it


def test_loading_seeds_no_generator_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    for name in ("test_resnet", "torchvision:squeezenet1_1"):
        load_backbone(name, weights="random", seed=3, device="cpu")
    assert not seeded


def test_published_weights_keep_the_callers_generator(empty_caches: Path) -> None:
    timm_cache(empty_caches, "resnet18")
    state = torch.get_rng_state()
    load_backbone("resnet18", device="cpu")
    assert torch.equal(torch.get_rng_state(), state)


def test_default_type_of_the_program_changes_no_weight() -> None:
    expected = load_backbone("test_resnet", weights="random", device="cpu")
    torch.set_default_dtype(torch.bfloat16)
    try:
        backbone = load_backbone("test_resnet", weights="random", device="cpu")
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert backbone.provenance.sha256 == expected.provenance.sha256


def test_default_device_of_the_program_is_not_used() -> None:
    torch.set_default_device("meta")
    try:
        backbone = load_backbone("test_resnet", weights="random", device="cpu")
        assert torch.zeros(()).device.type == "meta"
    finally:
        torch.set_default_device(None)
    assert next(backbone.module.parameters()).device.type == "cpu"


@pytest.mark.parametrize("model", [None, Path("resnet18"), nn.Flatten()], ids=repr)
def test_model_that_is_no_name_is_refused(model: Any) -> None:
    with pytest.raises(UsageError, match=r"model: got \w+, expected a name; try .*from_module"):
        load_backbone(model)


# ---------------------------------------------------------------------------------------------
# Weights that a program changes


def test_provenance_follows_weights_that_a_program_changes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backbone = load_backbone("test_resnet", weights="random", device="cpu")
    inner = backbone.at_layers(["layer2"])
    other = load_backbone("test_resnet", weights="random", seed=1, device="cpu")
    backbone.module.load_state_dict(other.module.state_dict())
    for each in (backbone, inner):  # they share the network
        made = with_changes(each, Options())
        assert made.provenance.weights == "given"
        assert made.provenance.sha256 == sha256_of_state(other.module.state_dict())
    assert caplog.text.count("its weights changed since it was loaded") == 1


def test_own_changes_of_the_network_keep_the_provenance(caplog: pytest.LogCaptureFixture) -> None:
    backbone = load_backbone("test_resnet", weights="random", device="cpu")
    origin = backbone.provenance
    inner = backbone.bypass(["maxpool"]).at_layers(["layer2"])
    backbone.fold().to("cpu", "mixed")
    plain = load_backbone("test_resnet", weights="random", device="cpu")
    for each in (backbone, inner, plain, pickle.loads(pickle.dumps(plain))):
        assert with_changes(each, Options()).provenance == origin
    assert "weights changed" not in caplog.text


def test_module_that_was_trained_may_be_passed_in_again() -> None:
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    preprocess = Preprocess.standard(8)
    Backbone.from_module(network, head=None, preprocess=preprocess)
    network.train().requires_grad_(True)
    with torch.no_grad():
        network[2].weight.zero_()
    backbone = Backbone.from_module(network, head=None, preprocess=preprocess)
    assert backbone.provenance.sha256 == sha256_of_state(network.state_dict())
    assert with_changes(backbone, Options()).provenance == backbone.provenance
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(("head", "match"), [("4", "cannot take"), (["3", "5"], "no module '5'")])
def test_network_that_is_refused_stays_as_it_was(head: Any, match: str) -> None:
    network = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
    )
    if match == "cannot take":
        network.append(nn.Linear(2, 2))
        network.train()
    before = list(network)
    with pytest.raises(ModelError, match=match):
        Backbone.from_module(network, head=head, preprocess=Preprocess.standard(8))
    assert list(network) == before
    assert network.training


def test_network_without_its_head_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    for _ in range(2):
        Backbone.from_module(network, head="2", preprocess=Preprocess.standard(8))
    assert caplog.text.count("module:Sequential: 2 is an nn.Identity already") == 1
