"""Thumbnails: where they are kept, and when there is none."""

from __future__ import annotations

import io
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient
from support.pictures import noise

from extractor import FeatureStore, list_images, view_app
from extractor.view.thumbnails import FOLDER, Thumbnails


def kept(folder: Path) -> list[Path]:
    return sorted((folder / "derived" / FOLDER).rglob("*.jpg"))


def test_thumbnail_is_made_once_and_kept_by_id_and_content(
    client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = client.get("/thumbnail/0/2")
    with Image.open(io.BytesIO(first.content)) as image:
        shown = np.asarray(image).astype(int)
    expected = np.asarray(noise(4, 40, 30)).astype(int)
    assert shown.shape == expected.shape
    assert np.abs(shown - expected).mean() < 6  # but for the compression
    (path,) = kept(folder / "out")
    digest = FeatureStore.open(folder / "out").column("sha256")[2].hex()
    assert path.name == f"2-{digest[:24]}.jpg"
    assert path.read_bytes() == first.content

    monkeypatch.setattr(Thumbnails, "make", None)
    again = TestClient(view_app(folder / "out", root=folder / "images"))
    assert again.get("/thumbnail/0/2").content == first.content


@pytest.mark.parametrize("is_restarted", [False, True], ids=["same server", "restarted"])
def test_thumbnail_of_an_image_that_moved_or_changed_is_not_shown(
    client: TestClient, folder: Path, is_restarted: bool
) -> None:
    before = [client.get(f"/thumbnail/0/{number}") for number in range(4)]
    assert [answer.status_code for answer in before] == [200] * 4
    images = folder / "images"
    (images / "a" / "0.png").unlink()
    noise(77, 40, 30).save(images / "a" / "2.png")
    (images / "a" / "4.png").rename(folder / "away.png")
    os.utime(images / "b" / "1.png", (1, 1))  # another time, the same content
    if is_restarted:
        client = TestClient(view_app(folder / "out", root=images))
    for kind in ("thumbnail", "picture"):
        for headers in ({}, {"if-none-match": before[0].headers["etag"]}):
            assert client.get(f"/{kind}/0/0", headers=headers).status_code == 404
    assert [client.get(f"/thumbnail/0/{n}").status_code for n in (1, 2, 3)] == [404, 404, 200]
    assert client.get("/state").json()["stores"][0]["problems"] == 3
    (folder / "away.png").rename(images / "a" / "4.png")
    assert client.get("/thumbnail/0/2").content == before[2].content
    assert client.get("/state").json()["stores"][0]["problems"] == 2


def test_thumbnail_of_a_copied_image_is_kept(
    client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.utime(folder / "images" / "a" / "4.png", (1, 1))
    first = client.get("/thumbnail/0/2")
    monkeypatch.setattr(Thumbnails, "make", None)
    again = TestClient(view_app(folder / "out", root=folder / "images"))
    for each in (client, again):
        assert each.get("/thumbnail/0/2").content == first.content


def test_browser_asks_again_whether_a_thumbnail_is_the_same(
    client: TestClient, folder: Path
) -> None:
    for kind in ("thumbnail", "picture"):
        first, other = client.get(f"/{kind}/0/2"), client.get(f"/{kind}/0/1")
        assert first.headers["cache-control"] == "private, no-cache"
        assert first.headers["etag"] != other.headers["etag"]
        known = {"if-none-match": first.headers["etag"]}
        assert client.get(f"/{kind}/0/2", headers=known).status_code == 304
        # As after a store was made anew, where the id stands for another image.
        again = client.get(f"/{kind}/0/1", headers=known)
        assert (again.status_code, again.content) == (200, other.content)


def files_of(content: bytes) -> list[bytes]:
    """Return the files of an answer with many thumbnails."""
    files = []
    while content:
        (length,) = struct.unpack_from("<I", content)
        files.append(content[4 : 4 + length])
        content = content[4 + length :]
    return files


def test_thumbnails_at_hand_come_in_one_answer(client: TestClient, folder: Path) -> None:
    first, third = (client.get(f"/thumbnail/0/{number}").content for number in (0, 2))
    assert files_of(client.post("/thumbnails/0", json=[2, 1, 0, 99, 2]).content) == [
        *(third, b"", first, b"", third)
    ]
    (folder / "images" / "a" / "0.png").unlink()
    again = TestClient(view_app(folder / "out", root=folder / "images"))
    for each in (client, again):
        assert files_of(each.post("/thumbnails/0", json=[0, 2]).content) == [b"", third]
    assert client.post("/thumbnails/0", json=[]).content == b""


def test_half_a_thumbnail_is_made_again(client: TestClient, folder: Path) -> None:
    first = client.get("/thumbnail/0/2").content
    for content in (b"", first[:100], first[:-1]):
        (path,) = kept(folder / "out")
        path.write_bytes(content)
        again = TestClient(view_app(folder / "out", root=folder / "images"))
        assert again.get("/thumbnail/0/2").content == first
        assert path.read_bytes() == first


def test_images_that_moved_or_changed_are_counted(client: TestClient, folder: Path) -> None:
    (folder / "images" / "a" / "0.png").unlink()
    noise(77, 40, 30).save(folder / "images" / "a" / "2.png")
    os.utime(folder / "images" / "a" / "4.png", (1, 1))  # another time, the same content
    answers = [client.get(f"/thumbnail/0/{number}") for number in range(3)]
    assert [answer.status_code for answer in answers] == [404, 404, 200]
    assert answers[1].json()["error"].startswith("changed: ")
    assert client.get("/state").json()["stores"][0]["problems"] == 2
    problems = client.get("/failures/0").json()["problems"]
    assert [problem[:2] for problem in problems] == [
        ["a/0.png", "unreadable"],
        ["a/2.png", "changed"],
    ]
    shutil.copy2(folder / "images" / "copy.png", folder / "images" / "a" / "0.png")
    assert client.get("/thumbnail/0/0").status_code == 404


def test_image_that_comes_back_is_no_problem_any_more(client: TestClient, folder: Path) -> None:
    path = folder / "images" / "a" / "0.png"
    path.rename(folder / "away.png")
    assert client.get("/thumbnail/0/0").status_code == 404
    (folder / "away.png").rename(path)
    assert client.get("/thumbnail/0/0").status_code == 200
    assert client.get("/state").json()["stores"][0]["problems"] == 0


def test_read_only_store_keeps_thumbnails_in_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (folder / "out" / "derived").write_bytes(b"")  # root may write to read-only folders
    client = TestClient(view_app(folder / "out", root=folder / "images"))
    assert client.get("/thumbnail/0/2").status_code == 200
    assert len(list((tmp_path / "cache").rglob("*.jpg"))) == 1
    (tmp_path / "cache").rename(tmp_path / "gone")
    (tmp_path / "cache").write_bytes(b"")
    assert client.get("/thumbnail/0/3").status_code == 200  # kept nowhere


def test_thumbnails_never_become_images_of_a_store(client: TestClient, folder: Path) -> None:
    before = len(list_images(folder))
    assert client.get("/thumbnail/0/2").status_code == 200
    assert kept(folder / "out")
    assert len(list_images(folder)) == before


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1, 4000), (1, 1024)),
        ((4000, 1), (1024, 1)),
        ((1, 1), (1, 1)),
        ((300, 200), (256, 171)),
        ((3000, 600), (750, 150)),  # a panorama fills a square of 150 pixels
        ((200, 3000), (68, 1024)),
        ((400, 20), (400, 20)),
    ],
)
def test_thumbnail_has_the_aspect_ratio_of_the_image(
    tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    from extractor import extract

    (tmp_path / "images").mkdir()
    Image.new("RGB", size, (200, 30, 60)).save(tmp_path / "images" / "0.png")
    extract(tmp_path / "images", "test_resnet", tmp_path / "out", weights="random", device="cpu")
    client = TestClient(view_app(tmp_path / "out"))
    with Image.open(io.BytesIO(client.get("/thumbnail/0/0").content)) as image:
        assert image.size == expected
