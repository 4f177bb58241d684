"""Modules by dotted name, glob and block number."""

from __future__ import annotations

import functools

import pytest

from extractor import Backbone, load_backbone
from extractor.errors import ModelError

VIT = "vit_tiny_patch16_224"


@functools.cache
def loaded(name: str) -> Backbone:
    return load_backbone(name, weights="random", device="cpu", image_size=64)


def layers_of(name: str, *patterns: str) -> list[str]:
    return [output.layer for output in loaded(name).at_layers(patterns).outputs]


@pytest.mark.parametrize(
    ("name", "pattern", "layer"),
    [
        (VIT, "-1", "blocks.11"),
        (VIT, "-12", "blocks.0"),
        ("resnet18", "-1", "layer4"),
        ("resnet18", "-4", "layer1"),
    ],
)
def test_negative_numbers_count_blocks_from_the_end(name: str, pattern: str, layer: str) -> None:
    assert layers_of(name, pattern) == [layer]


@pytest.mark.parametrize(
    ("name", "pattern", "match"),
    [
        (VIT, "-13", "no block -13: .* has 12 blocks"),
        ("torchvision:resnet18", "-1", "no block -1: this ResNet has no list of blocks"),
        ("torchvision:resnet18", "-0", "-0"),
        ("resnet18", "-0", "-0"),
    ],
)
def test_missing_block_number_is_rejected(name: str, pattern: str, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        loaded(name).at_layers([pattern])


@pytest.mark.parametrize(
    ("patterns", "layers"),
    [
        (["layer*"], ["layer1", "layer2", "layer3", "layer4"]),
        (["layer[23]"], ["layer2", "layer3"]),
        (["layer[2-4]"], ["layer2", "layer3", "layer4"]),
        (["layer?"], ["layer1", "layer2", "layer3", "layer4"]),
        (["layer4.*"], ["layer4.0", "layer4.1"]),
        (["*.1"], ["layer1.1", "layer2.1", "layer3.1", "layer4.1"]),
        (["layer1.*.conv?"], [f"layer1.{i}.conv{j}" for i in (0, 1) for j in (1, 2)]),
        (["layer1**conv2"], ["layer1.0.conv2", "layer1.1.conv2"]),
        (["**.downsample.0"], [f"layer{i}.0.downsample.0" for i in (2, 3, 4)]),
        (["layer3", "layer[34]", "layer1"], ["layer3", "layer4", "layer1"]),
        (["conv1", "*conv1"], ["conv1"]),
    ],
)
def test_single_star_stays_between_two_dots(patterns: list[str], layers: list[str]) -> None:
    assert layers_of("resnet18", *patterns) == layers


@pytest.mark.parametrize(
    ("pattern", "match"),
    [
        ("layer5", r"no module 'layer5' in this ResNet; did you mean .*layer4"),
        ("layer4.7.conv1", r"did you mean .*layer4.1.conv1"),
        ("xyzzy", "it begins with conv1, bn1, act1, maxpool, layer1"),
        ("block*", r"no module 'block\*'"),
        ("layer1.conv1*", r"no module 'layer1.conv1\*'"),
        ("layer[z-a]", "layer.z-a."),
        ("layer[2", "no module"),
        ("fc.weight", "no module 'fc.weight'"),
    ],
)
def test_unknown_layer_error_lists_the_nearest_names(pattern: str, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        loaded("resnet18").at_layers([pattern])
