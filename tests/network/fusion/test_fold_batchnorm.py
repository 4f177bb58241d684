"""Batch normalizations fold into convolutions where that changes no embedding."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.std_conv import ScaledStdConv2d
from torch import nn
from torch.nn.utils import parametrizations

from extractor import Backbone, Extractor, Preprocess, extract, load_backbone
from extractor.errors import UsageError
from extractor.models.embedding import load_specs
from extractor.network.fusion.fuse import fuse
from extractor.options import Options

NOISE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def trained(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """Return a normalization with statistics and weights other than the initial ones."""
    generator = torch.Generator().manual_seed(norm.num_features)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.uniform_(-1, 1, generator=generator)
    norm.running_var.uniform_(0.5, 2, generator=generator)
    if norm.affine:
        norm.weight.data.uniform_(-2, 2, generator=generator)
        norm.bias.data.uniform_(-1, 1, generator=generator)
    return norm


class Pair(nn.Module):
    """A convolution, a normalization, and the mean of each channel."""

    def __init__(self, convolution: nn.Module | None = None, norm: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = convolution or nn.Conv2d(3, 8, 3)
        self.norm = norm or trained(nn.BatchNorm2d(8))
        self.eval()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.norm(self.convolution(pixels)).mean((2, 3))


def folded(network: nn.Module) -> tuple[str, ...]:
    """Fuse a network, check that its embeddings stay the same, and return the fused names."""
    with torch.inference_mode():
        before = network(NOISE)
        names = fuse(network, lambda pixels: [network(pixels)], NOISE)
        torch.testing.assert_close(network(NOISE), before, rtol=1e-5, atol=1e-5)
    return names


@pytest.mark.parametrize(
    "network",
    [
        Pair(),
        Pair(nn.Conv2d(3, 8, 3, bias=False)),
        Pair(nn.Conv2d(3, 8, 3, stride=2, padding=1, dilation=2)),
        Pair(nn.Conv2d(3, 6, 3, groups=3), trained(nn.BatchNorm2d(6))),
        Pair(norm=trained(nn.BatchNorm2d(8, affine=False))),
        Pair(norm=trained(BatchNormAct2d(8))),
        Pair(norm=trained(BatchNormAct2d(8, apply_act=False))),
    ],
)
def test_normalization_folds_into_the_convolution_before_it(network: Pair) -> None:
    assert folded(network) == ("norm",)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


class Both(Pair):
    """One normalization behind two convolutions."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__(norm=norm)
        self.other = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return super().forward(pixels) + self.norm(self.other(pixels)).amax((2, 3))


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNormAct2d])
def test_shared_normalization_folds_into_all_convolutions(
    kind: type[nn.BatchNorm2d],
) -> None:
    network = Both(trained(kind(8)))
    assert folded(network) == ("norm",)
    assert isinstance(network.norm, nn.Identity)


class Twice(Pair):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return super().forward(pixels) + super().forward(2 * pixels)


class Elsewhere(Pair):
    """The output of the convolution has two uses."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        features = self.convolution(pixels)
        return self.norm(features).mean((2, 3)) + self.further(features)

    def further(self, features: torch.Tensor) -> torch.Tensor:
        return features.amax((2, 3))


class ElsewhereUnseen(Elsewhere):
    """The second use does not affect these embeddings."""

    def further(self, features: torch.Tensor) -> torch.Tensor:
        return 0 * features.amax((2, 3))


class Between(Pair):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.norm(self.convolution(pixels).relu()).mean((2, 3))


class SameWeights(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(3, 8, 3)
        shared: Any = self.convolution.weight
        self.other.weight = shared

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return super().forward(pixels) + self.other(pixels).mean((2, 3))


class TwoNames(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.again = self.norm


def with_hook(name: str) -> Pair:
    network = Pair()
    network.get_submodule(name).register_forward_hook(lambda *_: None)
    return network


@pytest.mark.parametrize(
    "network",
    [
        Twice(),
        Elsewhere(),
        ElsewhereUnseen(),
        Between(),
        SameWeights(),
        TwoNames(),
        with_hook("convolution"),
        with_hook("norm"),
        Pair(ScaledStdConv2d(3, 8, 3)),
        Pair(parametrizations.weight_norm(nn.Conv2d(3, 8, 3))),
        Pair(norm=trained(BatchNormAct2d(8, drop_layer=nn.Dropout2d))),
        Pair(norm=nn.BatchNorm2d(8, track_running_stats=False)),
    ],
    ids=lambda network: type(network).__name__,
)
def test_normalization_stays_if_folding_is_not_exact(network: Pair) -> None:
    state = copy.deepcopy(network.state_dict())
    assert folded(network) == ()
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name])


class LooksAtItself(Pair):
    """Computes something else if its modules were replaced."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        is_whole = isinstance(self.norm, nn.BatchNorm2d)
        return super().forward(pixels) * (1 if is_whole else 2)


class NeedsItsNorm(Pair):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.norm, nn.BatchNorm2d)
        return super().forward(pixels) * self.norm.num_features


@pytest.mark.parametrize("kind", [LooksAtItself, NeedsItsNorm])
def test_network_whose_embeddings_change_is_restored(kind: Callable[[], Pair]) -> None:
    network = kind()
    state = copy.deepcopy(network.state_dict())
    assert folded(network) == ()
    assert isinstance(network.norm, nn.BatchNorm2d)
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name])


@pytest.mark.parametrize(
    "model", ["timm:test_resnet", "timm:mobilenetv3_small_050", "torchvision:mobilenet_v2"]
)
def test_runs_fold_and_load_backbone_does_not(model: str) -> None:
    whole = load_backbone(model, weights="random", device="cpu")
    (run,) = Extractor(model, weights="random", device="cpu").backbones
    pixels = torch.randn(2, 3, *whole.preprocess.input_size)
    torch.testing.assert_close(run(pixels), whole(pixels), rtol=1e-4, atol=1e-5)
    norms = [
        sum(isinstance(module, nn.BatchNorm2d) for module in backbone.module.modules())
        for backbone in (whole, run)
    ]
    assert norms[0] > 0
    assert norms[1] == 0


def test_folding_keeps_the_values_of_layers(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = ["conv1", "bn1", "layer2.0.bn2", "layer3"]
    report = extract(
        photos,
        "torchvision:resnet18",
        tmp_path,
        weights="random",
        device="cpu",
        layers=layers,
        image_size=64,
    )
    whole = load_backbone(
        "torchvision:resnet18", weights="random", device="cpu", layers=layers, image_size=64
    )
    monkeypatch.setattr("extractor.models.embedding._fused_copy", lambda backbone, _: backbone)
    computed = extract(photos, whole, tmp_path / "whole")
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in whole.module.modules())
    assert norms == 20
    for folded_store, store in zip(report.stores, computed.stores, strict=True):
        a, b = folded_store.store.features[:], store.store.features[:]
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_run_folds_a_copy_of_the_users_backbone() -> None:
    network = Pair()
    backbone = Backbone.from_module(network, head=None, preprocess=Preprocess.standard(16))
    (run,) = load_specs([backbone], Options())[0].backbones
    assert isinstance(network.norm, nn.BatchNorm2d)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in run.module.modules())
    torch.testing.assert_close(run(NOISE), backbone(NOISE), rtol=1e-5, atol=1e-5)


class NotToBeCopied(Pair):
    def __deepcopy__(self, memo: object) -> NotToBeCopied:
        raise TypeError("cannot pickle a lock")


@pytest.mark.parametrize("kind", ["not to be copied", "compiled"])
def test_uncopyable_or_compiled_module_runs_unfused(kind: str) -> None:
    network = NotToBeCopied() if kind == "not to be copied" else Pair()
    backbone = Backbone.from_module(network, head=None, preprocess=Preprocess.standard(16))
    if kind == "compiled":
        compiled: Any = torch.compile(network, backend="eager")
        backbone = replace(backbone, module=compiled)
    (run,) = load_specs([backbone], Options())[0].backbones
    assert run.module is backbone.module
    assert isinstance(network.norm, nn.BatchNorm2d)


def test_half_precision_applies_to_the_folded_network() -> None:
    half = load_backbone("timm:test_resnet", weights="random", device="cpu", precision="bfloat16")
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in half.module.modules())
    half.fold()
    assert norms == sum(isinstance(module, nn.BatchNorm2d) for module in half.module.modules())
    (run,) = Extractor(
        "timm:test_resnet", weights="random", device="cpu", precision="bfloat16"
    ).backbones
    assert run.precision == "bfloat16"
    assert not any(isinstance(module, nn.BatchNorm2d) for module in run.module.modules())


def test_extractor_uses_the_users_module_itself() -> None:
    network = Pair()
    backbone = Backbone.from_module(network, head=None, preprocess=Preprocess.standard(16))
    extractor = Extractor(backbone)
    image = np.full((20, 20, 3), 200, np.uint8)
    before = extractor([image])
    assert isinstance(network.convolution, nn.Conv2d)
    network.convolution.weight.data.mul_(-3)
    assert not np.allclose(extractor([image]), before)


class Night(Pair):
    """Dark images take another path, through a normalization of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.night = trained(nn.BatchNorm2d(8))
        self.eval()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        features = self.convolution(pixels)
        seen = self.norm(features)
        dark = pixels.mean((1, 2, 3)) < -1
        if dark.any():
            seen = torch.where(dark[:, None, None, None], self.night(features), seen)
        return seen.mean((2, 3))


class ByNumber(Pair):
    """A single image takes another path."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        features = self.convolution(pixels)
        return (features if len(pixels) == 1 else self.norm(features)).mean((2, 3))


@pytest.mark.parametrize("kind", [Night, ByNumber])
def test_network_with_several_paths_is_restored(kind: Callable[[], Pair]) -> None:
    network = kind()
    backbone = Backbone.from_module(network, head=None, preprocess=Preprocess.standard(16))
    assert backbone.fold().folded == ()
    assert isinstance(network.norm, nn.BatchNorm2d)


class OwnWeight(NeedsItsNorm):
    """The weight is a buffer, and the network has to be restored."""

    def __init__(self) -> None:
        super().__init__()
        weight: Any = self.convolution.weight.data
        del self.convolution.weight
        self.convolution.register_buffer("weight", weight)


def test_convolution_with_buffer_weights_is_not_folded() -> None:
    assert folded(OwnWeight()) == ()


@pytest.mark.parametrize("choose", ["at_layers", "bypass"])
def test_folded_backbone_rejects_layers_and_bypasses(choose: str) -> None:
    backbone = load_backbone("timm:test_resnet", weights="random", device="cpu").fold()
    assert "bn1" in backbone.folded
    with pytest.raises(UsageError, match=r"before fold\(\), which changes"):
        getattr(backbone, choose)(["conv1"])
