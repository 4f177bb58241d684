"""The table of all models, and the script that makes and proves it."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from extractor.models import catalog, from_timm, from_torchvision
from extractor.models.catalog import Catalog, Entry, fingerprint, survey
from extractor.network import heads

SMALL = [
    *("timm:" + name for name in timm.list_models("test_*")),
    "timm:resnet10t",
    "timm:lcnet_035",
    "timm:mobilenetv3_small_050",
    "timm:deit_tiny_distilled_patch16_224",
    "torchvision:squeezenet1_1",
    "torchvision:mobilenet_v3_small",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:regnet_y_400mf",
]

VERSIONS = {"timm": from_timm.version(), "torchvision": from_torchvision.version()}


def table() -> list[Entry]:
    """As the file is, without the program's own reader."""
    text = Path(catalog.__file__).with_name(catalog.FILE).read_text("ascii")
    return [Entry.from_line(line) for line in text.splitlines()[1:]]


def made_with_the_installed(library: str) -> bool:
    return {e.version for e in table() if e.model.startswith(f"{library}:")} == {VERSIONS[library]}


def needs(*libraries: str) -> pytest.MarkDecorator:
    here = all(made_with_the_installed(library) for library in libraries)
    return pytest.mark.skipif(not here, reason="the catalogue was made with other versions")


# ---------------------------------------------------------------------------------------------
# Lines


def test_line_separates_fields_by_tabs() -> None:
    entry = Entry("timm:net", "1.2", 64, (160, 96), 1234, ("head", "head_dist"), "00ff")
    assert entry.to_line() == "timm:net\t1.2\t64\t160x96\t1234\thead,head_dist\t00ff"
    assert Entry.from_line(entry.to_line()) == entry


def test_entry_without_heads_survives_a_round_trip() -> None:
    entry = Entry("timm:net", "1.2", 64, (160, 96), 1234, (), "00ff")
    assert Entry.from_line(entry.to_line()) == entry


def test_table_survives_a_round_trip() -> None:
    text = Path(catalog.__file__).with_name(catalog.FILE).read_text("ascii")
    assert text.count("\n") > 1000
    assert Catalog.from_text(text).to_text() == text


# ---------------------------------------------------------------------------------------------
# What it says


@needs("timm", "torchvision")
@pytest.mark.parametrize("model", SMALL)
def test_table_agrees_with_the_built_model(model: str) -> None:
    (entry,) = [entry for entry in table() if entry.model == model]
    assert survey(*model.split(":", 1)) == entry
    assert Catalog.read().entry(model) == entry


@needs("timm")
@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "deit_tiny_distilled_patch16_224"])
def test_table_agrees_with_timm(name: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=0)
    entry = Catalog.read().entry(f"timm:{name}")
    assert entry.parameters == sum(value.numel() for value in network.parameters())
    assert entry.dim == network.head_hidden_size
    assert entry.input_size == tuple(network.pretrained_cfg["input_size"][1:])


@needs("timm", "torchvision")
def test_table_lists_every_model_once() -> None:
    theirs = torchvision.models.list_models(module=torchvision.models)
    expected = [f"timm:{name}" for name in timm.list_models()]
    expected += [f"torchvision:{name}" for name in theirs]
    counted = Counter(entry.model for entry in table())
    assert set(counted) == set(expected)
    assert set(counted.values()) == {1}


def test_model_missing_in_the_table_is_built() -> None:
    for empty in (
        Catalog([]),
        Catalog([Entry("timm:test_vit", "0.0.1", 1, (1, 1), 1, (), "")]),  # of another version
    ):
        entry = empty.entry("timm:test_vit")
        assert (entry.version, entry.dim, entry.heads) == (timm.__version__, 64, ("head",))


def test_model_in_the_table_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> Entry:
        raise AssertionError("built")

    monkeypatch.setattr(catalog, "survey", never)
    entry = Entry("timm:test_vit", timm.__version__, 1, (2, 3), 4, ("x",), "00ff")
    assert Catalog([entry]).entry("timm:test_vit") == entry
    with pytest.raises(AssertionError, match="built"):
        Catalog([entry]).entry("timm:test_vit2")


def test_table_ignores_the_build_of_torchvision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object) -> Entry:
        raise AssertionError("built: wheels of one version for a CPU or a GPU have the same models")

    (entry,) = [entry for entry in table() if entry.model == "torchvision:squeezenet1_1"]
    version = entry.version.partition("+")[0]
    monkeypatch.setattr(catalog, "survey", never)
    for build in (version, f"{version}+cpu", f"{version}+cu126"):
        monkeypatch.setattr(torchvision, "__version__", build)
        assert Catalog.read().entry(entry.model) == entry


@pytest.mark.parametrize(
    ("library", "made_with", "installed", "is_built"),
    [
        ("torchvision", "0.29.2", "0.29.1", False),
        ("torchvision", "0.29.2", "0.28.2", True),
        ("timm", "1.0.31", "1.0.31", False),
        ("timm", "1.0.31", "1.0.30", True),  # which may have other models
    ],
)
def test_only_another_release_of_a_library_is_built(
    library: str, made_with: str, installed: str, is_built: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = Entry(f"{library}:net", installed, 2, (2, 2), 2, (), "")
    for module in (from_timm, from_torchvision):
        monkeypatch.setattr(module, "version", lambda: installed)
    monkeypatch.setattr(catalog, "survey", lambda *_: built)
    listed = Entry(f"{library}:net", made_with, 1, (1, 1), 1, (), "")
    assert Catalog([listed]).entry(listed.model) == (built if is_built else listed)


# ---------------------------------------------------------------------------------------------
# Fingerprints


def shapes(of: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in of.state_dict().items()}


def test_fingerprint_ignores_heads_and_batch_norm_counters() -> None:
    whole = shapes(timm.create_model("test_resnet"))
    other = shapes(timm.create_model("test_resnet", num_classes=7))
    bare = shapes(timm.create_model("test_resnet", num_classes=0))
    old = {key: shape for key, shape in whole.items() if "num_batches_tracked" not in key}
    assert len(old) < len(whole)
    marks = {fingerprint(one, ["fc"]) for one in (whole, other, bare, old)}
    assert marks == {survey("timm", "test_resnet").fingerprint}
    assert fingerprint(whole, []) != fingerprint(other, [])


def test_fingerprint_depends_on_names_and_shapes_not_order() -> None:
    base = {"a": (2, 3), "b": (4,)}
    assert fingerprint({"b": (4,), "a": (2, 3)}, []) == fingerprint(base, [])
    for other in ({"a": (3, 2), "b": (4,)}, {"a": (2, 3), "c": (4,)}, {"a": (2, 3)}):
        assert fingerprint(other, []) != fingerprint(base, [])
    assert fingerprint({**base, "headless.weight": (1,)}, ["head"]) != fingerprint(base, ["head"])


@pytest.mark.parametrize("prefix", ["", "module.", "module.backbone."])
@pytest.mark.parametrize("model", ["timm:test_vit", "torchvision:squeezenet1_1"])
def test_model_is_recognized_by_its_weights(model: str, prefix: str) -> None:
    library, _, name = model.partition(":")
    build = timm.create_model if library == "timm" else torchvision.models.get_model
    state = {prefix + key: value for key, value in build(name, num_classes=7).state_dict().items()}
    assert Catalog.read().models_with(state) == [model]
    state[prefix + "surplus"] = torch.zeros(1)
    assert Catalog.read().models_with(state) == []


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_published_weights_with_auxiliary_heads_are_recognized(name: str) -> None:
    with torch.device("meta"):
        state = torchvision.models.get_model(name, init_weights=False).state_dict()
    assert any(key.lower().startswith("aux") for key in state)
    assert f"torchvision:{name}" in Catalog.read().models_with(state)


# ---------------------------------------------------------------------------------------------
# The script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "scripts" / "check_backbones.py"
    spec = importlib.util.spec_from_file_location("check_backbones_by_path", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses ask for it
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "model", ["timm:test_resnet", "timm:test_vit", "torchvision:squeezenet1_1"]
)
def test_check_passes_a_correct_model_by_value(model: str, script: ModuleType) -> None:
    result = script.check(model)
    assert result.problem == ""
    assert result.error is not None
    assert result.error <= script.TOLERANCE
    assert Entry.from_line(result.entry).model == model
    assert script.Result.from_line(result.to_line()) == result


def test_check_can_skip_values(script: ModuleType) -> None:
    for options in ({"values": False}, {"max_parameters": 1000}):
        result = script.check("timm:test_resnet", **options)
        assert (result.problem, result.error, result.size) == ("", None, None)


def test_check_finds_a_head_that_stays(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "reset_timm_classifier", lambda module: ("fc",))
    assert script.check("timm:test_resnet").problem == "fc is no nn.Identity"
    monkeypatch.setattr(heads, "reset_timm_classifier", lambda module: ())
    assert "(2, 1000)" in script.check("timm:test_resnet").problem


def test_check_finds_a_wrong_head(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    # classifier.0 of MobileNetV3-Small takes 576 numbers, the true head classifier.3 1024.
    monkeypatch.setattr(heads, "modules_with_outputs", lambda *_: ("classifier.0",))
    result = script.check("torchvision:mobilenet_v3_small", values=False)
    assert result.problem == "reference (2, 1024), expected (2, 576)"


def test_check_finds_wrong_values(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_block_too_many(module: Any) -> tuple[str, ...]:
        module.reset_classifier(0)
        module.norm = nn.Identity()
        return ("head",)

    monkeypatch.setattr(heads, "reset_timm_classifier", one_block_too_many)
    result = script.check("timm:test_vit")
    assert result.problem.startswith("relative error")
    assert result.error > script.TOLERANCE


def test_check_reports_a_model_that_cannot_be_built(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Entry:
        raise ZeroDivisionError("no\n such layer")

    monkeypatch.setattr(script, "survey", broken)
    result = script.check("timm:test_resnet")
    assert (result.problem, result.entry) == ("ZeroDivisionError: no such layer", "")


def test_constant_reference_is_reported(script: ModuleType) -> None:
    class Two:
        dim = 2

    zeros = torch.zeros(2, 2)
    for given in (zeros, zeros + 1, zeros + math.nan):
        error, problem = script._compare(given, given, Two)
        assert (error, problem) == (math.inf, "the reference itself is constant or not finite")


def test_family_is_the_defining_module(script: ModuleType) -> None:
    assert script.family("timm:resnet10t") == "timm.models.resnet"
    assert script.family("timm:test_resnet") == "timm.models.resnet"
    assert script.family("timm:deit_tiny_distilled_patch16_224") == "timm.models.deit"
    assert script.family("torchvision:wide_resnet50_2") == "torchvision.models.resnet"


@needs("timm", "torchvision")
def test_each_family_has_one_smallest_model(script: ModuleType) -> None:
    chosen = script.smallest_of_each_family()
    families = [script.family(model) for model in chosen]
    assert len(families) == len(set(families))
    entries = {entry.model: entry.parameters for entry in table()}
    members: dict[str, list[int]] = {}
    for model, parameters in entries.items():
        members.setdefault(script.family(model), []).append(parameters)
    assert set(families) == set(members)
    for model, one in zip(chosen, families, strict=True):
        assert entries[model] == min(members[one])


def test_every_model_has_a_full_name(script: ModuleType) -> None:
    every = script.every_model()
    assert len(every) == len(set(every)) == len(timm.list_models()) + len(from_torchvision.names())
    assert set(from_timm.names()) == {m[5:] for m in every if m.startswith("timm:")}
