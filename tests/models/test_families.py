"""The smallest model of every family of timm and torchvision, by value."""

from __future__ import annotations

import check_backbones
import pytest
import torch
from torch import nn

from extractor import load_backbone

# Families that every run of the tests compares; the others are slow.
ALWAYS = (
    "timm:deit_tiny_patch16_224",
    "timm:swin_tiny_patch4_window7_224",
    "timm:test_convnext",
    "timm:test_efficientnet",
    "timm:test_resnet",
    "torchvision:mobilenet_v3_small",
    "torchvision:squeezenet1_1",
)
MODELS = [
    pytest.param(model, marks=() if model in ALWAYS else pytest.mark.slow)
    for model in sorted({*ALWAYS, *check_backbones.smallest_of_each_family()})
]


@pytest.mark.parametrize("model", MODELS)
def test_embedding_is_the_classifier_input(model: str) -> None:
    result = check_backbones.check(model)
    assert result.problem == ""
    assert result.error is not None
    assert result.error <= 1e-4


@pytest.mark.parametrize("model", MODELS)
def test_folding_keeps_the_embedding(model: str) -> None:
    with check_backbones.quickly_initialized(1.0):
        backbone = load_backbone(model, weights="random", device="cpu")
    norms = [module for module in backbone.module.modules() if isinstance(module, nn.BatchNorm2d)]
    generator = torch.Generator().manual_seed(1)
    for norm in norms:  # as training leaves them
        if norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.uniform_(-0.2, 0.2, generator=generator)
            norm.running_var.uniform_(0.8, 1.2, generator=generator)
    pixels = torch.randn(2, 3, *backbone.preprocess.input_size, generator=generator)
    if norms:
        before = backbone(pixels)
        difference = (backbone.fold()(pixels) - before).norm(dim=1) / before.norm(dim=1)
        assert float(difference.max()) < 1e-3  # such weights make some networks chaotic
