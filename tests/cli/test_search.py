"""``extract search``: its queries, its output, and what it refuses."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.pictures import noise

from extractor import FeatureStore, extract
from extractor.cli import main as cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images in ``images``, two of them the same, and a store of them in ``out``."""
    folder = tmp_path_factory.mktemp("search")
    for number in range(5):
        path = folder / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(number, 40, 30).save(path)
    noise(3, 40, 30).save(folder / "images" / "copy.png")
    extract(folder / "images", "test_resnet", folder / "out", weights="random", device="cpu")
    return folder


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def run(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    """Standard output of the command; its complaints where it is meant to fail."""
    assert cli.main(["search", "out", *words]) == code
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return printed.err if code else printed.out


def hits_of(text: str) -> list[tuple[str, list[str]]]:
    return [
        (query["query"], [hit["path"] for hit in query["hits"]])
        for query in json.loads(text)["queries"]
    ]


def test_table_lists_hits_below_each_query(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "b/3.png", "row:-1", "-k", "2").splitlines()
    assert [lines[0], lines[3]] == ["b/3.png", "copy.png"]
    assert lines[1] == "   1  1.0000  copy.png"
    assert lines[4] == "   1  1.0000  b/3.png"
    assert len(lines) == 6


def test_json_and_csv_hold_what_the_library_finds(capsys: pytest.CaptureFixture[str]) -> None:
    store = FeatureStore.open("out")
    expected = store.search(["a/0.png", "b/1.png"], 3)
    content = json.loads(run(capsys, "a/0.png", "row:3", "-k", "3", "--json"))
    assert (content["metric"], content["method"], content["token"]) == (
        "cosine",
        "exact",
        store.token,
    )
    for query, row, found in zip(content["queries"], [0, 3], expected, strict=True):
        assert query["row"] == row
        assert query["hits"] == [hit._asdict() for hit in found]
    rows = list(csv.reader(run(capsys, "a/0.png", "-k", "3", "--csv").splitlines()))
    assert rows[0] == ["query", "rank", "row", "id", "score", "path"]
    assert rows[1:] == [
        ["a/0.png", str(rank), *map(str, hit)] for rank, hit in enumerate(expected[0], 1)
    ]


def test_images_and_folders_are_queries(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    noise(1, 40, 30).save(tmp_path / "new.png")
    noise(4, 40, 30).save(tmp_path / "other.png")
    found = hits_of(run(capsys, str(tmp_path / "new.png"), "-k", "1", "--json", "--device", "cpu"))
    assert found == [(str(tmp_path / "new.png"), ["b/1.png"])]
    found = hits_of(run(capsys, str(tmp_path), "-k", "1", "--json"))
    assert [paths for _, paths in found] == [["b/1.png"], ["a/4.png"]]
    assert "3 rows" not in run(capsys, "images/a", "-k", "1", "--metric", "l2", "--csv")


def test_image_files_of_the_store_need_no_model() -> None:
    code = (
        "import sys; from extractor.cli.main import main; "
        "code = main(['search', 'out', 'images/b', 'a/0.png', 'row:2', '--sheet', 'new.png', "
        "'--overwrite']); print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"


def test_plus_and_minus_are_those_of_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    expected = FeatureStore.open("out").search("a/0.png", 2, plus=["b/1.png"], minus=["a/2.png"])
    words = ["a/0.png", "--plus", "row:3", "--minus", "a/2.png", "-k", "2", "--json"]
    assert hits_of(run(capsys, *words)) == [("a/0.png", [hit.path for hit in expected[0]])]
    (only_plus,) = hits_of(run(capsys, "--plus", "b/3.png", "-k", "1", "--json"))
    assert only_plus[1] == ["copy.png"]


def test_sheet_shows_query_and_hits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run(capsys, "b/3.png", "-k", "2", "--sheet", str(tmp_path / "hits.png"))
    with Image.open(tmp_path / "hits.png") as sheet:
        tiles = [np.asarray(sheet.crop((x, 40, x + 150, 130))) for x in (10, 180, 340)]
    assert np.abs(tiles[0].astype(int) - tiles[1]).max() == 0
    assert np.abs(tiles[0].astype(int) - tiles[2]).max() > 50
    before = (tmp_path / "hits.png").read_bytes()
    said = run(capsys, "a/0.png", "--sheet", str(tmp_path / "hits.png"), code=2)
    assert "exists; replace it with --overwrite" in said
    assert (tmp_path / "hits.png").read_bytes() == before


def test_a_broken_image_of_a_folder_is_a_warning(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    noise(1, 40, 30).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"nothing")
    said = run(capsys, str(tmp_path), code=3)
    assert f"warning: {tmp_path}/bad.png: not-an-image: no image format matches" in said
    said = run(capsys, str(tmp_path / "bad.png"), code=1)
    assert f"extract: {tmp_path}/bad.png: not-an-image: no image format matches" in said
    (tmp_path / "good.png").unlink()
    assert "none of the queries can be decoded" in run(capsys, str(tmp_path), code=1)


def test_other_weights_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    noise(1, 40, 30).save(tmp_path / "new.png")
    run_json = Path("out/run.json")
    before = run_json.read_text("utf-8")
    manifest = Path("out/store.json")
    text = manifest.read_text("utf-8")
    sha256 = json.loads(text)["backbone"]["sha256"]
    from extractor.store.format import with_checksum

    checked = text.replace(sha256, "0" * 64)
    start = checked.index('  "checksum": "')
    changed = with_checksum(checked[:start] + '  "checksum": ""\n}\n')
    try:
        manifest.write_text(changed, "utf-8")
        said = run(capsys, str(tmp_path / "new.png"), code=1)
    finally:
        manifest.write_text(text, "utf-8")
    assert "the weights of timm:test_resnet changed: got SHA-256" in said
    assert run_json.read_text("utf-8") == before


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "expected at least one QUERY; try extract search --help"),
        (["none.jpg"], 2, "none.jpg: no such image, and no such path in the store; expected"),
        (["row:6"], 2, "row:6: the store has 6 rows, counted from 0"),
        (["a/0.png", "-k", "7"], 2, "k: got 7, expected an integer from 1 to 6"),
        (["a/0.png", "--plus", "row:1", "--metric", "l2"], 2, "so there is no distance"),
        (["a/0.png", "--plus", "images"], 2, "images: is a folder, expected one image"),
        (["a/0.png", "--sheet", "x.tiff"], 2, "expected a file that ends with .png"),
        (["row:0", "--sheet", "x.png", "--root", "no"], 2, "there is no folder no"),
    ],
)
def test_what_makes_no_sense_is_refused(
    words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in run(capsys, *words, code=code)


def test_a_folder_that_is_no_store_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["search", "images", "row:0"]) == 1
    assert "images is not a store" in capsys.readouterr().err
