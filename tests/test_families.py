"""The smallest model of every family of timm and torchvision, by value."""

from __future__ import annotations

import check_backbones
import pytest


@pytest.mark.parametrize("model", check_backbones.smallest_of_each_family())
def test_the_embedding_is_what_the_classifier_would_have_seen(model: str) -> None:
    result = check_backbones.check(model)
    assert result.problem == ""
    assert result.error is not None
    assert result.error <= 1e-4
