"""The example programs in Python run, and do what they say."""

from __future__ import annotations

import ast
import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.pictures import noise

import extractor
from extractor import FeatureStore, evaluate_store, extract

EXAMPLES = Path(__file__).parents[2] / "scripts" / "examples"
PIPELINES = {"daft_udf", "ray_data"}  # whole programs of another framework
MODEL = "torchvision:squeezenet1_1"
OPTIONS: dict[str, Any] = {"weights": "random", "device": "cpu", "image_size": 64}


def program(name: str) -> dict[str, Any]:
    """Return the names of a program, without running it."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six photos in two folders, in a store."""
    for index in range(6):
        file = tmp_path / "images" / ("cats", "dogs")[index % 2] / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        noise(index, 70, 80).save(file)
    grow(tmp_path)
    return tmp_path


def grow(folder: Path, **options: Any) -> FeatureStore:
    return extract(folder / "images", MODEL, folder / "out", **OPTIONS, **options).store


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: str(path.stem))
def test_example_program_is_short_and_says_how_to_call_it(path: Path) -> None:
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= (70 if path.stem in PIPELINES else 40)
    assert path.stem in (ast.get_docstring(ast.parse(text)) or "")


def test_search_finds_the_same_picture_first(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, copy = str(folder / "images" / "dogs" / "3.png"), str(folder / "copy.png")
    shutil.copyfile(image, copy)
    program("search")["main"](str(folder / "out"), copy, image)
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == [copy] * 5 + [image] * 5
    assert lines[0][2] == image
    assert float(lines[0][1]) == pytest.approx(1, abs=1e-4)
    assert image not in [line[2] for line in lines[5:]]  # a row does not find itself


@pytest.mark.parametrize("name", ["index.npz", "index"])
def test_index_in_sync_has_the_rows_of_the_store(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    index = folder / name

    def sync(message: str) -> None:
        program("sync_index")["main"](str(folder / "out"), str(index))
        assert capsys.readouterr().out == message + "\n"
        store = FeatureStore.open(folder / "out")
        with np.load(index) as saved:
            assert sorted(saved["ids"]) == sorted(store.ids)
            assert (saved["rows"] == store.features[store.rows_of(saved["ids"])]).all()

    sync("6 added, 0 removed, 6 in the index")
    (folder / "images" / "cats" / "0.png").unlink()
    noise(9, 70, 80).save(folder / "images" / "cats" / "2.png")
    noise(10, 70, 80).save(folder / "images" / "new.png")
    grow(folder, retire=True)
    sync("2 added, 2 removed, 6 in the index")
    with np.load(index) as saved:
        ids, rows = saved["ids"], saved["rows"]
    with index.open("wb") as file:
        np.savez(file, ids=ids, rows=rows, token="unknown")
    sync("6 added, 6 removed, 6 in the index")


def test_probe_names_the_class_of_an_image(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    measured = evaluate_store(folder / "out", probe=True).scores["linear probe"].value
    images = [str(folder / "images" / name) for name in ("cats/0.png", "dogs/3.png")]
    program("linear_probe")["main"](str(folder / "out"), *images)
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith(f"accuracy {measured:.3f}, between 0.")
    assert others == [f"{images[0]}\tcats", f"{images[1]}\tdogs"]  # it was trained on them


def test_joined_rows_are_those_of_both_stores(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = FeatureStore.open(folder / "out")
    shutil.copytree(store.path, folder / "other")
    program("join")["main"](str(folder / "both.npz"), str(store.path), str(folder / "other"))
    with np.load(folder / "both.npz") as saved:
        assert saved["paths"].tolist() == store.paths
        assert saved["rows"].shape == (6, 2 * store.dim)
    assert "6 images, 1024 numbers each; left out: (0, 0)" in capsys.readouterr().out


def test_web_handler_answers_with_the_image_itself(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    testclient = pytest.importorskip("fastapi.testclient")
    monkeypatch.setenv("STORE", str(folder / "out"))
    names = program("web_handler")
    with names["embed"], testclient.TestClient(names["app"]) as client:
        image = (folder / "images" / "dogs" / "3.png").read_bytes()
        first, *others = client.post("/search", content=image).json()
        assert (first["path"], len(others)) == ("dogs/3.png", 4)
        assert client.post("/search", content=b"none").status_code == 422


def test_reader_shows_each_state(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        if not now:
            noise(9, 70, 80).save(folder / "images" / "new.png")
            grow(folder)
        now += seconds

    main = program("reader")["main"]
    main.__globals__["time"] = SimpleNamespace(monotonic=lambda: now, sleep=sleep)
    main(str(folder / "out"), "0.25")
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["6 rows, last image dogs/5.png", "7 rows, last image new.png"]


def test_task_prints_its_report_and_maps_errors_to_exit_codes(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(*arguments: Any, **callbacks: Any) -> Any:
        return extract(*arguments, **callbacks, **OPTIONS)

    monkeypatch.setattr(extractor, "extract", small)
    main: Callable[..., int] = program("scheduler_task")["main"]
    images, out, stop = (str(folder / name) for name in ("images", "again", "stop"))
    assert main(images, MODEL, out, stop) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["stores"][0]["rows"] == 6
    assert "listing 0/0" in output.err
    assert output.err.endswith("computing 6/6\npublishing 6/6\n")
    (folder / "images" / "bad.png").write_text("bad")
    assert main(images, MODEL, out, stop) == 3
    Path(stop).touch()
    assert main(images, MODEL, out, stop) == 75
    assert "stopped before the first image" in capsys.readouterr().err
    assert main(images, "", out, str(folder / "none")) == 2
    assert main(str(folder / "missing"), MODEL, out, str(folder / "none")) == 1
