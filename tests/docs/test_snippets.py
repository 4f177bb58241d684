"""Every snippet of the README and the guides is run by a test."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import check_prose
import numpy as np
import pytest
import timm
import torch
from support.pictures import noise
from support.snippets import Reader, snippets

import extractor
from extractor.evaluation import speed
from extractor.models import embedding
from extractor.models import load as load_module
from extractor.models.naming import split_weights
from extractor.options import Options

ROOT = Path(__file__).parents[2]
GENERATED = ("docs/api.md", "docs/cli.md")  # test_api_reference.py runs the examples
PAGES = {page.relative_to(ROOT).as_posix(): page for page in check_prose.pages()}
SHOWN = {name: page for name, page in PAGES.items() if name not in GENERATED and snippets(page)}

# Pages that a test of their own runs, since it knows what they assume and what comes out.
TESTED_BY = {
    "docs/duplicates.md": "docs/test_duplicates.py",
    "docs/evaluate.md": "docs/test_evaluate.py",
    "docs/identity.md": "docs/test_guides.py",
    "docs/integrations.md": "docs/test_integrations.py",
    "docs/map.md": "docs/test_map.py",
    "docs/search.md": "docs/test_search.py",
    "docs/serving.md": "docs/test_serving.py",
}

# What cannot run in a test, by its beginning, and why.
ELSEWHERE = {
    "pip install": "test_extras_of_pip_exist",
    "python3 -m venv": "tests run in an environment of their own",
    ". venv/bin/activate": "tests run in an environment of their own",
    ".venv/bin/python scripts/": "tests/scripts",
    "python scripts/benchmarks/": "tests/scripts",
    "scripts/quickstart.sh": "scripts/test_quickstart.py",
    "scripts/test.sh": "it runs this test",
    "EXTRACTOR_REQUIRE_CUDA=1 scripts/test.sh": "it runs this test",
    "scripts/check_gpu.sh": "scripts/test_check_gpu.py",
    "extract --devices": "needs GPUs, or takes long; workers/test_local.py",
    "extract --processes": "takes long; workers/test_local.py",
    "extract --engine ray": "needs a cluster; workers/test_ray_actor.py",
    "extract --part 3/16": "guide-batch.md runs all parts of a run",
    "extract doctor": "starts many processes; cli/test_doctor.py",
    "extract transform features/resnet50": "needs 257 images; docs/test_search.py",
    "extract view": "serves until someone ends it; view/test_server.py",
    "ssh ": "needs another machine",
    "extract download": "needs a network; cli/test_models.py",
    "HF_HOME=": "needs a network; cli/test_models.py",
    "extract info --json features/nightly | jq": "jq; guide-batch.md runs it without",
    "ray start": "needs a cluster; scripts/test_cluster_examples.py",
    "images = ray.data.": "needs Ray Data; scripts/test_cluster_examples.py",
    "embed = Embed(": "needs Daft; scripts/test_cluster_examples.py",
    "docker ": "scripts/test_cluster_examples.py reads the Dockerfile",
    "kubectl ": "scripts/test_examples.py and test_cluster_examples.py read the manifests",
    "sbatch ": "scripts/test_examples.py runs the script",
    "MODEL=vit_base_patch16_224 IMAGES=": "scripts/test_examples.py runs the script",
    "sudo ": "scripts/test_examples.py reads the units",
    "journalctl ": "needs systemd",
}


SIZE = 64  # of the pictures
SCRIPTS = {"EXTRACTOR_WEIGHTS": "random", "EXTRACTOR_IMAGE_SIZE": str(SIZE)}
SMALL = {
    "resnet50": "resnet18",
    "vit_base_patch16_224": "test_vit",
    "torchvision:vgg16": "torchvision:squeezenet1_1",
}


def small(load: Callable[..., Any]) -> Callable[..., Any]:
    """Load a small model of the same family, with random weights unless a file is named."""

    @functools.wraps(load)
    def patched(model: str, options: Options, *rest: Any) -> Any:
        name, own = split_weights(model)
        name = SMALL.get(name, name)
        size = options.image_size if "vit" in name else SIZE
        weights = next((w for w in (own, options.weights) if w and Path(w).is_file()), "random")
        changed = {"weights": weights, "precision": "float32", "image_size": size, "device": "cpu"}
        return load(name, replace(options, **changed), *rest)

    return patched


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of weights that pages name."""
    folder = tmp_path_factory.mktemp("weights")
    for name in ("mine.pth", "other.pth"):
        torch.save(timm.create_model("resnet18").state_dict(), folder / name)
    return folder


@pytest.fixture
def here(
    tmp_path: Path,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The current folder, with what pages assume: images in folders, a query, weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("EXTRACTOR_DEVICE", "cpu")
    for module in (embedding, load_module):
        monkeypatch.setattr(module, "load", small(module.load))
    monkeypatch.setattr(speed, "SECONDS", 0.0)
    monkeypatch.setattr(speed, "BATCH", 2)
    images = [f"photos/{kind}/{kind}_{i:03}.jpg" for kind in ("Banana", "Kiwi") for i in range(4)]
    images += [f"groceries/Satsumas/Satsumas_{i:03}.jpg" for i in range(6)]
    images += [f"images/{name}.jpg" for name in ("cats/tom", "dogs/rex", "dogs/ace")]
    for seed, name in enumerate([*images, "query.jpg"]):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(seed, 40, 48).save(path)
    (tmp_path / "images.txt").write_text("images/dogs/rex.jpg\nimages/cats/tom.jpg\n")
    np.save(tmp_path / "labels.npy", [1, 0])
    for file in weights.iterdir():
        (tmp_path / file.name).symlink_to(file)
    return tmp_path


def names_of(page: str) -> dict[str, Any]:
    """Return the variables that a page assumes."""
    if page == "README.md":
        names = ("resnet18", "test_vit")
        backbone, other = (extractor.load_backbone(name, weights="random") for name in names)
        pixels = torch.zeros(1, 3, 64, 64)
        return {"backbone": backbone, "other_backbone": other, "pixels": pixels}
    if page == "docs/usage.md":
        return {"np": np, "FeatureStore": extractor.FeatureStore}
    if page == "docs/models.md":
        network = torch.nn.Sequential()
        network.add_module(
            "body", torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        )
        network.add_module("fc", torch.nn.Linear(3, 2))
        return {
            "load_backbone": extractor.load_backbone,
            "extract": extractor.extract,
            "network": network,
        }
    if page == "docs/view.md":
        extractor.extract("images", "resnet50", "features/resnet50")
    if page == "docs/batch-jobs.md":
        return {"show": lambda progress: None, "should_stop": lambda: False}
    return {}


def test_a_page_with_a_test_of_its_own_is_named_in_it() -> None:
    for name, test in TESTED_BY.items():
        assert name in SHOWN
        assert f'"{Path(name).name}"' in (ROOT / "tests" / test).read_text("utf-8")


def test_what_cannot_run_here_is_shown_and_its_reason_exists() -> None:
    shown = [
        text
        for name, page in SHOWN.items()
        if name not in TESTED_BY
        for snippet in snippets(page)
        for text in (snippet.commands or [snippet.content])
    ]
    for start, reason in ELSEWHERE.items():
        assert any(text.startswith(start) for text in shown), start
        for test in re.findall(r"\w+/test_\w+\.py", reason):
            assert (ROOT / "tests" / test).exists(), test


def test_extras_of_pip_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    section = project.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    extras_there = set(re.findall(r"^(\w+) = ", section, re.M))
    for name, page in PAGES.items():
        for extras in re.findall(
            r"(?:backbone-extractor|\.)\[([\w,]+)\]'", page.read_text("utf-8")
        ):
            assert set(extras.split(",")) <= extras_there, name


@pytest.mark.parametrize(
    ("block", "error"),
    [
        ("sh\nfrobnicate photos", "nothing runs 'frobnicate photos'"),
        ("console\n$ extract nowhere", "exit code 1"),
        ("console\n$ extract models vgg11\ntorchvision:vgg99", "a line that is not there"),
        ("python\nassert False, 'wrong'", "wrong"),
        ("sh\n#!/bin/sh\nexit 3", "exit code 3"),
    ],
)
def test_a_snippet_that_nothing_runs_or_that_fails_is_found(
    block: str,
    error: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n```{block}\n```\n")
    with pytest.raises((AssertionError, pytest.fail.Exception), match=error):
        Reader(monkeypatch, capsys, ELSEWHERE).read(page)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(SHOWN) - set(TESTED_BY)))
def test_every_snippet_runs(
    name: str,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for package in ("faiss", "sklearn", "matplotlib", "starlette"):
        pytest.importorskip(package)
    Reader(monkeypatch, capsys, ELSEWHERE, names_of(name), SCRIPTS).read(SHOWN[name])
