from __future__ import annotations

from typing import ClassVar

import pytest
from torch import nn

from extractor.errors import ModelError
from extractor.network import heads


class Nested(nn.Module):
    """Classifiers at two depths, one of them a convolution."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.head = nn.ModuleDict({"drop": nn.Dropout(), "fc": nn.Linear(8, num_classes)})
        self.auxiliary = nn.Sequential(nn.Conv2d(8, num_classes, 1, bias=False))


def test_classifiers_are_found_by_number_of_classes() -> None:
    assert heads.modules_with_outputs(Nested(13), 13) == ("head.fc", "auxiliary.0")
    assert heads.modules_with_outputs(Nested(13), 14) == ()


def test_replacement_works_at_any_depth() -> None:
    model = Nested()
    assert heads.replace_with_identity(model, ["head.fc", "auxiliary.0"]) == (
        "head.fc",
        "auxiliary.0",
    )
    assert heads.identities(model) == {"head.fc", "auxiliary.0"}
    assert isinstance(model.stem, nn.Conv2d)


@pytest.mark.parametrize("name", ["nowhere", "head.nowhere", "nowhere.fc", "stem.weight"])
def test_replacement_rejects_an_unknown_module(name: str) -> None:
    with pytest.raises(ModelError, match="no module"):
        heads.replace_with_identity(Nested(), [name])


def test_replacement_rejects_the_whole_model() -> None:
    with pytest.raises(ModelError, match="its own head"):
        heads.replace_with_identity(Nested(), [""])


class Stubborn(nn.Module):
    """Claims to reset its classifier and does not."""

    pretrained_cfg: ClassVar = {"classifier": ("fc", "fc_dist")}

    def __init__(self) -> None:
        super().__init__()
        self.fc: nn.Module = nn.Linear(2, 3)
        self.fc_dist: nn.Module = nn.Linear(2, 3)

    def reset_classifier(self, num_classes: int) -> None:
        self.fc = nn.Identity()


def test_reset_rejects_a_model_that_keeps_a_classifier() -> None:
    with pytest.raises(ModelError, match="left fc_dist a Linear"):
        heads.reset_timm_classifier(Stubborn())


def test_reset_rejects_a_model_without_reset_classifier() -> None:
    with pytest.raises(ModelError, match="no reset_classifier"):
        heads.reset_timm_classifier(nn.Linear(1, 1))


def test_reset_returns_only_new_identities() -> None:
    class Model(nn.Module):
        pretrained_cfg: ClassVar = {"classifier": "fc"}

        def __init__(self) -> None:
            super().__init__()
            self.drop_path = nn.Identity()
            self.fc: nn.Module = nn.Linear(2, 3)

        def reset_classifier(self, num_classes: int) -> None:
            self.fc = nn.Identity()

    assert heads.reset_timm_classifier(Model()) == ("fc",)
