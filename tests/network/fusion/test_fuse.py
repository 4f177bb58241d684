"""Fusion follows the option and the device."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from extractor import Backbone, Extractor, load_backbone
from extractor.models.embedding import fuse_as_chosen, load_specs
from extractor.network.fusion.fuse import fuse, should_fuse
from extractor.options import Options


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("timm:test_resnet", weights="random", device="cpu")


def copied(backbone: Backbone, device: str) -> Backbone:
    """Return a copy that claims to be on a device."""
    return replace(backbone, module=copy.deepcopy(backbone.module), device=torch.device(device))


def types_of(backbone: Backbone) -> list[type]:
    return [type(module) for module in backbone.module.modules()]


def test_auto_fuses_on_a_cpu(backbone: Backbone) -> None:
    fused = fuse_as_chosen(copied(backbone, "cpu"), "auto")
    assert "bn1" in fused.folded
    assert types_of(fused) != types_of(backbone)


@pytest.mark.parametrize(
    ("choice", "device"), [("off", "cpu"), ("off", "cuda:0"), ("auto", "cuda:0"), ("auto", "mps")]
)
def test_fusion_that_is_off_or_unmeasured_changes_no_module(
    backbone: Backbone, choice: str, device: str
) -> None:
    network = copied(backbone, device)
    modules = list(network.module.modules())
    assert fuse_as_chosen(network, choice) is network
    assert list(network.module.modules()) == modules
    assert types_of(network) == types_of(backbone)
    assert not should_fuse(choice, torch.device(device))


@pytest.mark.parametrize("choice", ["auto", "off"])
def test_run_and_extractor_fuse_as_the_option_says(backbone: Backbone, choice: Any) -> None:
    settings: dict[str, Any] = {"weights": "random", "device": "cpu", "fuse": choice}
    (by_name,) = load_specs(["timm:test_resnet"], Options(**settings))[0].backbones
    (of_user,) = load_specs([copied(backbone, "cpu")], Options(fuse=choice))[0].backbones
    (in_memory,) = Extractor("timm:test_resnet", **settings).backbones
    for used in (by_name, of_user, in_memory):
        assert bool(used.folded) is (choice == "auto")
        assert (types_of(used) == types_of(backbone)) is (choice == "off")


def small_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()


NOISE = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_fusion_is_checked_in_full_float32() -> None:
    network, allowed = small_network(), []

    def embed(pixels: torch.Tensor) -> list[torch.Tensor]:
        allowed.append(torch.backends.cudnn.allow_tf32)
        return [network(pixels)]

    assert torch.backends.cudnn.allow_tf32
    assert fuse(network, embed, NOISE) == ("1",)
    assert len(allowed) > 2
    assert not any(allowed)
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    ("off", "change"), [(0.5, r"0\.5"), (float("nan"), "inf"), (float("inf"), "inf")]
)
def test_refused_fusion_says_how_much_the_embeddings_change(
    caplog: pytest.LogCaptureFixture, off: float, change: str
) -> None:
    network = small_network()

    def embed(pixels: torch.Tensor) -> list[torch.Tensor]:
        is_folded = network[0].bias is not None
        return [network(pixels) * (1 + off * is_folded if is_folded else 1)]

    expected = network(NOISE)
    assert fuse(network, embed, NOISE) == ()
    assert torch.equal(network(NOISE), expected)
    assert re.fullmatch(
        "Sequential: batch normalizations are not folded; the embeddings would change by "
        rf"{change} of their length, expected 0\.001 at most",
        caplog.messages[-1],
    )


@pytest.mark.parametrize(
    "message", ["CUDA error: an illegal memory access", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"]
)
def test_failure_of_the_device_does_not_pass_for_an_unfit_network(message: str) -> None:
    class OnDevice(torch.Tensor):
        device = torch.device("cuda", 0)  # type: ignore[assignment]

    def embed(_: torch.Tensor) -> list[torch.Tensor]:
        raise RuntimeError(message)

    pixels = NOISE.as_subclass(OnDevice)
    with pytest.raises(RuntimeError, match=message.partition(":")[0]):
        fuse(small_network(), embed, pixels)
    assert fuse(small_network(), embed, NOISE) == ()  # a CPU goes on without it
