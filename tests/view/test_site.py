"""The page as files: what it holds, and what it leaves out."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.pictures import noise

from extractor import FeatureStore, StoreError, UsageError, export_page, extract
from extractor.cli import main as cli
from extractor.view.page_files import bundle, page_files
from extractor.view.site import PageReport


def data_of(site: Path) -> list[dict[str, Any]]:
    text = (site / "data.js").read_text("ascii")
    stores = json.loads(text.removeprefix("globalThis.EXTRACT_VIEW = ").rstrip(";\n"))["stores"]
    assert isinstance(stores, list)
    return stores


def test_page_holds_images_neighbors_and_thumbnails(folder: Path, tmp_path: Path) -> None:
    report = export_page(folder / "out", tmp_path / "site", root=folder / "images")
    assert report == PageReport(tmp_path / "site", 6, 6, 0)
    (data,) = data_of(tmp_path / "site")
    store = FeatureStore.open(folder / "out")
    assert [image[:2] for image in data["images"]] == [
        [i, path] for i, path in zip(store.ids.tolist(), store.paths, strict=True)
    ]
    for row, flat in enumerate(data["neighbors"]):
        expected = store.search(store[row], 5, own_rows=[row])
        assert flat[::2] == expected.rows[0].tolist()
        assert flat[1::2] == pytest.approx(expected.scores[0], abs=1e-4)
    with Image.open(tmp_path / "site" / "thumbnails" / "0" / "2.jpg") as image:
        assert image.size == (30, 40)
    page = (tmp_path / "site" / "index.html").read_text("utf-8")
    named = set(re.findall(r'(?:href|src)="([^"]+)"', page))
    assert named == {"icon.svg", "style.css", "data.js", "page.js"}
    assert data["failures"][0][:2] == ["broken.png", "not-an-image"]
    assert data["duplicates"]["groups"]
    assert len(data["outliers"]["outliers"]) == 6
    assert len(data["map"]["points"]) == 12


def test_page_does_not_tell_where_the_images_lie(folder: Path, tmp_path: Path) -> None:
    export_page(folder / "out", tmp_path / "site", root=folder / "images")
    for path in (tmp_path / "site").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert str(folder).encode() not in content
            assert str(FeatureStore.open(folder / "out").root).encode() not in content


def test_page_among_the_images_is_warned_of(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    export_page(folder / "out", tmp_path / "images-site", root=folder / "images")
    assert not caplog.records
    export_page(folder / "out", folder / "images" / "a" / "site", root=folder / "images")
    assert "lies in the folder of the images" in caplog.text


def test_stores_of_one_name_are_told_apart(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "out", tmp_path / "other" / "out")
    export_page(folder / "out", tmp_path / "site", tmp_path / "other" / "out")
    assert [data["name"] for data in data_of(tmp_path / "site")] == ["view/out", "other/out"]


def test_large_store_is_sampled_alike_each_time(folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        report = export_page(folder / "out", tmp_path / name, limit=4, root=folder / "images")
        assert (report.images, report.of) == (4, 6)
    one, two = (data_of(tmp_path / name) for name in ("one", "two"))
    assert one == two
    ids = {image[0] for image in one[0]["images"]}
    assert len(list((tmp_path / "one" / "thumbnails" / "0").iterdir())) == 4
    assert all(max(flat[::2]) < 4 and len(flat) == 6 for flat in one[0]["neighbors"])
    assert set(one[0]["map"]["ids"]) == ids
    assert {image[0] for image in one[0]["outliers"]["outliers"]} == ids
    shown = [image[0] for group in one[0]["duplicates"]["groups"] for image in group["images"]]
    assert set(shown) <= ids


def test_other_store_shows_the_same_images(folder: Path, tmp_path: Path) -> None:
    (folder / "images" / "a" / "0.png").unlink()
    extract(folder / "images", "test_vit", folder / "vit", weights="random", device="cpu")
    export_page(folder / "out", tmp_path / "site", folder / "vit", root=folder / "images")
    first, second = data_of(tmp_path / "site")
    paths = [image[1] for image in first["images"]]
    assert [image[1] for image in second["images"]] == paths[1:]
    assert len(list((tmp_path / "site" / "thumbnails" / "1").iterdir())) == 5


def test_images_that_are_gone_are_counted(folder: Path, tmp_path: Path) -> None:
    (folder / "images" / "a" / "0.png").unlink()
    noise(8, 40, 30).save(folder / "images" / "a" / "2.png")
    report = export_page(folder / "out", tmp_path / "site", root=folder / "images")
    assert report.missing == 2
    assert len(list((tmp_path / "site" / "thumbnails" / "0").iterdir())) == 4


def test_page_replaces_no_files_of_someone_else(folder: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds files that are not part of an export"):
        export_page(folder / "out", site, root=folder / "images", overwrite=True)
    (site / "mine.txt").unlink()
    export_page(folder / "out", site, root=folder / "images")
    with pytest.raises(UsageError, match="replace it with --overwrite"):
        export_page(folder / "out", site, root=folder / "images")
    assert export_page(folder / "out", site, limit=2, root=folder / "images", overwrite=True)
    assert len(data_of(site)[0]["images"]) == 2
    with pytest.raises(UsageError, match="is in the store"):
        export_page(folder / "out", folder / "out" / "site")


def test_other_store_without_any_of_the_images_is_refused(
    folder: Path, tmp_path: Path, write_store: Callable[..., Path]
) -> None:
    other = write_store(tmp_path / "other", [np.eye(3, dtype=np.float32)])
    with pytest.raises(UsageError, match="other holds none of the images on the page"):
        export_page(folder / "out", tmp_path / "site", other)
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize("limit", [0, -1, 50_001, 1.5, True])
def test_limit_is_a_number_of_images(folder: Path, tmp_path: Path, limit: Any) -> None:
    with pytest.raises(UsageError, match="limit: got"):
        export_page(folder / "out", tmp_path / "site", limit=limit)
    assert not (tmp_path / "site").exists()


def test_rows_without_numbers_have_no_neighbors(
    tmp_path: Path, write_store: Callable[..., Path]
) -> None:
    rows = np.eye(4, 3, dtype=np.float32)
    rows[1] = np.nan
    out = write_store(tmp_path / "out", [rows])
    assert export_page(out, tmp_path / "site").missing == 4
    (data,) = data_of(tmp_path / "site")
    assert data["neighbors"][1] == []
    assert all(1 not in flat[::2] for flat in data["neighbors"])
    one = write_store(tmp_path / "one", [rows[:1]])
    export_page(one, tmp_path / "small")
    (data,) = data_of(tmp_path / "small")
    assert (data["neighbors"], data["outliers"]) == ([[]], None)
    with pytest.raises(StoreError, match="nothing to show"):
        export_page(write_store(tmp_path / "none", []), tmp_path / "empty")


def test_script_holds_every_module_once_and_no_import() -> None:
    script = bundle("app.js")
    names = [name for name in page_files() if name.endswith(".js")]
    for name in names:
        assert script.count(f"\n// {name}\n") == 1
    assert not re.search(r"^(import|export) ", script, re.MULTILINE)
    declared = re.findall(
        r"^(?:export )?(?:async )?(?:const|let|function|class) (\w+)", script, re.MULTILINE
    )
    assert len(declared) == len(set(declared)), "modules of the page need different names"
    at = {name: script.index(f"\n// {name}\n") for name in names}
    assert at["dom.js"] < at["grid.js"] < at["app.js"] == max(at.values())


def test_command_exports_a_page(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = str(tmp_path / "site")
    words = ["view", str(folder / "out"), "--root", str(folder / "images")]
    assert cli.main([*words, "--export", site, "--limit", "3"]) == 0
    assert capsys.readouterr().out == f"{site}/index.html: 3 images of 6\n"
    assert cli.main([*words, "--export", site]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main([*words, "--limit", "3"]) == 2
    assert "go with --export" in capsys.readouterr().err
