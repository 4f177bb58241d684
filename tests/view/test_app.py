"""What the server of the page answers."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient
from support.pictures import noise

from extractor import FeatureStore, StoreNotFoundError, UsageError, extract, view_app
from extractor.images.listing import read_list
from extractor.view import app as app_module
from extractor.view.collection import matcher
from extractor.view.page_files import page_files

PATHS = ["a/0.png", "a/2.png", "a/4.png", "b/1.png", "b/3.png", "copy.png"]


def ids_of(folder: Path) -> dict[str, int]:
    store = FeatureStore.open(folder / "out")
    return dict(zip(store.paths, store.ids.tolist(), strict=True))


def add_images(folder: Path, count: int) -> None:
    """Let the store of a folder grow, as a run beside the page does."""
    for number in range(count):
        noise(50 + number, 40, 30).save(folder / "images" / f"new{number}.png")
    root = {"new_root": True}
    extract(
        folder / "images", "test_resnet", folder / "out", weights="random", device="cpu", **root
    )


def test_page_names_files_that_are_there(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    names = set(page_files())
    preloaded = set(re.findall(r'modulepreload" href="(.+?)"', page.text))
    assert preloaded == {name for name in names if name.endswith(".js")} - {"app.js"}
    for name in ("style.css", "app.js", "icon.svg"):
        assert name in page.text
        assert client.get(f"/{name}").status_code == 200
    for name in names:
        imported = [
            line.split('"./')[1].split('"')[0]
            for line in page_files()[name].decode().splitlines()
            if line.startswith("import ")
        ]
        assert set(imported) <= names


def test_files_of_the_page_are_part_of_the_package() -> None:
    project = (Path(app_module.__file__).parents[2] / "pyproject.toml").read_text("utf-8")
    assert '"view/page/*"' in project.partition("package-data]")[2].partition("\n\n")[0]


def test_nothing_of_the_page_comes_from_elsewhere() -> None:
    for name, content in page_files().items():
        text = content.decode().replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text, name
        assert "https:" not in text, name
        assert "//cdn" not in text, name


def test_state_counts_rows_and_failures(client: TestClient) -> None:
    (store,) = client.get("/state").json()["stores"]
    assert (store["name"], store["rows"], store["failed"], store["newer"]) == ("out", 6, 1, None)
    assert store["model"] == "timm:test_resnet"


def test_rows_come_in_order_and_in_slices(client: TestClient, folder: Path) -> None:
    answer = client.get("/rows/0").json()
    ids = ids_of(folder)
    assert answer["total"] == 6
    assert answer["images"] == [
        [ids[path], path, 90 if path == "a/2.png" else 30, 40] for path in PATHS
    ]
    slice_ = client.get("/rows/0?start=4&count=10").json()
    assert [image[1] for image in slice_["images"]] == PATHS[4:]
    assert client.get("/rows/0?start=6").json()["images"] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("b/", ["b/1.png", "b/3.png"]),
        ("COPY", ["copy.png"]),
        ("a/*.png", ["a/0.png", "a/2.png", "a/4.png"]),
        ("/?.p", PATHS[:5]),
        (".", PATHS),
        ("[ab]", []),
        ("nothing", []),
    ],
)
def test_filter_finds_parts_of_paths(client: TestClient, text: str, expected: list[str]) -> None:
    answer = client.get("/rows/0", params={"filter": text}).json()
    assert [image[1] for image in answer["images"]] == expected
    assert answer["total"] == len(expected)


def test_filter_with_many_wildcards_takes_no_time() -> None:
    assert not matcher("*a" * 12 + "*z")("a" * 200)
    assert matcher("*a" * 12 + "*z")("a" * 200 + "Z")
    assert matcher("b/*?1**.p")("a/b/011.png")
    assert not matcher("b/*?1*.p")("a/b/1.png")


def test_filter_that_is_too_long_is_refused(client: TestClient) -> None:
    answer = client.get("/rows/0", params={"filter": "x" * 1001})
    assert answer.status_code == 422
    assert "at most 1,000" in answer.json()["error"]


def test_neighbors_are_those_of_the_library(client: TestClient, folder: Path) -> None:
    store, ids = FeatureStore.open(folder / "out"), ids_of(folder)
    answer = client.get(f"/neighbors/0/{ids['b/3.png']}?k=3").json()
    (expected,) = store.search("b/3.png", 3)
    (result,) = answer["results"]
    assert answer["image"][1] == "b/3.png"
    found = [(hit[0], hit[1], hit[4]) for hit in result["hits"]]
    assert found == [(hit.id, hit.path, hit.score) for hit in expected]
    assert found[0][1] == "copy.png"


def test_two_stores_know_an_image_by_its_path(folder: Path) -> None:
    for path in ("a/0.png", "a/2.png"):  # rows of the other store begin elsewhere
        (folder / "images" / path).unlink()
    extract(folder / "images", "test_vit", folder / "vit", weights="random", device="cpu")
    client = TestClient(view_app(folder / "out", folder / "vit"))
    ids = ids_of(folder)
    both = client.get(f"/neighbors/0/{ids['b/3.png']}?k=2").json()["results"]
    assert [result["hits"][0][1] for result in both] == ["copy.png", "copy.png"]
    only_one = client.get(f"/neighbors/0/{ids['a/0.png']}?k=2").json()["results"]
    assert only_one[1]["error"] == "This store does not hold the image."
    other = {image[1]: image[0] for image in client.get("/rows/1").json()["images"]}
    assert set(other) == set(PATHS[2:])
    back = client.get(f"/neighbors/1/{other['copy.png']}?k=1").json()
    assert [result["hits"][0][1] for result in back["results"]] == ["b/3.png", "b/3.png"]


def test_upload_finds_images_like_it(client: TestClient) -> None:
    content = io.BytesIO()
    noise(1, 40, 30).save(content, "PNG")
    (result,) = client.post("/search?k=2", content=content.getvalue()).json()["results"]
    assert result["hits"][0][1] == "b/1.png"
    assert result["hits"][0][4] == pytest.approx(1, abs=1e-4)


def test_upload_that_is_no_image_is_an_error_in_words(client: TestClient) -> None:
    (result,) = client.post("/search", content=b"no image").json()["results"]
    assert result["hits"] == []
    assert "no image format matches" in result["error"]
    assert client.post("/search", content=b"").status_code == 400


def test_failures_have_reasons(client: TestClient) -> None:
    answer = client.get("/failures/0").json()
    assert answer["total"] == 1
    assert answer["failures"][0][:2] == ["broken.png", "not-an-image"]
    assert answer["reasons"] == {"not-an-image": 1}


def test_list_is_one_that_extract_takes(client: TestClient, folder: Path) -> None:
    ids = ids_of(folder)
    answer = client.post("/list/0", json=[ids["copy.png"], 999, ids["a/2.png"]])
    listed = read_list(io.BytesIO(answer.content))
    names = [os.path.join(os.fsdecode(listed.root), os.fsdecode(path)) for path in listed.paths]
    assert names == [str(folder / "images" / path) for path in ("a/2.png", "copy.png")]
    assert "attachment" in answer.headers["content-disposition"]


def test_list_of_names_with_line_breaks_is_separated_by_zeros(tmp_path: Path) -> None:
    names = [b"with\nbreak.png", b"not \xff utf-8.png"]
    (tmp_path / "images").mkdir()
    for number, name in enumerate(names):
        content = io.BytesIO()
        noise(number, 40, 30).save(content, "PNG")
        (tmp_path / "images" / os.fsdecode(name)).write_bytes(content.getvalue())
    extract(tmp_path / "images", "test_resnet", tmp_path / "out", weights="random", device="cpu")
    client = TestClient(view_app(tmp_path / "out"))
    images = client.get("/rows/0?filter=PNG").json()["images"]
    answer = client.post("/list/0", json=[image[0] for image in images])
    listed = read_list(io.BytesIO(answer.content))
    assert set(listed.paths) == set(names)
    assert client.get(f"/thumbnail/0/{images[0][0]}").status_code == 200
    assert client.get(f"/neighbors/0/{images[0][0]}?k=1").json()["results"][0]["hits"]


def test_growing_store_is_shown_as_it_was_until_reload(
    app: Starlette, client: TestClient, folder: Path
) -> None:
    assert client.get("/state").json()["stores"][0]["newer"] is None
    add_images(folder, 3)
    app.state.viewer._looked = -1e9  # it does not look at every request
    assert client.get("/state").json()["stores"][0]["newer"] == 9
    assert client.get("/rows/0").json()["total"] == 6
    first = client.get("/rows/0").json()["images"][0]
    assert client.get(f"/neighbors/0/{first[0]}?k=5").json()["results"][0]["hits"]
    assert client.post("/reload").json()["stores"][0]["rows"] == 9
    assert client.get("/rows/0").json()["total"] == 9
    assert client.get("/state").json()["stores"][0]["newer"] is None


def test_store_that_was_made_anew_is_named(client: TestClient, folder: Path) -> None:
    def anew() -> int:
        return int(client.post("/reload").json()["stores"][0]["anew"])

    noise(50, 40, 30).save(folder / "images" / "new.png")
    extract(folder / "images", "test_resnet", folder / "out", weights="random", device="cpu")
    assert anew() == 0  # it grew
    shutil.rmtree(folder / "out")
    (folder / "images" / "a" / "0.png").unlink()
    extract(folder / "images", "test_resnet", folder / "out", weights="random", device="cpu")
    assert anew() == 1
    assert anew() == 1


def test_store_that_is_gone_keeps_its_page(
    app: Starlette, client: TestClient, folder: Path
) -> None:
    first = client.get("/rows/0").json()["images"][0]
    shutil.rmtree(folder / "out")
    app.state.viewer._looked = -1e9
    assert client.get("/state").json()["stores"][0]["newer"] is None
    assert client.get("/rows/0").json()["total"] == 6
    assert client.get(f"/thumbnail/0/{first[0]}").status_code == 200
    assert client.get("/failures/0").json()["total"] == 1
    answer = client.post("/reload")
    assert answer.status_code == 422
    assert "is not a store" in answer.json()["error"]
    assert client.get("/rows/0").json()["total"] == 6


def test_store_of_one_row_has_no_neighbors(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    noise(0, 40, 30).save(tmp_path / "images" / "0.png")
    extract(tmp_path / "images", "test_resnet", tmp_path / "out", weights="random", device="cpu")
    noise(1, 40, 30).save(tmp_path / "images" / "1.png")
    (tmp_path / "images" / "0.png").unlink()
    extract(tmp_path / "images", "test_resnet", tmp_path / "out", weights="random", device="cpu")
    client = TestClient(view_app(tmp_path / "out"))
    (image,) = client.get("/rows/0").json()["images"]
    assert client.get(f"/neighbors/0/{image[0]}").json()["results"][0]["hits"] == []
    assert client.get(f"/thumbnail/0/{image[0] - 1}").status_code == 404


def test_empty_store_has_an_empty_page(tmp_path: Path, write_store: Callable[..., Path]) -> None:
    out = write_store(tmp_path / "out", [])
    for store in (out, FeatureStore.open(out)):
        client = TestClient(view_app(store))
        assert client.get("/state").json()["stores"][0]["rows"] == 0
        assert client.get("/rows/0").json() == {"total": 0, "start": 0, "images": []}
        assert client.get("/neighbors/0/0").status_code == 404
        assert client.post("/list/0", json=[1]).content == b""
        (result,) = client.post("/search", content=b"no image").json()["results"]
        assert result["error"]


def test_mounted_page_lies_below_its_path(folder: Path) -> None:
    app = Starlette(routes=[Mount("/look", view_app(folder / "out", token="secret"))])
    client = TestClient(app)
    assert client.get("/look/secret/state").status_code == 200
    assert client.get("/look/secret/app.js").status_code == 200
    assert client.get("/look/state").status_code == 403
    moved = client.get("/look/secret", follow_redirects=False)
    assert moved.headers["location"].endswith("/look/secret/")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"store": "nothing"}, StoreNotFoundError, "there is no such folder"),
        ({"metric": "angle"}, UsageError, "expected one of cosine"),
        ({"root": "nothing"}, UsageError, "there is no folder nothing"),
    ],
)
def test_wrong_arguments_are_named(
    folder: Path, arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        view_app(**{"store": folder / "out", **arguments})


def test_looking_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys; from extractor import view_app; "
        "from starlette.testclient import TestClient; "
        f"client = TestClient(view_app({str(folder / 'out')!r})); "
        "one = client.get('/rows/0').json()['images'][0][0]; "
        "print(client.get(f'/neighbors/0/{one}').status_code, "
        "client.get(f'/thumbnail/0/{one}').status_code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["200", "200", "False"]


def test_error_of_the_program_shows_no_details(
    app: Starlette, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(app.state.viewer, "state", fail)
    answer = client.get("/state")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "content-security-policy" in answer.headers


def test_numbers_stay_json(client: TestClient) -> None:
    answer = client.get("/rows/0").text
    assert json.loads(answer)["total"] == 6
    assert np.isfinite(client.get("/neighbors/0/0").json()["results"][0]["hits"][0][4])


def test_picture_is_larger_than_a_thumbnail(folder: Path) -> None:
    noise(9, 900, 1400).save(folder / "images" / "large.png")
    add_images(folder, 0)
    client = TestClient(view_app(folder / "out"))
    ids = ids_of(folder)
    sizes = []
    for kind in ("thumbnail", "picture"):
        answer = client.get(f"/{kind}/0/{ids['large.png']}")
        with Image.open(io.BytesIO(answer.content)) as image:
            sizes.append((image.format, image.size))
    assert sizes == [("JPEG", (256, 165)), ("JPEG", (1024, 658))]
