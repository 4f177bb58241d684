"""Maps, duplicates and outliers on the page: what the library finds, once it is computed."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from extractor import FeatureStore, find_duplicates, find_outliers, map_store, view_app

SECONDS = 60


def wait(client: TestClient, path: str) -> Any:
    """Answer of the server once it has computed something."""
    deadline = time.monotonic() + SECONDS
    while (answer := client.get(path)).status_code == 202:
        assert answer.json() == {"status": "working"}
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return answer


def unpacked(content: bytes) -> tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray]:
    (length,) = struct.unpack("<I", content[:4])
    head = json.loads(content[4 : 4 + length])
    count, at = head["count"], 4 + length
    ids = np.frombuffer(content, "<f8", count, at)
    points = np.frombuffer(content, "<f4", 2 * count, at + 8 * count).reshape(count, 2)
    colors = np.frombuffer(content, np.uint8, count, at + 16 * count)
    assert at % 8 == 0
    assert len(content) == at + 17 * count
    return head, ids, points, colors


def test_map_has_the_shape_of_the_library_s(client: TestClient, folder: Path) -> None:
    head, ids, points, colors = unpacked(wait(client, "/map/0").content)
    expected = map_store(folder / "out")
    assert ids.tolist() == expected.store.ids.tolist()
    assert head["method"] == "pca"
    assert head["explained"] == pytest.approx(expected.explained)
    assert points.min() == pytest.approx(0, abs=1e-6)
    assert points.max() == pytest.approx(1, abs=1e-6)
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    wanted = np.linalg.norm(expected.coordinates[:, None] - expected.coordinates[None], axis=2)
    assert distances / distances.max() == pytest.approx(wanted / wanted.max(), abs=1e-5)
    assert head["names"][:2] == ["a", "b"]
    assert colors.tolist() == [0, 0, 0, 1, 1, 2]  # a/, b/, and copy.png in no folder
    assert head["others"] is False


def test_map_of_another_method_is_its_own(client: TestClient) -> None:
    assert unpacked(wait(client, "/map/0?method=pca").content)[0]["method"] == "pca"
    answer = wait(client, "/map/0?method=tsne")
    assert answer.status_code == 422
    assert "expected one of pca, umap" in answer.json()["error"]


def test_map_colors_the_largest_folders(tmp_path: Path, write_store: Callable[..., Path]) -> None:
    names = [f"folder{n % 13:02d}/{n}.jpg".encode() for n in range(30)]
    rows = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    rows[4] = np.nan
    client = TestClient(view_app(write_store(tmp_path / "out", [rows], names=[names])))
    head, ids, _, colors = unpacked(wait(client, "/map/0").content)
    assert (head["count"], head["left_out"], len(ids)) == (29, 1, 29)
    assert head["names"][:4] == ["folder00", "folder01", "folder02", "folder03"]
    assert len(head["names"]) == 10
    assert head["others"] is True
    assert colors.max() == 10
    assert 4 not in ids


def test_map_of_many_small_folders_has_no_colors(
    tmp_path: Path, write_store: Callable[..., Path]
) -> None:
    names = [f"{n:03d}/{n}.jpg".encode() for n in range(41)]
    rows = np.random.default_rng(0).normal(size=(41, 3)).astype(np.float32)
    client = TestClient(view_app(write_store(tmp_path / "out", [rows], names=[names])))
    head = unpacked(wait(client, "/map/0").content)[0]
    assert (head["names"], head["others"]) == ([], False)


def test_duplicates_are_those_of_the_library(client: TestClient, folder: Path) -> None:
    content = wait(client, "/duplicates/0?percent=99").json()
    expected = find_duplicates(folder / "out", threshold=0.99)
    assert (content["total"], content["redundant"]) == (len(expected), expected.redundant)
    shown = [[image[1] for image in group["images"]] for group in content["groups"]]
    assert shown == [[image.path for image in group.images] for group in expected]
    assert any(set(paths) == {"b/3.png", "copy.png"} for paths in shown)
    assert client.get("/duplicates/0?percent=99&start=5000").json()["groups"] == []
    assert client.get("/duplicates/0?percent=0").status_code == 400


def test_outliers_are_those_of_the_library(client: TestClient, folder: Path) -> None:
    content = wait(client, "/outliers/0").json()
    labels = ["a", "a", "a", "b", "b", "."]
    expected = find_outliers(folder / "out", labels)
    assert content["total"] == len(expected) == 6
    found = [(image[0], image[1], image[4]) for image in content["outliers"]]
    assert found == [(each.id, each.path, each.distance) for each in expected]
    wrong = [(image[1], *image[4:]) for image in content["label_errors"]]
    assert wrong == [
        (each.path, each.agreement, each.label, each.suggested) for each in expected.label_errors
    ]
    assert [image[1] for image in client.get("/outliers/0?start=4").json()["outliers"]] == [
        each.path for each in expected[4:]
    ]


def test_images_in_one_folder_have_no_label_errors(
    tmp_path: Path, write_store: Callable[..., Path]
) -> None:
    rows = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    names = [f"{n:02d}.jpg".encode() for n in range(12)]
    client = TestClient(view_app(write_store(tmp_path / "out", [rows], names=[names])))
    assert wait(client, "/outliers/0").json()["label_errors"] == []


def test_what_cannot_be_computed_is_an_error_and_tried_again(
    tmp_path: Path, write_store: Callable[..., Path]
) -> None:
    out = write_store(tmp_path / "out", [np.ones((1, 3), np.float32)])
    client = TestClient(view_app(out))
    for _ in range(2):
        answer = wait(client, "/outliers/0")
        assert answer.status_code == 422
        assert "expected at least two" in answer.json()["error"]


def test_each_result_is_computed_once(
    app: Starlette, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[float] = []

    def count(store: FeatureStore, threshold: float, against: None) -> Any:
        calls.append(threshold)
        return find_duplicates(store, threshold=threshold)

    monkeypatch.setattr("extractor.view.analyses.find_duplicates", count)
    for _ in range(3):
        wait(client, "/duplicates/0")
        wait(client, "/duplicates/0?percent=98&start=1")
    assert calls == [0.95, 0.98]


def test_duplicates_against_the_other_store_are_those_of_the_library(
    tmp_path: Path, write_store: Callable[..., Path], folder: Path
) -> None:
    rows = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    test = write_store(tmp_path / "test", [rows[:3]])
    train = write_store(tmp_path / "train", [rows[1:]])
    client = TestClient(view_app(test, train))
    assert [each["comparable"] for each in client.get("/state").json()["stores"]] == [True, True]
    for number, (store, other) in enumerate([(test, train), (train, test)]):
        content = wait(client, f"/duplicates/{number}?percent=99&against=1").json()
        expected = find_duplicates(store, threshold=0.99, against=other)
        assert content["total"] == len(expected) > 0
        shown = [[image[0], image[5]] for group in content["groups"] for image in group["images"]]
        assert shown == [[image.id, image.in_other] for group in expected for image in group.images]
        assert wait(client, f"/duplicates/{number}?percent=99").json()["total"] == 0
    alone = TestClient(view_app(test))
    assert alone.get("/duplicates/0?against=1").status_code == 404
    assert alone.get("/state").json()["stores"][0]["comparable"] is False
    for other in (folder / "out", test):  # another backbone, and the same store
        both = TestClient(view_app(test, other))
        assert both.get("/state").json()["stores"][0]["comparable"] is False
        assert wait(both, "/duplicates/0?against=1").status_code == 422
