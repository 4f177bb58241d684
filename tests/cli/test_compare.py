"""``extract compare``: stores, or models that embed images first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.pictures import noise

from extractor.cli import compare
from extractor.cli import main as cli
from extractor.evaluation import speed
from extractor.store.format import MANIFEST

RUN = ["--weights", "random", "--device", "cpu"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight images in two folders."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speed, "SECONDS", 0.0)
    monkeypatch.setattr(speed, "BATCH", 2)
    for number in range(8):
        file = tmp_path / "images" / ("cats", "dogs")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        noise(number, 40, 40).save(file)


def test_name_of_the_manifest_is_that_of_the_format() -> None:
    assert compare.MANIFEST == MANIFEST


def test_models_embed_the_images_once(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", "-m", "test_resnet", "-m", "test_vit", "images", *RUN, "-k", "1"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "8 images, 2 classes, cosine, best accuracy@1 first" in printed
    lines = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line}
    assert "test_resnet" in lines
    assert "test_vit" in lines
    assert "linear CKA" in printed
    assert " M\n" in printed  # parameters
    # The stores stay, and are up to date the next time.
    assert cli.main([*words, "--json", "--no-speed"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert {each["name"] for each in again["stores"]} == {"test_resnet", "test_vit"}
    assert again["stores"][0]["parameters"] is None


def test_layers_of_one_model_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", "-m", "test_resnet", "--layer", "layer1", "--layer", "layer2", "images"]
    assert cli.main([*words, *RUN, "--json", "--no-speed"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["stores"]) == 2
    assert 0 <= result["cka"][0][1] <= 1


def test_stores_are_compared_without_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("a", "0"), ("b", "1")):
        run = ["-m", "test_resnet", "images", "-o", name, *RUN, "--seed", seed, "--quiet"]
        assert cli.main(run) == 0
    capsys.readouterr()
    assert cli.main(["compare", "a", "b"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("8 images, 2 classes")
    assert " - " in printed  # no parameters
    for words, message in (
        (["a"], "compare: got 1 store, expected at least two"),
        (["a", "images"], "compare: got stores and others (images), expected stores or images"),
        (["a", "b", "-m", "test_resnet"], "compare: -m is an option of a run"),
        (["images"], "compare: got one model, expected several -m or --layer"),
        ([], "compare: got one model"),
    ):
        assert cli.main(["compare", *words]) == 2
        assert capsys.readouterr().err.startswith(f"extract: {message}")
