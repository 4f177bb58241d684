"""Names of models as users, model pages and old papers spell them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import timm
from support.pictures import noise

from extractor import extract, load_backbone
from extractor.errors import ModelError, WeightsError
from extractor.models import from_timm
from extractor.models.load import fetch, load, resolve_name
from extractor.models.naming import plain_name, split_model, split_weights, store_name
from extractor.options import Options

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
    names = from_timm.deprecated_names()
    assert names.keys() == replaced.keys()
    for old, table in replaced.items():
        library, now = resolve_name(old)
        assert (library, from_timm.current_name(now)) == ("timm", now)
        assert now == names[old]
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


def test_store_with_a_deprecated_name_keeps_it() -> None:
    """Else it could not be extended: the name is part of its description."""
    options = Options(weights="random", device="cpu")
    old = "tf_efficientnet_b0_ns"
    for recorded, name in (({}, "tf_efficientnet_b0"), ({f"timm:{old}": "0" * 64}, old)):
        assert load(old, options, recorded).provenance.model == f"timm:{name}"


@pytest.mark.parametrize("old", RENAMED)
def test_missing_weights_of_a_deprecated_name_are_named(old: str) -> None:
    for function in (load_backbone, fetch):
        with pytest.raises(WeightsError, match=rf"timm:{RENAMED[old]}: the weights are not on"):
            function(old)


# ---------------------------------------------------------------------------------------------
# Names as the hub spells them

NAME = "timm/resnet50.a1_in1k"
SPELLINGS = (
    NAME,
    f"{NAME}/",
    f"https://huggingface.co/{NAME}",
    f"https://huggingface.co/{NAME}/",
    f"https://huggingface.co/{NAME}?library=timm",
    f"https://huggingface.co/{NAME}#model-details",
    f"https://huggingface.co/{NAME}/tree/main",
    f"https://huggingface.co/{NAME}/blob/main/model.safetensors?download=true",
    f"http://www.huggingface.co/{NAME}",
    f"huggingface.co/{NAME}",
    f"hf.co/{NAME}",
    f"https://hf.co/{NAME}/resolve/main/config.json",
    f" {NAME}\n",
)


@pytest.mark.parametrize("typed", SPELLINGS)
def test_page_of_a_timm_model_means_that_model(typed: str) -> None:
    assert resolve_name(typed) == ("timm", "resnet50.a1_in1k")
    assert store_name(typed) == "timm-resnet50.a1_in1k"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("timm/resnet50", "resnet50"),
        ("timm/resnet50.not_a_tag", "hf-hub:timm/resnet50.not_a_tag"),
        ("timm/not_a_model", "hf-hub:timm/not_a_model"),
        ("timm/tf_efficientnet_b0_ns", "tf_efficientnet_b0.ns_jft_in1k"),
        ("someone/resnet50.a1_in1k", "hf-hub:someone/resnet50.a1_in1k"),
        ("someone/net@v2", "hf-hub:someone/net@v2"),
        ("apple/mobileclip_s0_timm", "fastvit_mci0.apple_mclip"),  # where timm has its weights
        (f"{NAME}@abc", f"hf-hub:{NAME}@abc"),
        ("https://huggingface.co/me/net/tree/v2", "hf-hub:me/net@v2"),
        ("https://huggingface.co/me/net/tree/refs%2Fpr%2F1", "hf-hub:me/net@refs/pr/1"),
        ("https://huggingface.co/me/net/tree/main/sub", "hf-hub:me/net"),
        ("hf_hub:me/net", "hf-hub:me/net"),
        ("hf://me/net", "hf-hub:me/net"),
        ("hf-hub:me/net/", "hf-hub:me/net"),
        ("hf-hub:https://huggingface.co/me/net", "hf-hub:me/net"),
        (f"hf-hub:{NAME}", f"hf-hub:{NAME}"),
    ],
)
def test_repository_is_a_timm_model_or_stays_a_repository(typed: str, meant: str) -> None:
    assert resolve_name(typed) == ("timm", meant)
    assert "/" not in store_name(typed)


def test_every_pretrained_tag_is_found_by_its_repository_name() -> None:
    for full in timm.list_pretrained()[::50]:
        assert resolve_name(f"timm/{full}") == ("timm", full)


def test_repository_of_torchvision_means_its_model() -> None:
    assert resolve_name("torchvision/resnet50") == ("torchvision", "resnet50")


def test_mirror_of_the_hub_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = "https://mirror.example/me/net"
    with pytest.raises(ModelError, match=r"expected the page of a model, https://huggingface\.co"):
        resolve_name(typed)
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    assert resolve_name(typed) == ("timm", "hf-hub:me/net")


@pytest.mark.parametrize(
    "typed",
    [
        "https://huggingface.co/datasets/me/pictures",
        "https://huggingface.co/models?library=timm",
        "https://huggingface.co/timm",
        "https://example.com/me/net",
        "https://download.pytorch.org/models/resnet50-0676ba61.pth",
    ],
)
def test_other_addresses_are_refused(typed: str) -> None:
    with pytest.raises(ModelError, match="expected the page of a model"):
        resolve_name(typed)
    with pytest.raises(WeightsError, match=r"an address; download the file"):
        load_backbone("test_resnet", weights=typed, device="cpu")


@pytest.mark.parametrize("typed", ["resnet50", "/a/b", "./a/b", "a/b/c", "a.py:f", "local-dir:a/b"])
def test_other_names_stay_as_they_are(typed: str) -> None:
    assert plain_name(typed) == typed


def test_path_is_no_model_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("timm/resnet50.a1_in1k", "images", "a/b/c"):
        Path(folder).mkdir(parents=True)
        with pytest.raises(ModelError, match=f"is a folder here; write local-dir:{folder} for a"):
            resolve_name(folder)
    for file in ("weights.pth", "a/weights.pth"):
        Path(file).touch()
        with pytest.raises(ModelError, match="is a file; name the architecture with --model"):
            resolve_name(file)
    Path("resnet50").mkdir()
    assert resolve_name("resnet50") == ("timm", "resnet50")
    assert resolve_name(f"https://hf.co/{NAME}") == ("timm", "resnet50.a1_in1k")


def test_names_of_the_hub_can_be_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = f"https://huggingface.co/{NAME}"
    for joined in (["timm/a", "timm/b", "c"], [page, "vgg11"], ["hf_hub:a/b", page]):
        assert split_model("+".join(joined)) == joined
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    path = "models/my+net.py:f"
    assert split_model(f"{path}+vgg11") == ["models/my", "net.py:f", "vgg11"]
    Path("models/my+net.py").touch()
    assert split_model(f"{path}+vgg11") == [path, "vgg11"]


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        ("a=w.pth", [("a", "w.pth")]),
        ("a=w.pth+b=d/x.pth", [("a", "w.pth"), ("b", "d/x.pth")]),
        ("a=missing.pth+b=d/missing.pth", [("a", "missing.pth"), ("b", "d/missing.pth")]),
        ("a=d/my+w.pth+b", [("a", "d/my+w.pth"), ("b", "")]),
        ("a+b=tag_in1k", [("a", ""), ("b", "tag_in1k")]),
        ("a=d/k=1.pth", [("a", "d/k=1.pth")]),
        ("hf-hub:o/n@v1=w.pth+b=hf-hub:o/m", [("hf-hub:o/n@v1", "w.pth"), ("b", "hf-hub:o/m")]),
        ("o/n=w.pth", [("o/n", "w.pth")]),
        ("local-dir:k=1/x+y=w.pth+b", [("local-dir:k=1/x+y", "w.pth"), ("b", "")]),
        ("k=1/net.py:f+b", [("k=1/net.py:f", ""), ("b", "")]),
        ("k=1/net.py:f=w.pth", [("k=1/net.py:f", "w.pth")]),
        ("https://huggingface.co/o/n?x=1", [("https://huggingface.co/o/n?x=1", "")]),
    ],
)
def test_weights_follow_the_name_of_their_model(
    typed: str, parts: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("w.pth", "d/x.pth", "d/my+w.pth", "d/k=1.pth", "k=1/x+y/config.json"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).touch()
    assert [split_weights(name) for name in split_model(typed)] == parts
    assert store_name(typed) == store_name("+".join(name for name, _ in parts))


def test_store_of_a_page_is_that_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise(1, 20, 20).save(tmp_path / "1.png")
    monkeypatch.chdir(tmp_path)
    rows = []
    for model in ("test_resnet", "https://huggingface.co/timm/test_resnet.r160_in1k/tree/main"):
        report = extract("1.png", model, weights="random", device="cpu")
        manifest = json.loads((report.out / "store.json").read_text())
        assert manifest["backbone"]["model"] == "timm:test_resnet"
        rows.append(report.store.features[:].tobytes())
    assert rows[0] == rows[1]
    assert report.out == Path("features/timm-test_resnet.r160_in1k")


# ---------------------------------------------------------------------------------------------
# Names that lead nowhere


@pytest.mark.parametrize("name", ["foo", "resnet50"])
def test_repository_needs_its_organization(name: str) -> None:
    with pytest.raises(WeightsError, match="is not a repository of the hub, expected ORG/NAME") as (
        caught
    ):
        load_backbone(f"hf-hub:{name}", device="cpu")
    assert ("for timm's own model write resnet50" in str(caught.value)) is (name == "resnet50")


@pytest.mark.parametrize("weights", ["default", "random"])
def test_missing_config_does_not_advise_what_needs_it(weights: str) -> None:
    with pytest.raises(WeightsError, match=r"config\.json and the weights are not on") as caught:
        load_backbone("hf-hub:me/net", weights=weights, device="cpu")
    for useless in ("--weights random", "--weights FILE", "pip install"):
        assert useless not in str(caught.value)
    assert "`hf download me/net`" in str(caught.value)
    with pytest.raises(WeightsError, match="`hf download me/net --revision v2`"):
        load_backbone("hf-hub:me/net@v2", weights=weights, device="cpu")


@pytest.mark.parametrize(
    ("typed", "spelled"),
    [
        ("ResNet50_Weights.IMAGENET1K_V2", "torchvision:resnet50 --weights IMAGENET1K_V2"),
        ("ResNet50_Weights.DEFAULT", "torchvision:resnet50 --weights DEFAULT"),
        ("Wide_ResNet50_2_Weights", "torchvision:wide_resnet50_2"),
        ("torchvision.models.vit_b_16", "torchvision:vit_b_16"),
        ("torchvision:resnet50.IMAGENET1K_V1", "torchvision:resnet50 --weights IMAGENET1K_V1"),
    ],
)
def test_names_in_code_of_torchvision_are_spelled_rightly(typed: str, spelled: str) -> None:
    with pytest.raises(ModelError, match="unknown model") as caught:
        resolve_name(typed)
    assert str(caught.value).endswith(f"write --model {spelled}")


def test_weights_may_be_named_as_in_code_of_torchvision() -> None:
    for weights in ("IMAGENET1K_V2", "ResNet50_Weights.IMAGENET1K_V2"):
        with pytest.raises(WeightsError, match=r"torchvision:resnet50 \(IMAGENET1K_V2\): the weig"):
            fetch("torchvision:resnet50", weights)
    with pytest.raises(WeightsError, match="torchvision's weights need --model torchvision:NAME"):
        fetch("resnet50", "IMAGENET1K_V2")


def test_capitals_do_not_hide_the_nearest_name() -> None:
    with pytest.raises(ModelError, match="did you mean resnet50"):
        resolve_name("ResNet50")


def test_weights_named_as_a_repository_are_spelled_rightly() -> None:
    with pytest.raises(WeightsError, match="no such file; write hf-hub:me/net for a repository"):
        load_backbone("test_resnet", weights="me/net", device="cpu")
    with pytest.raises(WeightsError, match=r"hf-hub:me/net: the weights are not on this machine"):
        load_backbone("test_resnet", weights="https://huggingface.co/me/net", device="cpu")
    with pytest.raises(WeightsError, match=r"me/net\.pth: no such file$"):
        load_backbone("test_resnet", weights="me/net.pth", device="cpu")
