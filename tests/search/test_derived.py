"""Files in the folder ``derived``, written by two at once."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest

from extractor.search.derived import DerivedNames, check_file, derived_folders, publish_derived
from extractor.store.format import FileEntry

NAMES = DerivedNames("thing", ".bin", ".thing.json")


def test_two_that_publish_at_once_leave_one_whole_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def publish(number: int) -> None:
        def write(path: Path) -> None:
            path.write_bytes(b"%d" % number)

        def describe(folder: Path, file: FileEntry) -> str:
            return json.dumps(asdict(file))

        publish_derived(tmp_path / "out", write, NAMES, describe, "thing")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(publish, range(200)))
    own, cache = derived_folders(tmp_path / "out")
    assert not cache.exists()
    file = FileEntry(**json.loads((own / "thing.thing.json").read_text()))
    assert check_file(own / file.name, file) == ""
    assert len(list(own.iterdir())) == 2


def test_user_without_a_home_has_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    cache = tmp_path / ".cache" / "extractor" / "derived"
    assert [folder.parent for folder in derived_folders(tmp_path)] == [tmp_path, cache]
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)
    assert derived_folders(tmp_path) == (tmp_path / "derived",)
