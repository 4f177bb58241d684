"""The smallest model of every family of timm and torchvision, by value."""

from __future__ import annotations

import check_backbones
import pytest
import torch
from torch import nn

from extractor import load_backbone


@pytest.mark.parametrize("model", check_backbones.smallest_of_each_family())
def test_the_embedding_is_what_the_classifier_would_have_seen(model: str) -> None:
    result = check_backbones.check(model)
    assert result.problem == ""
    assert result.error is not None
    assert result.error <= 1e-4


@pytest.mark.parametrize("model", check_backbones.smallest_of_each_family())
def test_folding_leaves_the_embedding_as_it_is(model: str) -> None:
    with check_backbones.quickly_initialised(1.0):
        backbone = load_backbone(model, weights="random", device="cpu")
    norms = [one for one in backbone.module.modules() if isinstance(one, nn.BatchNorm2d)]
    generator = torch.Generator().manual_seed(1)
    for norm in norms:  # as training leaves them
        if norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.uniform_(-0.2, 0.2, generator=generator)
            norm.running_var.uniform_(0.8, 1.2, generator=generator)
    pixels = torch.randn(2, 3, *backbone.preprocess.input_size, generator=generator)
    if norms:
        before = backbone(pixels)
        apart = (backbone.fold()(pixels) - before).norm(dim=1) / before.norm(dim=1)
        assert float(apart.max()) < 1e-3  # such weights make some of them chaotic
