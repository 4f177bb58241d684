"""``extract export``: one library call, and what it prints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from extractor import FeatureStore
from extractor.cli import export
from extractor.cli import main as cli
from extractor.export.formats import FORMATS

ROWS = np.arange(12, dtype=np.float32).reshape(4, 3)


@pytest.fixture
def store(
    tmp_path: Path, write_store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> FeatureStore:
    monkeypatch.chdir(tmp_path)
    return FeatureStore.open(write_store(tmp_path / "store", [ROWS]))


def test_choices_are_the_formats() -> None:
    assert tuple(FORMATS) == export.FORMATS


def test_command_says_what_it_wrote(
    store: FeatureStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", "store", "--to", "rows", "--format", "npy"]) == 0
    assert capsys.readouterr().out == (f"rows: 4 rows as npy\nnext time: --since {store.token}\n")
    words = ["export", "store", "--to", "new.csv", "--since", store.token]
    assert cli.main(words) == 0
    assert "new.csv: 0 rows as csv, 0 ids to remove\n" in capsys.readouterr().out
    assert cli.main([*words, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "path": str(store.path.parent / "new.csv"),
        "format": "csv",
        "rows": 0,
        "removed": 0,
        "token": store.token,
    }


def test_an_unknown_state_is_answered_for_the_command(
    store: FeatureStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", "store", "--to", "rows", "--since", "0" * 64]) == 1
    error = capsys.readouterr().err
    assert error.rstrip().endswith("of another store; leave --since out to export everything")


def test_export_over_files_is_a_usage_error(
    store: FeatureStore, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", "store", "--to", "rows"]
    assert cli.main(words) == 0
    assert cli.main(words) == 2
    assert "rows holds an export; replace it with --overwrite" in capsys.readouterr().err
    assert cli.main(["export", "none", "--to", "rows"]) == 1
    assert "none is not a store: there is no such folder" in capsys.readouterr().err
