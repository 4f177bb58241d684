"""``Extractor.for_store``: queries are embedded as the rows of a store were."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.networks import MeanPixel, mean_pixel
from support.pictures import noise
from torch import nn

from extractor import (
    Backbone,
    Extractor,
    FeatureStore,
    Preprocess,
    StoreError,
    StoreNotFoundError,
    UsageError,
    WeightsError,
    extract,
    load_backbone,
)
from extractor.options import Options
from extractor.run import encoder
from extractor.store.format import RUN, with_checksum

MODEL = "torchvision:squeezenet1_1"
SMALL: dict[str, Any] = {"weights": "random", "device": "cpu", "image_size": 64}
IMAGES = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven images of different sizes: the last batch is short."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(IMAGES - 1):
        noise(i, 90 + 7 * i, 120 - 5 * i).save(folder / f"{i}.png")
    deep = np.linspace(0, 4095, 80 * 80).reshape(80, 80).astype(np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")  # 12 bits in 16
    return folder


def rows_of(store: FeatureStore, embed: Extractor) -> np.ndarray:
    """Embed the images of a store again, in twos and threes."""
    paths = [store.full_path(row) for row in range(len(store))]
    return np.concatenate([embed([paths[0]]), embed(paths[1:3]), embed(paths[3:])])


def least_cosine(some: np.ndarray, others: np.ndarray) -> float:
    x, y = (np.asarray(rows, np.float64).reshape(len(rows), -1) for rows in (some, others))
    return float(((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)).min())


OPTION_SETS: list[tuple[str, dict[str, Any]]] = [
    (MODEL, {}),
    (MODEL, {"batch_size": 4, "threads": 1}),
    ("test_resnet", {"threads": 2, "batch_size": 3, "normalize": True}),
    ("test_vit", {"image_size": 160, "batch_size": 5}),
    ("torchvision:resnet18", {"fuse": "off", "seed": 4}),
    ("torchvision:resnet18", {"layers": ["layer2", "layer3"], "concat": True, "normalize": True}),
    (MODEL, {"layers": ["features.7"], "pool": "gem:4"}),
    (MODEL, {"layers": ["features.5"], "pool": "none", "dtype": "float16"}),
    ("test_vit", {"layers": ["-1"], "pool": "cls", "precision": "bfloat16", "image_size": 160}),
    (f"{MODEL}+test_resnet", {}),
    ("test_resnet+test_vit", {"precision": "mixed", "normalize": True, "image_size": 160}),
    (MODEL, {"precision": "bfloat16", "batch_size": 2}),
    (MODEL, {"image_size": (96, 64), "resize": "squash", "mean": (0.5, 0.5, 0.5)}),
    ("torchvision:resnet18", {"bypass": ["layer4.1"], "dtype": "float16"}),
    (MODEL, {"keep_head": True, "crop_pct": 0.9, "interpolation": "nearest"}),
    (MODEL, {"gray_bits": 12, "decode": "exact"}),
    (MODEL, {"augment": "flip", "scales": (1, 0.5), "normalize": True, "batch_size": 4}),
    (f"{MODEL}+test_resnet", {"augment": "flip", "scales": (1, 0.71), "precision": "bfloat16"}),
    ("torchvision:resnet18", {"layers": ["layer2", "layer3"], "scales": (1.5, 1), "concat": True}),
    (MODEL, {"keep_head": True, "augment": "flip"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "settings"), OPTION_SETS)
def test_exact_rows_equal_those_of_the_store(
    folder: Path, tmp_path: Path, model: str, settings: dict[str, Any]
) -> None:
    store = extract(folder, model, tmp_path / "s", **SMALL | settings).store
    stored = np.asarray(store.features[:])
    with Extractor.for_store(store, exact=True) as embed:
        assert embed.shape == store.features.shape[1:]
        np.testing.assert_array_equal(rows_of(store, embed), stored.astype(np.float32))
    with Extractor.for_store(store.path, device="cpu", workers=1) as embed:
        rows = rows_of(store, embed)
    assert rows.dtype == np.float32
    is_half = settings.get("precision", "float32") != "float32"
    cosine = least_cosine(rows, stored)
    print(f"least cosine {cosine:.7f} {model} {settings}")
    assert cosine >= (0.999 if is_half else 0.9999)


def test_store_of_a_gpu_that_decoded_warns_that_the_cpu_does(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = extract(folder, MODEL, tmp_path / "s", **SMALL).store
    manifest = store.path / "store.json"
    text = manifest.read_text().replace('"decode": "scaled"', '"decode": "gpu"')
    manifest.write_text(with_checksum(re.sub('"checksum": ".*"', '"checksum": ""', text)))
    caplog.clear()
    with Extractor.for_store(store.path, device="cpu") as embed:
        assert least_cosine(rows_of(store, embed), store.features[:]) > 0.99
    (message,) = [text for text in caplog.messages if "GPU" in text]
    assert message.startswith("a GPU decoded the images of this store, and the CPU decodes now")
    with pytest.raises(UsageError, match="the GPU decoded the images of this store"):
        Extractor.for_store(store.path, device="cpu", exact=True)


@pytest.mark.slow
def test_exact_rows_equal_those_of_a_compiled_network(folder: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**SMALL, "compile": "on", "batch_size": 4}
    store = extract(folder, "test_resnet", tmp_path / "s", **settings).store
    if not store.manifest.description.computation["compiled"]:
        pytest.skip("nothing compiles on this machine")
    with Extractor.for_store(store, exact=True) as embed:
        assert embed.backbones[0].is_compiled
        np.testing.assert_array_equal(rows_of(store, embed), store.features[:])
    with Extractor.for_store(store, device="cpu") as embed:
        assert not embed.backbones[0].is_compiled
        assert least_cosine(rows_of(store, embed), store.features[:]) >= 0.9999


# ---------------------------------------------------------------------------------------------
# Weights


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """Save the weights of a small network, drawn from a seed."""
    folder = tmp_path_factory.mktemp("weights")

    def save(model: str, seed: int) -> Path:
        path = folder / f"{model.rpartition(':')[2]}-{seed}.pth"
        if not path.exists():
            network = load_backbone(model, weights="random", seed=seed, device="cpu").module
            torch.save(network.state_dict(), path)
        return path

    return save


def store_with(folder: Path, out: Path, weights: Path, model: str = "test_resnet") -> FeatureStore:
    return extract(folder, model, out, weights=weights, device="cpu", image_size=64).store


def assert_same_rows(store: FeatureStore, embed: Extractor) -> None:
    with embed:
        np.testing.assert_allclose(rows_of(store, embed), store.features[:], atol=1e-4)


def test_weights_are_found_where_they_were(
    folder: Path, tmp_path: Path, files: Callable[[str, int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = Path(shutil.copy(files("test_resnet", 1), tmp_path / "w.pth"))
    monkeypatch.chdir(tmp_path)
    store = store_with(folder, tmp_path / "s", Path("w.pth"))
    monkeypatch.chdir(folder)
    assert_same_rows(store, Extractor.for_store(store, device="cpu"))
    weights.rename(tmp_path / "moved.pth")
    with pytest.raises(WeightsError, match=r"no longer .*w\.pth; name that file with weights=FILE"):
        Extractor.for_store(store, device="cpu")
    moved = tmp_path / "moved.pth"
    assert_same_rows(store, Extractor.for_store(store, device="cpu", weights=moved))
    (store.path / RUN).unlink()
    with pytest.raises(WeightsError, match=r"were made with w\.pth \(SHA-256 \w{64}\); name that"):
        Extractor.for_store(store, device="cpu")
    shutil.copy(files("test_resnet", 2), moved)
    with pytest.raises(
        WeightsError, match=r"got SHA-256 .*moved\.pth\), expected .*; try weights="
    ):
        Extractor.for_store(store, device="cpu", weights=moved)


def test_weights_swapped_in_their_place_are_refused(
    folder: Path, tmp_path: Path, files: Callable[[str, int], Path]
) -> None:
    weights = Path(shutil.copy(files("test_resnet", 1), tmp_path / "w.pth"))
    store = store_with(folder, tmp_path / "s", weights)
    shutil.copy(files("test_resnet", 2), weights)
    with pytest.raises(WeightsError, match=r"changed: got SHA-256 .*w\.pth\), expected .* as in"):
        Extractor.for_store(store, device="cpu")


def test_stores_without_recorded_backbones_know_their_files(
    folder: Path, tmp_path: Path, files: Callable[[str, int], Path]
) -> None:
    store = store_with(folder, tmp_path / "s", files("test_resnet", 1))
    run = json.loads((store.path / RUN).read_text())
    del run["backbones"], run["computed"]
    (store.path / RUN).write_text(json.dumps(run))
    assert_same_rows(store, Extractor.for_store(store, device="cpu", exact=True))


def test_a_mapping_names_the_weights_of_several_backbones(
    folder: Path, tmp_path: Path, files: Callable[[str, int], Path]
) -> None:
    store = extract(folder, f"test_resnet+{MODEL}", tmp_path / "s", **SMALL).store
    good = files("test_resnet", 0)
    with pytest.raises(UsageError, match=r"2 backbones; try a mapping such as {'timm:test_resnet'"):
        Extractor.for_store(store, weights=good)
    with pytest.raises(UsageError, match="got resnet9, expected names of timm:test_resnet, torch"):
        Extractor.for_store(store, weights={"resnet9": good})
    with pytest.raises(WeightsError, match=r"weights of timm:test_resnet changed: got SHA-256"):
        Extractor.for_store(store, weights={"test_resnet": files("test_resnet", 1)}, device="cpu")


def test_a_relative_folder_of_a_model_is_found_from_elsewhere(
    folder: Path, tmp_path: Path, files: Callable[[str, int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.json").write_text('{"architecture": "test_resnet"}')
    state = load_backbone("test_resnet", weights="random", keep_head=True, device="cpu")
    torch.save(state.module.state_dict(), tmp_path / "mine/pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    store = extract(folder, "local-dir:mine", tmp_path / "s", device="cpu", image_size=64).store
    other = store_with(folder, tmp_path / "t", files("test_resnet", 1), "local-dir:mine")
    monkeypatch.chdir(folder)
    assert_same_rows(store, Extractor.for_store(store, exact=True))
    assert_same_rows(other, Extractor.for_store(other, exact=True))
    (tmp_path / "mine").rename(tmp_path / "moved")
    with pytest.raises(
        WeightsError, match=r"pytorch_model\.bin .*, or the folder .*local-dir:PATH"
    ):
        Extractor.for_store(store)
    moved = f"local-dir:{tmp_path / 'moved'}"
    assert_same_rows(store, Extractor.for_store(store, exact=True, weights=moved))


@pytest.mark.parametrize(
    ("made_by", "expected"),
    [
        ({"tag": "a1_in1k", "source": "hf-hub:timm/resnet50.a1_in1k/model.safetensors"}, "a1_in1k"),
        ({"tag": "", "source": "hf-hub:me/net/model.safetensors"}, "hf-hub:me/net@c0ffee"),
        ({"model": "hf-hub:me/net@v1", "source": "hf-hub:me/net/model.safetensors"}, "default"),
        ({"model": "hf-hub:me/net", "source": "hf-hub:you/net/a.bin"}, "hf-hub:you/net@c0ffee"),
        ({"tag": "IMAGENET1K_V2", "source": "https://host/a-0123.pth"}, "IMAGENET1K_V2"),
        ({"weights": "random", "seed": 3}, "random"),
    ],
)
def test_published_weights_are_asked_for_as_in_the_run(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    made_by: dict[str, Any],
    expected: str,
) -> None:
    store = extract(folder, "test_resnet", tmp_path / "s", **SMALL).store
    described = store.manifest.description
    published = {"weights": "hub", "tag": "", "source": "", "revision": "c0ffee", "seed": None}
    object.__setattr__(described, "backbone", {**described.backbone, **published, **made_by})
    asked: list[str] = []

    def load(model: str, options: Options, recorded: object) -> Backbone:
        asked.append(options.weights)
        raise WeightsError("enough")

    monkeypatch.setattr(encoder, "load", load)
    with pytest.raises(WeightsError, match="enough"):
        Extractor.for_store(store, device="cpu")
    assert asked == [expected]


CODE = """
import torch
from torch import nn
from extractor import Backbone, Preprocess

def make():
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Backbone.from_module(network, head=None, preprocess=Preprocess.standard(48),
                                device="cpu")
"""


def test_code_of_the_user_runs_again_unless_it_changed(folder: Path, tmp_path: Path) -> None:
    code = tmp_path / "net.py"
    code.write_text(CODE)
    model = f"{code}:make"
    store = extract(folder, model, tmp_path / "s", device="cpu", seed=3).store
    assert_same_rows(store, Extractor.for_store(store, exact=True, weights=model))
    other_size = extract(folder, model, tmp_path / "t", device="cpu", image_size=32).store
    assert_same_rows(other_size, Extractor.for_store(other_size, exact=True, weights=model))
    with pytest.raises(StoreError, match=r"net\.py:make, which is code .*=\), such as /.*net\.py:"):
        Extractor.for_store(store, device="cpu")  # a file beside a store must not make code run
    code.write_text(CODE + "# changed\n")
    with pytest.raises(StoreError, match=r"code of net\.py:make changed .*got SHA-256 .*expected"):
        Extractor.for_store(store, device="cpu", weights=model)


def module(seed: int) -> Backbone:
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    return Backbone.from_module(
        network, head=None, preprocess=Preprocess.standard(48), name="mine", device="cpu"
    )


@pytest.mark.parametrize("settings", [{}, {"layers": ["0"], "pool": "max"}, {"image_size": 32}])
def test_a_network_of_the_caller_is_passed_again(
    folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    store = extract(folder, module(1), tmp_path / "s", batch_size=4, **settings).store
    with pytest.raises(WeightsError, match=r"network of your own program; pass it: .*backbone="):
        Extractor.for_store(store)
    with pytest.raises(WeightsError, match=r"the weights of module:mine changed: got SHA-256"):
        Extractor.for_store(store, backbone=module(2))
    with Extractor.for_store(store, backbone=module(1), exact=True) as embed:
        np.testing.assert_array_equal(rows_of(store, embed), store.features[:])
    assert_same_rows(store, Extractor.for_store(store, backbone=module(1)))


def test_one_backbone_does_not_stand_for_two(folder: Path, tmp_path: Path) -> None:
    store = extract(folder, f"test_resnet+{MODEL}", tmp_path / "s", **SMALL).store
    with pytest.raises(UsageError, match="got one, and the store was made with several"):
        Extractor.for_store(store, backbone=module(1))


# ---------------------------------------------------------------------------------------------
# Stores, and what a caller may choose


@pytest.fixture(scope="module")
def store(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    out = tmp_path_factory.mktemp("store") / "s"
    return extract(folder, "test_resnet", out, **SMALL, threads=1, batch_size=4).store


@pytest.mark.parametrize(
    "option", [{"image_size": 96}, {"layers": ["layer1"]}, {"normalize": True}, {"seed": 1}]
)
def test_the_store_decides_how_images_are_embedded(
    store: FeatureStore, option: dict[str, Any]
) -> None:
    with pytest.raises(TypeError, match=r"does not apply here: the store decides .*; expected ba"):
        Extractor.for_store(store, **option)


def test_an_installation_that_builds_another_network_is_refused(store: FeatureStore) -> None:
    manifest = store.path / "store.json"
    changed = json.loads(manifest.read_text())
    changed["backbone"]["heads"] = ["fc2"]
    other = FeatureStore.open(store.path)
    described = other.manifest.description
    object.__setattr__(described, "backbone", changed["backbone"])
    with pytest.raises(StoreError, match=r"test_resnet is not what .* \(backbone\.heads: "):
        Extractor.for_store(other, device="cpu")


def test_exact_takes_batches_and_threads_of_the_store(store: FeatureStore) -> None:
    for option in ({"threads": 2}, {"batch_size": 4}):
        with pytest.raises(UsageError, match=r"exact=True takes what the store was made with"):
            Extractor.for_store(store, exact=True, **option)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"got device mps, expected cpu as in the store"):
        Extractor.for_store(store, exact=True, device="mps")


def test_exact_passes_have_the_size_and_the_threads_of_the_store(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[tuple[int, int]] = []

    def forward(network: MeanPixel, pixels: torch.Tensor) -> torch.Tensor:
        passes.append((len(pixels), torch.get_num_threads()))
        return pixels.mean((2, 3))

    store = extract(folder, mean_pixel(), tmp_path / "s", threads=2, batch_size=5).store
    monkeypatch.setattr(MeanPixel, "forward", forward)
    for exact, expected in ((True, [(5, 2), (5, 2)]), (False, [(5, 3), (2, 3)])):
        options: dict[str, Any] = {} if exact else {"threads": 3, "batch_size": 5}
        with Extractor.for_store(store, backbone=mean_pixel(), exact=exact, **options) as embed:
            passes.clear()
            embed([store.full_path(row) for row in range(IMAGES)])
        assert passes == expected


def test_a_run_that_computes_nothing_keeps_the_threads_of_the_store(
    folder: Path, tmp_path: Path
) -> None:
    def computed() -> object:
        return json.loads((tmp_path / "s" / RUN).read_text())["computed"]

    extract(folder, mean_pixel(), tmp_path / "s", threads=1, fuse="off")
    assert computed() == {"threads": 1, "fuse": "off"}
    extract(folder, mean_pixel(), tmp_path / "s", threads=2)
    assert computed() == {"threads": 1, "fuse": "off"}
    extract(folder, mean_pixel(), tmp_path / "s", threads=2, overwrite=True)
    assert computed() == {"threads": 2, "fuse": "auto"}


def test_selections_and_groups_have_the_encoder_of_their_store(store: FeatureStore) -> None:
    for rows in (store.select("1*"), FeatureStore.open([store.path]).select("*")):
        assert_same_rows(store, Extractor.for_store(rows, device="cpu"))
    with pytest.raises(UsageError, match=r"got JoinedRows, .* make an extractor for each"):
        Extractor.for_store(FeatureStore.join(store, store))
    with pytest.raises(StoreNotFoundError, match="nowhere"):
        Extractor.for_store("nowhere")


@pytest.mark.slow
def test_a_fresh_process_has_the_same_encoder(store: FeatureStore) -> None:
    code = (
        "import sys, numpy as np; from extractor import Extractor, FeatureStore\n"
        "store = FeatureStore.open(sys.argv[1])\n"
        "with Extractor.for_store(sys.argv[1], exact=True) as embed:\n"
        "    rows = embed([store.full_path(2)])\n"
        "assert (rows[0] == store[2]).all()\n"
    )
    subprocess.run([sys.executable, "-c", code, str(store.path)], check=True)
