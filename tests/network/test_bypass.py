"""Bypassed modules, compared with networks in which an identity was put by hand."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from support import networks
from support.pictures import noise
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionVit

from extractor import Backbone, extract, load_backbone
from extractor.errors import ModelError, UsageError
from extractor.preprocess import Preprocess

# Not timm's, whose random weights make the blocks identities already.
RESNET = "torchvision:resnet18"
VIT = "vit_tiny_patch16_224"
SIDE = 64


def picture(images: int = 2, side: int = SIDE) -> torch.Tensor:
    return torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(1))


assert_close = functools.partial(networks.assert_close, limit=1e-4)


@functools.cache
def loaded(name: str) -> Backbone:
    return load_backbone(name, weights="random", device="cpu", image_size=SIDE)


def fresh(name: str = RESNET) -> Backbone:
    """Return a backbone that the test may change."""
    return replace(loaded(name), module=copy.deepcopy(loaded(name).module))


@functools.cache
def library_network(name: str) -> nn.Module:
    """Return the library's own network with the same random weights."""
    if name == VIT:
        network: nn.Module = timm.create_model(name, img_size=SIDE, num_classes=0)
    else:
        network = torchvision.models.resnet18(weights=None)
        network.fc = nn.Identity()
    network.load_state_dict(loaded(name).module.state_dict())
    return network.eval()


class First(nn.Identity):
    """An identity that also accepts a mask."""

    def forward(self, input: torch.Tensor, **_: object) -> torch.Tensor:
        return input


def by_hand(name: str, *replaced: str) -> nn.Module:
    network = copy.deepcopy(library_network(name))
    for module in replaced:
        parent, _, own = module.rpartition(".")
        setattr(network.get_submodule(parent), own, First() if own == "attn" else nn.Identity())
    return network


def output(network: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        values = network(pixels)
    assert isinstance(values, torch.Tensor)
    return values


@pytest.mark.parametrize(
    ("name", "wanted", "replaced"),
    [
        (RESNET, ["layer2.1"], ["layer2.1"]),
        (RESNET, ["layer1"], ["layer1"]),
        (RESNET, ["layer1.0.relu", "bn1"], ["layer1.0.relu", "bn1"]),
        (RESNET, ["layer[34].1"], ["layer3.1", "layer4.1"]),
        (VIT, ["blocks.5"], ["blocks.5"]),
        (VIT, ["-1", "blocks.0.attn"], ["blocks.11", "blocks.0.attn"]),
    ],
)
def test_bypass_equals_identity_put_by_hand(
    name: str, wanted: list[str], replaced: list[str]
) -> None:
    backbone, pixels = fresh(name).bypass(wanted), picture()
    expected = output(by_hand(name, *replaced), pixels)
    assert (expected - output(library_network(name), pixels)).abs().max() > 1e-3
    assert_close(backbone(pixels), expected)
    assert backbone.bypassed == tuple(replaced)
    assert backbone.dim == expected.shape[1]
    for module in replaced:
        assert isinstance(backbone.module.get_submodule(module), nn.Identity)


def test_bypass_method_adds_to_earlier_bypasses() -> None:
    first = fresh().bypass(["layer1.0"])
    second = first.bypass(["layer2.1"])
    assert second.bypassed == ("layer1.0", "layer2.1")
    assert second is first
    pixels = picture()
    assert_close(second(pixels), output(by_hand(RESNET, "layer1.0", "layer2.1"), pixels))


def test_layers_see_the_bypassed_network() -> None:
    backbone = load_backbone(
        RESNET,
        weights="random",
        device="cpu",
        image_size=SIDE,
        bypass=["layer2.1"],
        layers=["layer3", "layer2"],
    )
    network, pixels = by_hand(RESNET, "layer2.1"), picture()
    seen: dict[str, torch.Tensor] = {}
    for name in ("layer2", "layer3"):
        network.get_submodule(name).register_forward_hook(
            lambda _, __, values, name=name: seen.update({name: values.mean((2, 3))})
        )
    output(network, pixels)
    for got, name in zip(backbone.embed(pixels), ["layer3", "layer2"], strict=True):
        assert_close(got, seen[name])
    assert backbone.bypassed == ("layer2.1",)
    with pytest.raises(UsageError, match="bypass modules before layers are chosen"):
        backbone.bypass(["layer1.0"])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, scale: float = 1.0
    ) -> torch.Tensor:
        values: torch.Tensor = self.conv(x) * scale
        return values if mask is None else values * mask


class Caller(nn.Module):
    """Calls its blocks with positional and keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.masked, self.named = Block(), Block(), Block()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        values = self.masked(self.plain(pixels), pixels > 0, scale=3.0)
        values = self.named(x=values, scale=2.0)
        return values.mean((2, 3))


@pytest.mark.parametrize("name", ["plain", "masked", "named"])
def test_bypass_returns_the_first_of_several_arguments(name: str) -> None:
    torch.manual_seed(0)
    network = Caller().eval()
    blocks = [copy.deepcopy(module) for module in (network.plain, network.masked, network.named)]
    pixels = picture(side=8)
    plain, masked, named = (
        (lambda x, *_, **__: x) if name == own else block
        for own, block in zip(("plain", "masked", "named"), blocks, strict=True)
    )
    backbone = Backbone.from_module(
        network, head=None, preprocess=Preprocess.standard(8), device="cpu"
    ).bypass([name])
    with torch.inference_mode():
        expected = named(masked(plain(pixels), pixels > 0, scale=3.0), scale=2.0).mean((2, 3))
    assert_close(backbone(pixels), expected)


def modules_of(backbone: Backbone) -> dict[str, int]:
    return {name: id(module) for name, module in backbone.module.named_modules()}


@pytest.mark.parametrize(
    ("wanted", "match"),
    [
        ("layer4.0", r"bypass layer4.0: .*\(3, 256, 4, 4\) into \(3, 512, 2, 2\), .*resnet18"),
        ("layer3", r"bypass layer3: .*\(3, 128, 8, 8\) into \(3, 256, 4, 4\)"),
        ("avgpool", r"bypass avgpool: .*\(3, 512, 2, 2\) into \(3, 512, 1, 1\)"),
        ("layer9", "no module 'layer9' in this ResNet; did you mean .*layer4"),
        ("layer*.7", r"no module 'layer\*.7'"),
        ("-1", "no block -1"),
        # The first of them could go, but half of what was asked for is nothing.
        ("layer?.0", r"bypass layer2.0: .*\(3, 64, 16, 16\) into \(3, 128, 8, 8\)"),
    ],
)
def test_rejected_bypass_leaves_the_network_unchanged(wanted: str, match: str) -> None:
    backbone, pixels = fresh(), picture()
    modules, before = modules_of(backbone), backbone(pixels)
    with pytest.raises(ModelError, match=match):
        backbone.bypass([wanted])
    assert modules_of(backbone) == modules
    assert torch.equal(backbone(pixels), before)


@pytest.mark.parametrize("second", ["layer4.0", "nowhere"])
def test_one_rejected_bypass_rolls_back_the_others(second: str) -> None:
    backbone, pixels = fresh(), picture()
    modules, before = modules_of(backbone), backbone(pixels)
    with pytest.raises(ModelError, match=second):
        backbone.bypass(["layer1.0", second])
    assert modules_of(backbone) == modules
    assert torch.equal(backbone(pixels), before)


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.unused = nn.ModuleList([nn.Conv2d(3, 3, 1)]), nn.ReLU()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.blocks[0](pixels).mean((2, 3))


@pytest.mark.parametrize("name", ["blocks", "unused"])
def test_bypass_rejects_a_module_that_does_not_run(name: str) -> None:
    network = Idle()
    backbone = Backbone.from_module(
        network, head=None, preprocess=Preprocess.standard(8), device="cpu"
    )
    before = getattr(network, name)
    with pytest.raises(ModelError, match=f"bypass {name}: this module of module:Idle does not run"):
        backbone.bypass([name])
    assert getattr(network, name) is before


def test_bypass_rejects_a_module_that_returns_a_tuple() -> None:
    # `values, _ = attention(...)` would take a batch of two images apart, and only that.
    torch.manual_seed(0)
    backbone = Backbone.from_module(
        TorchvisionVit(32, 8, 2, 2, 16, 32, num_classes=5),
        head="heads.head",
        preprocess=Preprocess.standard(32),
        device="cpu",
    )
    pixels = picture(3, 32)
    before = backbone(pixels)
    with pytest.raises(ModelError, match=r"bypass .*self_attention"):
        backbone.bypass(["encoder.layers.encoder_layer_1.self_attention"])
    assert torch.equal(backbone(pixels), before)


def test_bypass_skips_modules_inside_a_bypassed_one() -> None:
    backbone, pixels = fresh().bypass(["layer1.1**"]), picture()
    assert backbone.bypassed == ("layer1.1",)
    assert_close(backbone(pixels), output(by_hand(RESNET, "layer1.1"), pixels))


def test_bypass_takes_a_repeated_name_once() -> None:
    assert fresh().bypass(["layer1.0", "layer1.0"]).bypassed == ("layer1.0",)


def test_manifest_lists_bypassed_modules(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(2):
        noise(i, 70, 80).save(tmp_path / "in" / f"{i}.png")
    options: dict[str, Any] = {"weights": "random", "device": "cpu", "image_size": SIDE}
    plain = extract(tmp_path / "in", RESNET, tmp_path / "a", **options).store
    store = extract(
        tmp_path / "in", RESNET, tmp_path / "b", bypass=["layer2.1", "layer3.1"], **options
    ).store
    assert plain.manifest.description.backbone["bypassed"] == []
    description = store.manifest.description
    assert description.backbone["bypassed"] == ["layer2.1", "layer3.1"]
    assert description.backbone["heads"] == ["fc"]
    assert description.backbone["sha256"] == plain.manifest.description.backbone["sha256"]
    assert abs(store.features[:] - plain.features[:]).max() > 1e-3
