"""``extract compare``: stores, or models that embed images first."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from support.pictures import noise

from extractor import FeatureStore
from extractor.cli import compare
from extractor.cli import main as cli
from extractor.evaluation import speed
from extractor.evaluation.comparing import ComparedStore, Difference
from extractor.store.format import MANIFEST

Rows = npt.NDArray[np.float32]
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


def cka_by_definition(first: Rows, second: Rows) -> float:
    """HSIC of the centered Gram matrices, as Kornblith et al. define linear CKA."""
    center = np.eye(len(first)) - 1 / len(first)
    grams = [center @ rows.astype(np.float64) @ rows.T.astype(np.float64) @ center
             for rows in (first, second)]  # fmt: skip

    def hsic(one: int, other: int) -> float:
        return float(np.trace(grams[one] @ grams[other]))

    return hsic(0, 1) / float(np.sqrt(hsic(0, 0) * hsic(1, 1)))


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


@pytest.mark.parametrize(
    "layers", [["--layer", "layer1", "--layer", "layer2"], ["--layer", "layer[12]"]]
)
def test_layers_of_one_model_are_compared(
    layers: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", "-m", "test_resnet", *layers, "images"]
    assert cli.main([*words, *RUN, "--json", "--no-speed"]) == 0
    result = json.loads(capsys.readouterr().out)
    names = [each["name"] for each in result["stores"]]
    assert sorted(names) == ["test_resnet@layer1", "test_resnet@layer2"]
    first, second = (FeatureStore.open(f"features/{name}").features[:] for name in names)
    assert result["cka"][0][1] == pytest.approx(cka_by_definition(first, second), abs=1e-6)
    assert result["cka"][0][0] == pytest.approx(1)


def test_variants_without_a_block_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    run = ["-m", "test_vit", "images", *RUN, "--quiet"]
    assert cli.main([*run, "-o", "whole"]) == 0
    assert cli.main([*run, "-o", "without", "--bypass", "blocks.1"]) == 0
    assert cli.main([*run, "-o", "again", "--bypass", "blocks.1"]) == 0
    assert cli.main(["compare", "whole", "without", "again", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    at = {each["name"]: number for number, each in enumerate(result["stores"])}
    cka = np.array(result["cka"])
    whole, without = (FeatureStore.open(name).features[:] for name in ("whole", "without"))
    expected = cka_by_definition(whole, without)
    assert expected < 0.999  # the block changes the embedding
    assert cka[at["whole"], at["without"]] == pytest.approx(expected, abs=1e-6)
    assert cka[at["again"], at["without"]] == pytest.approx(1)


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


def test_difference_that_rounds_to_zero_has_no_minus() -> None:
    def store(name: str) -> ComparedStore:
        return ComparedStore(name, None, 2, 8, 0)  # type: ignore[arg-type]

    difference = Difference("a", "b", "MAP@R", 0.0001, -0.0004, 0.0123)
    cell = compare._cell([difference], store("a"), store("b"), "MAP@R")
    assert cell == "+0.0 (-1.2 to +0.0) "
