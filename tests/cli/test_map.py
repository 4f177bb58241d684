"""``extract map``: one library call, and what it prints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from extractor import map_store
from extractor.cli import main as cli

WriteStore = Callable[..., Path]


@pytest.fixture
def store(tmp_path: Path, write_store: WriteStore, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    rows[3] = np.nan
    return write_store(tmp_path / "store", [rows])


def test_the_map_is_made_once(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["map", "store"]) == 0
    lines = capsys.readouterr().out.splitlines()
    store_map = map_store("store")
    assert store_map.explained is not None
    assert lines == [
        "store: a new map of 11 rows",
        f"method  pca, {100 * sum(store_map.explained):.1f} % of the variance",
        f"map     {store_map.path}",
        "1 row left out, with NaN or infinity",
    ]
    assert cli.main(["map", "store"]) == 0
    assert capsys.readouterr().out.startswith("store: 11 rows, as before\n")
    assert cli.main(["map", "store", "--refit"]) == 0
    assert capsys.readouterr().out.startswith("store: a new map of 11 rows\n")


def test_files_are_written_and_never_replaced_by_accident(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    words = ["map", "store", "-o", "a.png", "-o", "a.svg", "--parquet", "a.parquet"]
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if line.startswith("wrote")] == [
        "wrote   a.png",
        "wrote   a.svg",
        "wrote   a.parquet",
    ]
    assert "a.parquet: 11 images moved or cannot be read" in err
    assert pq.read_schema("a.parquet").names == ["id", "path", "x", "y", "neighbors", "image"]
    before = Path("a.png").read_bytes()
    assert cli.main([*words, "--refit"]) == 2
    assert "a.png exists; replace it with --overwrite" in capsys.readouterr().err
    assert Path("a.png").read_bytes() == before
    assert cli.main([*words, "--overwrite", "--no-thumbnails", "--neighbors", "0"]) == 0
    assert capsys.readouterr().err == ""
    assert pq.read_schema("a.parquet").names == ["id", "path", "x", "y"]


def test_json_holds_the_result(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["map", "store", "--json", "--parquet", "m.parquet", "--no-thumbnails"]
    assert cli.main(words) == 0
    content = json.loads(capsys.readouterr().out)
    store_map = map_store("store")
    assert content == {
        "store": "store",
        "token": store_map.store.token,
        "method": "pca",
        "rows": 12,
        "fitted": 11,
        "placed": 0,
        "left_out": 1,
        "was_made": True,
        "explained": list(store_map.explained or ()),
        "path": str(store_map.path),
        "files": ["m.parquet"],
    }


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["nothing"], 1, "nothing is not a store"),
        (["store", "-o", "map.jpg"], 2, "expected a file that ends with .png, .svg"),
        (["store", "--parquet", "map.csv"], 2, "expected a file that ends with .parquet"),
        (["store", "--parquet", "m.parquet", "--neighbors", "-1"], 2, "expected an integer of at"),
        (["store", "--parquet", "m.parquet", "--root", "no"], 2, "root: there is no folder no"),
        (["store", "--parquet", "m.parquet", "--labels", "no.csv"], 2, "cannot read no.csv"),
    ],
)
def test_errors_are_one_line(
    store: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    assert cli.main(["map", *words]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_picture_among_the_images_is_warned_of(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    Path("images").mkdir()
    words = ["map", "store", "--root", "images", "-o", "images/a.svg", "-o", "b.png"]
    assert cli.main(words) == 0
    assert "lies in the folder" not in capsys.readouterr().err
    assert cli.main(["map", "store", "--root", "images", "-o", "images/a.png"]) == 0
    assert "images/a.png lies in the folder of the images" in capsys.readouterr().err
