"""``extract models`` and ``extract download``, compared with the libraries."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from support.networks import mean_pixel
from support.weights import publish
from timm.models._hub import save_for_hf
from torch import nn

from extractor import FeatureStore, load_backbone
from extractor.cli import main as cli
from extractor.errors import WeightsError
from extractor.models import embedding
from extractor.models import weight_files as weights

SQUEEZENET = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1


def run(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    """Standard output of the command; its complaints where it is meant to fail."""
    assert cli.main(words) == code
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return printed.err if code else printed.out


def timm_cache(home: Path, name: str) -> Path:
    repository = timm.get_pretrained_cfg(name).hf_hub_id
    folder = home / "huggingface" / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("c0ffee")
    (folder / "snapshots" / "c0ffee").mkdir(parents=True)
    path = folder / "snapshots" / "c0ffee" / "model.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    return path


def torchvision_cache(home: Path) -> Path:
    path = home / "torch" / "hub" / "checkpoints" / SQUEEZENET.url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")
    return path


# ---------------------------------------------------------------------------------------------
# The table


@pytest.mark.parametrize("glob", ["test_vit*", "timm:test_vit*", "timm/test_vit*"])
def test_list_agrees_with_timm(glob: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(run(capsys, "models", glob, "--json"))
    assert [row["name"] for row in rows] == timm.list_models("test_vit*")
    for row in rows:
        assert (row["model"], row["source"]) == (f"timm:{row['name']}", "timm")
        with torch.device("meta"):
            network = timm.create_model(row["name"], num_classes=0)
        assert row["dim"] == network.head_hidden_size
        assert row["parameters"] == sum(value.numel() for value in network.parameters())
        assert row["input_size"] == list(network.pretrained_cfg["input_size"][1:])
        tags = [full.partition(".")[2] for full in timm.list_pretrained(row["name"] + ".*")]
        assert sorted(weight["tag"] for weight in row["weights"]) == sorted(tags)
        assert {weight["cached"] for weight in row["weights"]} <= {None}


def test_bare_glob_lists_both_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(run(capsys, "models", "resnet18", "--json"))
    assert [row["model"] for row in rows] == ["timm:resnet18", "torchvision:resnet18"]
    ours, theirs = ([weight["tag"] for weight in row["weights"]] for row in rows)
    assert ours[0] == timm.get_pretrained_cfg("resnet18").tag  # the default stands first
    assert theirs == ["IMAGENET1K_V1"]


def test_default_weights_of_torchvision_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = json.loads(run(capsys, "models", "torchvision:mobilenet_v2", "--json"))
    assert [weight["tag"] for weight in row["weights"]] == ["IMAGENET1K_V2", "IMAGENET1K_V1"]


def test_table_has_aligned_columns(capsys: pytest.CaptureFixture[str]) -> None:
    head, *lines = run(capsys, "models", "test_vit*").splitlines()
    assert head.split()[:4] == ["model", "dim", "parameters", "input"]
    assert len(lines) == len(timm.list_models("test_vit*"))
    (line,) = [line for line in lines if line.startswith("timm:test_vit ")]
    assert line.split() == ["timm:test_vit", "64", "0.3", "M", "160x160", "r160_in1k"]
    assert len({line.index("160x160") for line in lines}) == 1
    (without,) = [line for line in lines if line.startswith("timm:test_vit_relpos ")]
    assert timm.list_pretrained("test_vit_relpos.*") == []
    assert without.split()[-1] == "none"


def test_star_marks_cached_weights(empty_caches: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = timm_cache(empty_caches, "resnet18.a2_in1k")
    also = torchvision_cache(empty_caches)
    table = run(capsys, "models", "timm:resnet18").splitlines()[1].split()
    assert [word for word in table if word.endswith("*")] == ["a2_in1k*"]
    assert run(capsys, "models", "squeezenet1_*").count("IMAGENET1K_V1*") == 1
    found = {
        weight["tag"]: weight["cached"]
        for glob in ("timm:resnet18", "squeezenet1_1")
        for row in json.loads(run(capsys, "models", glob, "--json"))
        for weight in row["weights"]
    }
    assert {tag: path for tag, path in found.items() if path} == {
        "a2_in1k": str(here),
        "IMAGENET1K_V1": str(also),
    }


@pytest.mark.parametrize("glob", ["no_such_model", "timm:squeezenet1_1", "RESNET18"])
def test_glob_without_match_is_an_error(glob: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"no model matches {glob!r}" in run(capsys, "models", glob, code=1)


@pytest.mark.parametrize(
    "words",
    [["models", "a", "b"], ["models", "--nonsense"], ["models", "show"], ["download"]],
)
def test_unparsable_words_exit_with_a_usage_error(words: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)


# ---------------------------------------------------------------------------------------------
# One model


def seen_shapes(network: nn.Module, edge: int) -> dict[str, list[int]]:
    """Return the output shape of each module for one image, down to the second level."""
    seen: dict[str, list[int]] = {}
    for name, module in network.named_modules():
        if name and name.count(".") < 2:
            module.register_forward_hook(
                lambda _, __, out, name=name: seen.update({name: list(out.shape[1:])})
            )
    with torch.inference_mode():
        network.eval()(torch.zeros(1, 3, edge, edge))
    return seen


@pytest.mark.parametrize(
    ("name", "full", "head", "edge"),
    [
        ("test_resnet", "timm:test_resnet", "fc", 160),
        ("timm:test_vit.r160_in1k", "timm:test_vit", "head", 160),
        ("torchvision:squeezenet1_1", "torchvision:squeezenet1_1", "classifier.1", 224),
    ],
)
def test_show_lists_heads_and_layers_with_their_shapes(
    name: str, full: str, head: str, edge: int, capsys: pytest.CaptureFixture[str]
) -> None:
    library, _, own_name = full.partition(":")
    build = timm.create_model if library == "timm" else torchvision.models.get_model
    network = build(own_name)
    head_parameters = sum(value.numel() for value in network.get_submodule(head).parameters())
    parameters = sum(value.numel() for value in network.parameters()) - head_parameters
    replaced = nn.Identity()
    parent, _, child = head.rpartition(".")
    setattr(network.get_submodule(parent), child, replaced)
    expected = seen_shapes(network, edge)

    found = json.loads(run(capsys, "models", "show", name, "--json"))
    assert (found["model"], found["heads"], found["parameters"]) == (full, [head], parameters)
    assert found["preprocess"]["input_size"] == [edge, edge]
    assert {layer["layer"]: layer["shape"] for layer in found["layers"]} == expected
    kinds = {name: type(module).__name__ for name, module in network.named_modules()}
    assert all(layer["kind"] == kinds[layer["layer"]] for layer in found["layers"])

    page = run(capsys, "models", "show", name).splitlines()
    assert f"heads        {head}" in page
    for layer, shape in expected.items():
        assert [layer, *" x ".join(map(str, shape)).split(), kinds[layer]] in [
            line.split() for line in page
        ]


def test_show_accepts_a_local_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_for_hf(
        timm.create_model("test_resnet", num_classes=7), str(tmp_path), safe_serialization=True
    )
    found = json.loads(run(capsys, "models", "show", f"local-dir:{tmp_path}", "--json"))
    assert (found["dim"], found["heads"], found["weights"]) == (96, ["fc"], [])
    layers = {layer["layer"]: layer["shape"] for layer in found["layers"]}
    assert layers["layer4"] == [96, 5, 5]


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("resnet5", "unknown model 'resnet5'; did you mean resnet50"),
        ("torchvision:test_vit", "unknown model 'torchvision:test_vit'"),
        ("keras:resnet50", "unknown library 'keras'"),
        ("nowhere.py:f", "there is no file nowhere.py"),
        ("vit_tiny_patch16_224.nosuch", "timm:vit_tiny_patch16_224: unknown weights 'nosuch'"),
        ("timm:resnet18.nosuch", "timm:resnet18: unknown weights 'nosuch'; expected default, "),
    ],
)
def test_show_of_unknown_model_is_an_error(
    name: str, match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert match in run(capsys, "models", "show", name, code=1)


def test_show_and_load_report_an_unknown_tag_alike(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(WeightsError, match="unknown weights 'nosuch'") as raised:
        load_backbone("resnet18.nosuch", device="cpu")
    errors = run(capsys, "models", "show", "resnet18.nosuch", code=1)
    assert str(raised.value) in errors


# ---------------------------------------------------------------------------------------------
# Fetching


def line(name: str, path: Path) -> str:
    return f"{name}: {path} (sha256 {hashlib.sha256(path.read_bytes()).hexdigest()})\n"


def test_download_of_cached_weights_prints_path_and_digest(
    empty_caches: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = timm_cache(empty_caches, "test_resnet")
    two = publish(monkeypatch, empty_caches, SQUEEZENET, b"weights")
    names = ["test_resnet", "torchvision:squeezenet1_1"]
    assert run(capsys, "download", *names) == line(names[0], one) + line(names[1], two)


def test_download_refuses_a_cached_file_of_another_content(
    empty_caches: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = torchvision_cache(empty_caches)
    errors = run(capsys, "download", "torchvision:squeezenet1_1", code=1)
    assert f"{path} is not what its name says" in errors
    assert path.read_bytes() == b"weights"


def test_download_accepts_a_tag(empty_caches: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = timm_cache(empty_caches, "resnet18.a2_in1k")
    assert run(capsys, "download", "resnet18", "--weights", "a2_in1k") == line("resnet18", path)
    assert run(capsys, "download", "resnet18.a2_in1k") == line("resnet18.a2_in1k", path)
    errors = run(capsys, "download", "resnet18", "--weights", "NOPE", code=1)
    assert "unknown weights 'NOPE'" in errors
    assert "a2_in1k" in errors


@pytest.mark.parametrize("name", ["test_resnet", "torchvision:squeezenet1_1"])
def test_download_without_network_names_the_cache(
    name: str,
    empty_caches: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(weights, "_reachable", lambda url: False)
    errors = run(capsys, "download", name, code=1)
    assert f"Looked in {empty_caches}" in errors
    assert "cannot be reached" in errors
    assert not list(empty_caches.rglob("*.*"))


def test_download_continues_after_a_failure(
    empty_caches: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = timm_cache(empty_caches, "test_resnet"), timm_cache(empty_caches, "test_vit")
    assert cli.main(["download", "test_resnet", "resnet5", "test_vit2", "test_vit"]) == 1
    printed = capsys.readouterr()
    assert printed.out == line("test_resnet", first) + line("test_vit", second)
    unknown, absent = printed.err.splitlines()
    assert "unknown model 'resnet5'" in unknown
    assert "test_vit2: the weights are not on this machine" in absent


@pytest.mark.parametrize(
    ("words", "code", "match"),
    [
        (["local-dir:/tmp"], 1, "is on this machine; there is nothing to fetch"),
        (["net.py:f"], 1, "is on this machine; there is nothing to fetch"),
        (["test_vit4"], 1, "timm has no pretrained weights for this model"),
        (["test_vit", "--weights", "random"], 2, "random weights cannot be fetched"),
    ],
)
def test_download_of_models_without_published_weights_is_an_error(
    words: list[str], code: int, match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert match in run(capsys, "download", *words, code=code)


# ---------------------------------------------------------------------------------------------
# The words themselves


@pytest.mark.parametrize("name", ["models", "download"])
def test_folder_named_like_a_verb_is_reached_by_its_path(
    name: str,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(embedding, "load", lambda *_, **__: mean_pixel())
    photos.rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert cli.main([f"./{name}", "-o", "out"]) == 0
    assert len(FeatureStore.open("out")) == 11
    assert cli.main(["-o", "again", name]) == 0  # no first word
    assert len(FeatureStore.open("again")) == 11


def test_truncated_output_is_no_error(monkeypatch: pytest.MonkeyPatch, empty_caches: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(empty_caches))
    command = f"set -o pipefail; {sys.executable} -m extractor models 'timm:*' --json | head -1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[\n", "")


def test_help_of_verbs_does_not_load_torch() -> None:
    code = (
        "import sys; from extractor.cli import main as cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'torchvision', 'timm', 'numpy', 'PIL', 'tqdm'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    for words in (["models", "--help"], ["models", "show", "--help"], ["download", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "usage: extract " + " ".join(words[:-1]) in done.stdout


def test_json_rows_hold_plain_values(capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, Any]] = json.loads(run(capsys, "models", "*squeezenet*", "--json"))
    assert [row["model"] for row in rows] == [
        "torchvision:squeezenet1_0",
        "torchvision:squeezenet1_1",
    ]
    # 1000 classes of 512 numbers and a bias each are the classifier.
    whole = sum(value.numel() for value in torchvision.models.squeezenet1_1().parameters())
    assert rows[1]["parameters"] == whole - 1000 * 513


# ---------------------------------------------------------------------------------------------
# Deprecated names


def test_list_names_what_replaced_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    complaint = run(capsys, "models", "tf_efficientnet_b0_ns", code=1)
    assert "tf_efficientnet_b0_ns is now tf_efficientnet_b0.ns_jft_in1k" in complaint


def test_show_describes_the_present_model(capsys: pytest.CaptureFixture[str]) -> None:
    shown = run(capsys, "models", "show", "tf_efficientnet_b0_ns")
    assert "timm:tf_efficientnet_b0\n" in shown


def test_download_of_a_deprecated_name_names_the_present_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    complaint = run(capsys, "download", "tf_efficientnet_b0_ns", code=1)
    assert "tf_efficientnet_b0_ns is now tf_efficientnet_b0.ns_jft_in1k" in complaint
    assert "the weights are not on this machine" in complaint


@pytest.mark.parametrize(
    ("model", "text"),
    [("test_resnet", "any, with --scales"), ("torchvision:vit_b_32", "1 only")],
)
def test_show_tells_whether_a_model_takes_several_sizes(
    model: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["models", "show", model]) == 0
    assert f"\nscales       {text}\n" in capsys.readouterr().out
