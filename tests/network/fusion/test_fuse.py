"""Fusion follows the option and the device."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from extractor import Backbone, Extractor, load_backbone
from extractor.models.embedding import fuse_as_chosen, load_specs
from extractor.network.fusion.fuse import should_fuse
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
