"""Names of models as users, model pages and old papers spell them."""

from __future__ import annotations

import logging

import pytest
import timm

from extractor import load_backbone
from extractor.errors import ModelError, WeightsError
from extractor.models import from_timm
from extractor.models.load import fetch, resolve_name

# Published before timm 0.9, with the present names from timm's release notes.
RENAMED = {
    "vit_base_patch16_224_in21k": "vit_base_patch16_224.augreg_in21k",
    "tf_efficientnet_b0_ns": "tf_efficientnet_b0.ns_jft_in1k",
    "convnext_tiny_in22k": "convnext_tiny.fb_in22k",
}
# Two tags in timm's table lack their last part.
INCOMPLETE = {"vit_base_patch16_224.sam", "vit_base_patch32_224.sam"}


# ---------------------------------------------------------------------------------------------
# Deprecated names


@pytest.mark.parametrize("old", RENAMED)
@pytest.mark.parametrize("prefix", ["", "timm:"])
def test_deprecated_name_means_the_present_one(
    old: str, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert resolve_name(prefix + old) == ("timm", RENAMED[old])
    assert caplog.messages == [f"timm renamed a model: {old} is now {RENAMED[old]}"]


def test_every_deprecated_name_leads_to_weights_of_timm() -> None:
    published = set(timm.list_pretrained())
    replaced = timm.models.get_deprecated_models()
    assert len(replaced) > 200
    assert from_timm.deprecated_names().keys() == replaced.keys()
    for old, table in replaced.items():
        library, now = resolve_name(old)
        assert (library, from_timm.current_name(now)) == ("timm", now)
        assert now == from_timm.deprecated_names()[old]
        if "." in now:
            assert now in published
        else:
            assert now in timm.list_models()
        assert now == table or (table in INCOMPLETE and now == f"{table}_in1k")


def test_tag_beside_a_deprecated_name_wins() -> None:
    old = "vit_base_patch16_224_in21k.orig_in21k"
    assert resolve_name(old) == ("timm", "vit_base_patch16_224.orig_in21k")


def test_unknown_tag_beside_a_deprecated_name_is_refused() -> None:
    with pytest.raises(WeightsError, match="timm:vit_tiny_patch16_224: unknown weights 'nope'"):
        load_backbone("vit_tiny_patch16_224_in21k.nope", weights="random", device="cpu")


def test_removed_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(timm.models._registry._deprecated_models, "test_vit", None)
    with pytest.raises(ModelError, match="timm removed the model test_vit"):
        resolve_name("test_vit")


def test_deprecated_name_loads_the_present_model() -> None:
    old = load_backbone("tf_efficientnet_b0_ns", weights="random", device="cpu")
    now = load_backbone("tf_efficientnet_b0.ns_jft_in1k", weights="random", device="cpu")
    assert old.provenance == now.provenance
    assert old.provenance.model == "timm:tf_efficientnet_b0"
    assert old.preprocess == now.preprocess


@pytest.mark.parametrize("old", RENAMED)
def test_missing_weights_of_a_deprecated_name_are_named(old: str) -> None:
    for load in (load_backbone, fetch):
        with pytest.raises(WeightsError, match=rf"timm:{RENAMED[old]}: the weights are not on"):
            load(old)
