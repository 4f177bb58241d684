"""Labels from folders, files, functions and mappings cover all rows and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from extractor import FeatureStore, UsageError
from extractor.evaluation.labels import labels_of

NAMES = [b"train/cats/1.jpg", b"dogs/2.jpg", b"dogs/\xff.jpg"]
WANTED = ["cat", "dog", "dog"]


@pytest.fixture
def store(tmp_path: Path, write_store: Callable[..., Path]) -> FeatureStore:
    """Three rows, and an image that failed."""
    rows = [np.eye(3, dtype=np.float32)]
    failures = [(b"dogs/broken.jpg", "truncated", "message")]
    return FeatureStore.open(write_store(tmp_path / "out", rows, names=[NAMES], failures=failures))


def test_folder_that_holds_the_image_is_its_label(store: FeatureStore) -> None:
    assert labels_of(store) == labels_of(store, "folders") == ["cats", "dogs", "dogs"]


def test_image_in_no_folder_has_no_label(tmp_path: Path, write_store: Callable[..., Path]) -> None:
    rows = [np.eye(2, dtype=np.float32)]
    store = FeatureStore.open(write_store(tmp_path / "flat", rows, names=[[b"1.jpg", b"a/2.jpg"]]))
    with pytest.raises(UsageError, match=r"1 row without a label: 1.jpg; images lie in one folder"):
        labels_of(store)


def test_csv_names_paths_in_any_order(store: FeatureStore, tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    file.write_bytes(
        b"\xef\xbb\xbflabel,other,path\ndog,,./dogs/2.jpg\ndog,,dogs/\xff.jpg\n"
        b"dog,,dogs/broken.jpg\ncat,,/photos/train/cats/1.jpg\n"
    )
    assert labels_of(store, file) == labels_of(store, str(file)) == WANTED


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n", r"got the columns a, b; expected a first line with path and label"),
        ("", "got the columns none"),
        ("path,label\ndogs/2.jpg,dog\n", r"2 rows without a label: train/cats/1.jpg, dogs/"),
        ("path,label\ndogs/3.jpg,dog\n", r"labels.csv: 1 path not in .*: dogs/3.jpg; paths are"),
        ("path,label\ndogs/2.jpg,dog\ndogs/2.jpg,cat\n", "line 3: dogs/2.jpg has two labels"),
        ("path,label\ndogs/2.jpg\n", "rows without a label"),
    ],
)
def test_bad_csv_is_refused(
    store: FeatureStore, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "labels.csv").write_text(content)
    with pytest.raises(UsageError, match=message):
        labels_of(store, tmp_path / "labels.csv")


def test_missing_file_is_refused(store: FeatureStore, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*none.csv: No such file"):
        labels_of(store, tmp_path / "none.csv")
    with pytest.raises(UsageError, match=r"there is no file none.py"):
        labels_of(store, "none.py:label")


def by_name(path: str) -> str:
    return "cat" if "cats" in path else "dog"


def test_function_gets_each_path(store: FeatureStore, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def label(path):\n    return 'cat' if 'cats' in path else 'dog'\nvalue = 1\n")
    assert labels_of(store, f"{file}:label") == labels_of(store, by_name) == WANTED
    with pytest.raises(UsageError, match=r"mine.py has no function 'value'"):
        labels_of(store, f"{file}:value")
    file.write_text("1 / 0\n")
    with pytest.raises(UsageError, match=r"mine.py: ZeroDivisionError: division by zero"):
        labels_of(store, f"{file}:label")


def test_function_that_fails_names_the_path(store: FeatureStore) -> None:
    with pytest.raises(UsageError, match=r"labels: KeyError for 'train/cats/1.jpg'"):
        labels_of(store, {}.__getitem__)
    with pytest.raises(UsageError, match="3 rows without a label"):
        labels_of(store, lambda path: None)


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_values_stand_for_rows(store: FeatureStore, kind: Any) -> None:
    assert labels_of(store, kind(WANTED)) == WANTED
    assert labels_of(store, dict(zip(store.paths, WANTED, strict=True))) == WANTED
    assert labels_of(store, np.array([3, 4, 4])) == ["3", "4", "4"]
