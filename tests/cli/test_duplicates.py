"""``extract duplicates`` and ``extract outliers``: one library call, and what they print."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.vectors import turned

from extractor import find_duplicates, find_outliers
from extractor.cli import main as cli
from extractor.cli.duplicates import write_csv
from extractor.search.sheet import EMPTY
from extractor.store.index import ImageRecord

NAMES = [b"cats/a.png", b"cats/b.png", b"dogs/c.png", b"dogs/d.png", b"dogs/\xfc.png"]


@pytest.fixture(autouse=True)
def folder(
    tmp_path: Path, write_store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two stores: rows 0 and 1 are near, rows 2 and 4 are equal files."""
    monkeypatch.chdir(tmp_path)
    rows = turned(0, 5, 90, 180, 92)
    digests = [bytes([each]) * 32 for each in (1, 2, 3, 4, 3)]
    records = [
        ImageRecord(name, 100, 10**18, 40 + at, 30, digest)
        for at, (name, digest) in enumerate(zip(NAMES, digests, strict=True))
    ]
    root = str(tmp_path / "images")
    write_store(tmp_path / "store", [rows], records=[records], dim=2, root=root)
    write_store(tmp_path / "train", [rows[:1]], records=[records[:1]], dim=2, root=root)
    for at, name in enumerate(NAMES[:4]):
        path = tmp_path / "images" / name.decode()
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (10 * at, 0, 200)).save(path)


def lines_of(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert cli.main(list(words)) == 0
    return capsys.readouterr().out.splitlines()


def test_page_shows_groups_and_which_image_to_keep(capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of(capsys, "duplicates", "store")
    assert lines[0] == "store: 5 rows, threshold 0.98, exact"
    assert "group 1, near, 2 images" in lines
    assert lines[3].split() == ["keep", "41x30", "cats/b.png"]
    assert lines[4].split() == ["0.9962", "40x30", "cats/a.png"]
    assert "group 2, identical, 2 images" in lines
    assert lines[-1] == "2 groups, 2 images beside those to keep"


def test_top_limits_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of(capsys, "duplicates", "store", "--top", "1")
    assert "1 more group; try --csv FILE or --json" in lines
    assert not any("identical" in line for line in lines)


def test_json_is_the_result_of_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of(capsys, "duplicates", "store", "--json", "--threshold", "0.999")
    expected = find_duplicates("store", threshold=0.999).to_mapping()
    assert json.loads("\n".join(lines)) == json.loads(json.dumps(expected))
    lines = lines_of(capsys, "outliers", "store", "--json", "--labels", "folders", "-k", "2")
    expected = find_outliers("store", "folders", k=2).to_mapping()
    assert json.loads("\n".join(lines)) == json.loads(json.dumps(expected))


def test_csv_holds_what_looks_like_a_formula_as_it_is(tmp_path: Path) -> None:
    names = ["=1+1.png", "+a.png", "-b.png", "@c.png", "\ttab.png", 'quoted "d".png', "two\nlines"]
    write_csv(str(tmp_path / "n.csv"), ["path"], [[name] for name in names])
    with open(tmp_path / "n.csv", encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [["path"], *([name] for name in names)]


def test_csv_holds_every_image(capsys: pytest.CaptureFixture[str]) -> None:
    lines_of(capsys, "duplicates", "store", "--csv", "d.csv")
    with open("d.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["group"], row["keep"], row["row"]) for row in rows] == [
        ("1", "1", "1"),
        ("1", "0", "0"),
        ("2", "1", "4"),
        ("2", "0", "2"),
    ]
    assert rows[2]["path"] == "dogs/\udcfc.png"
    lines_of(capsys, "outliers", "store", "--csv", "o.csv")
    assert len(Path("o.csv").read_bytes().splitlines()) == 6


def test_images_of_another_store_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of(capsys, "duplicates", "store", "--against", "train", "--csv", "d.csv")
    assert lines[0] == "store: 5 rows against train, 1 row, threshold 0.98, exact"
    assert "group 1, identical, 2 images" in lines
    assert lines[-1] == "2 images of store in train"
    table = Path("d.csv").read_text("utf-8", "surrogateescape").splitlines()
    stores = [row["store"] for row in csv.DictReader(table)]
    assert stores == ["store", "train", "store", "train"]


def test_outliers_are_ranked_in_all_and_per_class(capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of(capsys, "outliers", "store", "--labels", "folders", "-k", "1")
    assert lines[0] == "store: 5 rows, 1 neighbor, exact"
    assert lines[3].split() == ["1", "0.9651", "dogs/d.png"]
    at = next(at for at, line in enumerate(lines) if "furthest in its class" in line)
    assert lines[at + 2].split() == ["3", "0.9651", "dogs/d.png"]
    assert lines[-1] == "no image whose neighbors agree on another label"
    Path("labels.csv").write_bytes(
        b"path,label\n" + b"".join(name + b",cat\n" for name in NAMES[:4]) + NAMES[4] + b",dog\n"
    )
    lines = lines_of(capsys, "outliers", "store", "--labels", "labels.csv", "-k", "1")
    assert lines[-4:] == [
        "3 images whose neighbors agree on another label:",
        "  100%  cat -> dog  dogs/c.png",
        "  100%  cat -> dog  dogs/d.png",
        "  100%  dog -> cat  dogs/\\udcfc.png",
    ]


@pytest.mark.parametrize("verb", ["duplicates", "outliers"])
def test_sheet_has_a_placeholder_for_an_image_that_moved(
    capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    assert cli.main([verb, "store", "--sheet", "sheet.png"]) == 0
    assert "warning: 1 image not found; name their folder with --root" in capsys.readouterr().err
    colors = np.unique(np.asarray(Image.open("sheet.png")).reshape(-1, 3), axis=0).tolist()
    assert [0, 0, 200] in colors
    assert list(EMPTY) in colors
    Path("images").rename("moved")
    Path("sheet.png").unlink()
    assert cli.main([verb, "store", "--sheet", "sheet.png", "--root", "moved"]) == 0
    assert "1 image not found" in capsys.readouterr().err


def test_a_store_without_duplicates_has_no_sheet(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["duplicates", "train", "--sheet", "sheet.png"]) == 0
    assert not Path("sheet.png").exists()
    captured = capsys.readouterr()
    assert "no duplicates, so no contact sheet" in captured.err
    assert captured.out.endswith("0 groups, 0 images beside those to keep\n")


@pytest.mark.parametrize("verb", ["duplicates", "outliers"])
@pytest.mark.parametrize("option", ["--csv", "--sheet"])
def test_an_existing_file_is_kept_without_overwrite(
    capsys: pytest.CaptureFixture[str], verb: str, option: str
) -> None:
    Path("mine.png").write_text("mine")
    assert cli.main([verb, "store", option, "mine.png"]) == 2
    assert "mine.png exists; replace it with --overwrite" in capsys.readouterr().err
    assert Path("mine.png").read_text() == "mine"
    assert cli.main([verb, "store", option, "mine.png", "--overwrite"]) == 0
    assert Path("mine.png").read_bytes() != b"mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["duplicates", "store", "--threshold", "2"], "threshold: got 2.0, expected a number"),
        (["duplicates", "store", "--threshold", "nan"], "threshold: got nan, expected a number"),
        (["duplicates", "store", "--against", "store"], "stores: "),
        (["duplicates", "nothing"], "nothing is not a store: there is no such folder"),
        (["duplicates", "store", "--csv", "no/d.csv"], "csv: there is no folder no"),
        (["duplicates", "store", "--csv", "images"], "csv: images exists"),
        (["duplicates", "store", "--csv", "images", "--overwrite"], "csv: images is a folder"),
        (["duplicates", "store", "--csv", "store/d.csv"], "csv: store/d.csv is in the store"),
        (["duplicates", "store", "--sheet", "d.txt"], "sheet: got d.txt, expected a file"),
        (["duplicates", "store", "--root", "no", "--sheet", "d.png"], "root: there is no folder"),
        (["duplicates", "store", "--top", "0"], "--top: got 0, expected at least 1"),
        (["outliers", "store", "-k", "9"], "k: got 9, expected an integer from 1 to 4"),
        (["outliers", "store", "--labels", "no.csv"], "labels: cannot read no.csv"),
        (["outliers", "train"], "train holds 1 row; expected at least two"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith(f"extract: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize("words", [["duplicates"], ["outliers"], ["search", "row:0"]])
def test_a_sheet_among_the_images_is_warned_of(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    verb, *queries = words
    for number, (sheet, is_warned) in enumerate(
        [("beside.png", False), ("images/dogs/sheet.png", True), ("images-2.png", False)]
    ):
        assert cli.main([verb, "store", *queries, "--sheet", sheet]) == 0, number
        error = capsys.readouterr().err
        assert (f"warning: {sheet} lies in the folder of the images" in error) is is_warned
    assert cli.main([verb, "store", *queries, "--sheet", "m.png", "--root", "."]) == 0
    assert "warning: m.png lies in the folder of the images" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["duplicates"], ["outliers", "--labels", "l.csv"], ["search", "row:0", "row:1"]]
)
def test_a_path_with_a_line_break_is_printed_in_one_line(
    words: list[str], capsys: pytest.CaptureFixture[str], write_store: Callable[..., Path]
) -> None:
    names = [b"a\nkeep  1x1  forged.png", b"b.png", b"c\nd.png"]
    write_store(Path.cwd() / "breaks", [turned(0, 5, 9)], names=[names], dim=2)
    Path("l.csv").write_bytes(b'path,label\n"a\nkeep  1x1  forged.png",x\nb.png,y\n"c\nd.png",y\n')
    verb, *rest = words
    lines = lines_of(capsys, verb, "breaks", *rest)
    assert any(line.endswith("a\\nkeep  1x1  forged.png") for line in lines)
    assert not any(line.startswith("keep") or line == "d.png" for line in lines)
