"""The images and the neighbors that scripts/quickstart.sh shows."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from support.commands import run_extract

from extractor import Extractor, FeatureStore, extract
from extractor.models.lite_weights import MODEL, PACKAGES

SCRIPTS = Path(__file__).parents[2] / "scripts"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


make_images = script("make_images")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart") / "images"
    command = [sys.executable, str(SCRIPTS / "make_images.py"), str(folder), "--count", "16"]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def test_images_of_a_kind_differ_and_are_repeatable() -> None:
    for kind in make_images.KINDS:
        first, again, second = (make_images.picture(kind, seed) for seed in (1, 1, 2))
        assert first.tobytes() == again.tobytes()
        assert first.size != second.size or first.tobytes() != second.tobytes()


def test_images_lie_in_a_folder_for_each_kind(images: Path) -> None:
    assert sorted(path.name for path in images.iterdir()) == sorted(make_images.KINDS)
    assert len(list(images.rglob("*.jpg"))) == 16


def test_real_weights_find_images_of_the_same_kind(images: Path) -> None:
    if PACKAGES[MODEL].locate() is None:
        pytest.skip(f"{PACKAGES[MODEL].distribution} is not installed")
    paths = sorted(images.rglob("*.jpg"))
    kinds = np.array([path.parent.name for path in paths])
    rows = Extractor(MODEL, device="cpu", precision="float32", normalize=True)(paths)
    similarity = rows @ rows.T
    np.fill_diagonal(similarity, -1)
    # One of 15 is right: a guess finds 7 %.
    assert (kinds[similarity.argmax(axis=1)] == kinds).mean() >= 0.9


def test_neighbors_are_printed_and_drawn(images: Path, tmp_path: Path) -> None:
    """The last command of the script, with fewer images."""
    store, sheet = tmp_path / "store", tmp_path / "sheet.png"
    extract(images, "resnet18", store, weights="random", image_size=32, device="cpu")
    text = (SCRIPTS / "quickstart.sh").read_text("utf-8")
    (line,) = re.findall(r"^run (search .*)$", text, re.MULTILINE)
    line = line.replace("$work/features", str(store)).replace("$work/neighbors.png", str(sheet))
    line = line.replace("row:28", "row:15")
    done = run_extract(*shlex.split(line))
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert len(lines) == 3 * (1 + 4)
    with Image.open(sheet) as image:
        assert image.width > 5 * 150
        assert len(image.getcolors(10**6) or []) > 100
    paths = list(FeatureStore.open(store).paths)
    assert lines[0] == paths[0]
    rows = np.array(FeatureStore.open(store).features, np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    similarity = rows @ rows[0]
    best = int(np.argsort(-similarity)[1])
    assert lines[1] == f"   1  {similarity[best]:.4f}  {paths[best]}"
