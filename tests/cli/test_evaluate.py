"""``extract evaluate``: one library call, and what it prints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.terminal import on_a_terminal

from extractor import evaluate_store
from extractor.cli import evaluate
from extractor.cli import main as cli
from extractor.search.knn import METRICS

NAMES = [[b"cats/1.jpg", b"cats/2.jpg", b"dogs/3.jpg", b"dogs/4.jpg", b"\xfc/5.jpg"]]
ROWS = np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1], [1, 1]], np.float32)


@pytest.fixture(autouse=True)
def folder(
    tmp_path: Path, write_store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_store(tmp_path / "store", [ROWS], names=NAMES)


def test_choices_are_the_metrics() -> None:
    assert evaluate.METRICS == METRICS


def test_page_has_all_measures_and_classes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "store", "-k", "1,2"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == "store: timm:tiny, 5 rows, 5 queries, 3 classes, cosine"
    assert lines[0].startswith("no other row has the class of 1 query; they count for accuracy")
    table = {line.split()[0]: line.split()[1:] for line in lines if line}
    assert table["accuracy@1"][0] == "80.0"
    assert table["MAP@R"] == ["100.0", "100.0", "to", "100.0"]
    assert table["cats"] == ["2", "100.0", "100.0", "100.0", "100.0"]
    assert table["\\udcfc"] == ["1", "0.0", "0.0", "-", "-"]


def test_json_is_the_result_of_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "store", "--json", "--seed", "3", "--metric", "l2"]) == 0
    expected = evaluate_store("store", seed=3, metric="l2").to_mapping()
    assert json.loads(capsys.readouterr().out) == expected


def test_queries_and_labels_come_from_files(
    tmp_path: Path, write_store: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    write_store(tmp_path / "queries", [ROWS[:2]], names=[[b"1", b"2"]])
    Path("labels.csv").write_text("path,label\n1,cats\n2,dogs\n")
    words = ["evaluate", "store", "--queries", "queries", "--query-labels", "labels.csv"]
    assert cli.main([*words, "--json", "-k", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["scores"]["accuracy@1"]["value"] == 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-k", "9"], "k: got 9, but a query has 4 other rows"),
        (["--labels", "none.csv"], "labels: cannot read none.csv"),
        (["--queries", "."], ". is not a store"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", "store", *words]) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith(f"extract: {message}")
    assert error.count("\n") == 1


def test_word_that_is_no_number_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["evaluate", "store", "-k", "1,x"])
    assert "got '1,x', expected numbers separated by commas" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "unit"),
    [
        (["evaluate", "store"], "query/s"),
        (["export", "store", "--to", "rows.csv"], "row/s"),
        (["verify", "store"], "row/s"),
    ],
)
def test_long_work_shows_a_bar_on_a_terminal(words: list[str], unit: str) -> None:
    received = on_a_terminal("-m", "extractor", *words)
    assert "5/5" in received
    assert unit in received


def test_bar_of_verified_images_counts_no_failures() -> None:
    verify = "main(['verify', 'store', '--images', '--root', '.'])"
    received = on_a_terminal("-c", f"from extractor.cli.main import main; {verify}")
    assert "image/s" in received
    assert "failed" not in received
