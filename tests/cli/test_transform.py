"""``extract transform``: one library call, what it prints, and what reads its result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from support.pictures import noise

from extractor import Extractor, FeatureStore, Searcher, UsageError, extract, transform_store
from extractor.cli import main as cli

MODEL = "torchvision:squeezenet1_1"
ROWS = np.random.default_rng(0).normal(size=(9, 5)).astype("f4")


@pytest.fixture
def here(tmp_path: Path, write_store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_store(tmp_path / "store", [ROWS])
    return tmp_path


def test_command_says_what_it_wrote_and_that_nothing_is_left(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["transform", "store", "-o", "out", "--normalize", "--pca", "2", "--whiten"]
    assert cli.main(words) == 0
    assert capsys.readouterr().out == "out: 9 rows transformed, 9 rows in all, 2 float32\n"
    assert cli.main(words) == 0
    assert capsys.readouterr().out == "out: nothing to do, up to date (9 rows, 2 float32)\n"
    assert cli.main([*words, "--dtype", "float16", "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "out": "out",
        "rows": 9,
        "added": 9,
        "removed": 0,
        "shape": [2],
        "dtype": "float16",
        "is_fitted": True,
        "is_changed": True,
    }


def test_info_names_the_steps_the_source_and_the_fit(
    here: Path, write_store: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    write_store(here / "other", [ROWS[:7]])
    words = ["transform", "store", "-o", "out", "--normalize", "--pca", "2", "--whiten"]
    assert cli.main([*words, "--fit", "other"]) == 0
    assert cli.main(["info", "out"]) == 0
    shown = capsys.readouterr().out
    assert "transform  unit length, PCA 5 to 2, whitening, unit length\n" in shown
    assert f"source     {here / 'store'}\n" in shown
    assert f"fitted on  7 rows of {here / 'other'}\n" in shown
    assert cli.main(["transform", "store", "-o", "half", "--dtype", "float16"]) == 0
    assert cli.main(["info", "half"]) == 0
    shown = capsys.readouterr().out
    assert "transform  float32 to float16\n" in shown
    assert "fitted on" not in shown


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["none", "-o", "out", "--pca", "2"], 1, "none is not a store: there is no such folder"),
        (["store", "-o", "out"], 2, "got no step"),
        (["store", "-o", "out", "--pca", "6"], 2, "expected at most 5"),
        (["store", "-o", "store", "--pca", "2"], 2, "which is the store to read"),
    ],
)
def test_errors_become_exit_codes(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    assert cli.main(["transform", *words]) == code
    assert message in capsys.readouterr().err
    assert not (here / "out").exists()


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of a small network with random weights, in a folder with its images."""
    folder = tmp_path_factory.mktemp("embedded")
    (folder / "images").mkdir()
    for i in range(8):
        noise(i, 60 + 3 * i, 50).save(folder / "images" / f"{i}.png")
    extract(
        folder / "images",
        MODEL,
        folder / "source",
        weights="random",
        device="cpu",
        image_size=64,
        dtype="float16",
    )
    return folder


def test_queries_are_transformed_as_the_rows_were(
    embedded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(embedded)
    words = ["transform", "source", "-o", "out", "--normalize", "--pca", "4", "--whiten"]
    assert cli.main([*words, "--dtype", "float32"]) == 0
    store = FeatureStore.open("out")
    with Extractor.for_store(store, device="cpu") as embed:
        assert (embed.dim, embed.shape) == (4, (4,))
        paths = [store.full_path(row) for row in range(8)]
        rows = embed(paths)
        assert rows.dtype == np.float32
        cosines = (rows * store.features[:]).sum(1)
        assert cosines.min() > 0.999
        mixed = embed([paths[3], b"no image"], on_error="return")
        np.testing.assert_allclose(mixed[0], rows[3], atol=1e-4)  # type: ignore[arg-type]
        hits = Searcher(store, extractor=embed).search([noise(2, 66, 50)], k=1)
        assert hits.rows.tolist() == [[2]]
    with Extractor.for_store(store, exact=True) as embed:
        assert embed(paths).tobytes() == store.features[:].tobytes()
    noise(5, 75, 50).save("query.png")
    capsys.readouterr()
    assert cli.main(["search", "out", "query.png", "-k", "1", "--json", "--device", "cpu"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["queries"]
    assert found["hits"][0]["path"] == "5.png"
    assert found["hits"][0]["score"] > 0.999
    assert cli.main(["verify", "out", "--recompute", "8", "--device", "cpu"]) == 0
    assert "out: OK (8 rows, 0 failures)" in capsys.readouterr().out


def test_result_knows_the_weights_of_a_source_that_is_gone(embedded: Path) -> None:
    """A file of the user's is found where it was, as ``run.json`` keeps it."""
    file, source, out = (embedded / name for name in ("mine.pth", "mine", "mine-small"))
    torch.manual_seed(1)
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), file)
    rows = extract(
        embedded / "images", MODEL, source, weights=str(file), device="cpu", image_size=64
    ).store
    transform_store(source, out, normalize=True, pca=3)
    paths = [rows.full_path(row) for row in range(8)]
    shutil.rmtree(source)
    with Extractor.for_store(out, device="cpu") as embed:
        found = embed(paths)
    np.testing.assert_allclose(found, FeatureStore.open(out).features[:], atol=1e-3)


def test_extractor_without_the_transform_is_refused(embedded: Path) -> None:
    transform_store(embedded / "source", embedded / "pca", pca=4)
    with Extractor(MODEL, weights="random", device="cpu") as embed:
        searcher = Searcher(FeatureStore.open(embedded / "pca"), extractor=embed)
        with pytest.raises(UsageError, match="an embedding of 512 values, and the rows have 4"):
            searcher.search(noise(2, 66, 50))


def test_extract_refuses_to_extend_the_result_before_it_loads_a_model(
    embedded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(embedded)
    assert cli.main(["transform", "source", "-o", "refused", "--normalize"]) == 0
    assert cli.main(["images", "-m", "no-such-model", "-o", "refused"]) == 1
    message = f"refused holds rows that a transform made from {embedded / 'source'}; extend that"
    assert message in capsys.readouterr().err
