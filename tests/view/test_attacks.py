"""What a hostile client, page or file tries, and what it gets."""

from __future__ import annotations

import io
import os
import shutil
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient
from support.pictures import noise

from extractor import extract, view_app
from extractor.images import time_limit
from extractor.images.decode import decode_into
from extractor.view import app as app_module
from extractor.view.server import LOOPBACK_HOSTS, hosts_for

TOKEN = "right-token"
PICTURE = noise(0, 40, 30)


@pytest.fixture
def guarded(folder: Path) -> TestClient:
    """Client of a page with a token, on this machine only."""
    app = view_app(folder / "out", token=TOKEN, hosts=LOOPBACK_HOSTS, device="cpu")
    return TestClient(app, base_url="http://127.0.0.1:8765", raise_server_exceptions=False)


@pytest.mark.parametrize(
    "path", ["", "wrong/", "wrong/state", "right-toke/state", "right-token-and-more/state", "state"]
)
def test_wrong_token_gets_nothing(guarded: TestClient, path: str) -> None:
    answer = guarded.get(f"/{path}", follow_redirects=False)
    assert answer.status_code == 403
    assert TOKEN not in answer.text
    assert guarded.get(f"/{TOKEN}/state").status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "../../../../etc/passwd",
        "..%2f..%2f..%2f..%2fetc%2fpasswd",
        "%2e%2e/%2e%2e/etc/passwd",
        "..\\..\\etc\\passwd",
        "app.py",
        "../app.py",
        "__init__.py",
        "page/app.js",
        "/etc/passwd",
        "thumbnail/0/../../../../etc/passwd",
        "thumbnail/0/..%2f..%2fetc%2fpasswd",
        "thumbnail/0/a%2f0.png",
        "thumbnail/0/0%00.png",
        "thumbnail/0/-1",
        "thumbnail/0/99999999999999999999999",
        "thumbnail/7/0",
        "picture/0/images/a/0.png",
        "rows/9",
    ],
)
def test_no_path_leads_to_another_file(guarded: TestClient, path: str) -> None:
    answer = guarded.get(f"/{TOKEN}/{path}", follow_redirects=False)
    assert answer.status_code in (403, 404)
    assert "root:" not in answer.text
    assert "import" not in answer.text


def test_number_that_python_does_not_read_is_refused(guarded: TestClient) -> None:
    for kind in ("thumbnail/0", "neighbors/0", "rows"):
        assert guarded.get(f"/{TOKEN}/{kind}/{'9' * 5000}").status_code == 414


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8765",
        "127.0.0.1.evil.example",
        "localhost.evil.example:8765",
        "10.0.0.7:8765",
        "",
        "[::2]:8765",
        "127.0.0.1@evil.example",
    ],
)
def test_name_of_another_site_is_refused(guarded: TestClient, host: str) -> None:
    answer = guarded.get(f"/{TOKEN}/state", headers={"host": host})
    assert answer.status_code == 403
    assert answer.text == "unknown host"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:8765", "LOCALHOST", "[::1]:8765"])
def test_names_of_this_machine_are_known(guarded: TestClient, host: str) -> None:
    assert guarded.get(f"/{TOKEN}/state", headers={"host": host}).status_code == 200


def test_open_host_knows_addresses_but_no_other_names(folder: Path) -> None:
    app = view_app(folder / "out", hosts=hosts_for("0.0.0.0"))
    client = TestClient(app)
    for host, status in (("192.168.1.7:80", 200), ("[fe80::1]", 200), ("evil.example", 403)):
        assert client.get("/state", headers={"host": host}).status_code == status
    assert "evil.example" not in hosts_for("127.0.0.1")
    assert hosts_for("localhost")[:3] == LOOPBACK_HOSTS


@pytest.mark.parametrize(
    "path", ["", "state", "style.css", "nothing", "thumbnail/0/0", "thumbnail/0/77", "rows/0"]
)
def test_every_answer_forbids_scripts_from_elsewhere(guarded: TestClient, path: str) -> None:
    for address in (f"/{TOKEN}/{path}", f"/wrong/{path}"):
        headers = guarded.get(address).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize("path", ["reload", "search", "list/0", "images/0", "thumbnails/0"])
def test_what_changes_or_computes_is_no_link(guarded: TestClient, path: str) -> None:
    assert guarded.get(f"/{TOKEN}/{path}").status_code in (404, 405)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"{}", b"[1.5]", b'["a"]', b"[true]", b"[-1]", b"[1e400]", b"[" * 100_000]
)
def test_list_of_something_else_is_refused(guarded: TestClient, body: bytes) -> None:
    for path in ("list/0", "images/0", "thumbnails/0"):
        assert guarded.post(f"/{TOKEN}/{path}", content=body).status_code == 400
    huge = b"[" + b"9" * 30 + b"]"
    assert guarded.post(f"/{TOKEN}/images/0", content=huge).status_code == 400


@pytest.mark.parametrize(
    "query", ["start=-1", "count=0", "count=1001", "start=x", "start=1e3", "count=%C2%B2"]
)
def test_numbers_out_of_bounds_are_refused(guarded: TestClient, query: str) -> None:
    assert guarded.get(f"/{TOKEN}/rows/0?{query}").status_code == 400


def test_upload_beyond_the_limit_is_cut_off(
    guarded: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_module, "MAX_UPLOAD_BYTES", 2**20)
    sent = 0

    def chunks() -> Any:  # no length is declared
        nonlocal sent
        for _ in range(64):
            sent += 2**18
            yield b"x" * 2**18

    answer = guarded.post(f"/{TOKEN}/search", content=chunks())
    assert answer.status_code == 413
    declared = {"content-length": str(2**30)}
    assert guarded.post(f"/{TOKEN}/search", content=b"x", headers=declared).status_code == 413
    assert guarded.post(f"/{TOKEN}/search", content=b"x" * 2**20).status_code == 200


def test_image_that_holds_a_page_is_sent_without_it(folder: Path) -> None:
    """A polyglot file is an image and a page at once; pixels are passed on, and nothing else."""
    path = folder / "images" / "a" / "0.png"
    script = b"<script>alert(1)</script>"
    path.write_bytes(path.read_bytes() + script)
    client = TestClient(view_app(folder / "out", root=folder / "images"))
    assert client.get("/thumbnail/0/0").status_code == 404  # it changed
    jpeg = io.BytesIO()
    PICTURE.save(jpeg, "JPEG", comment=script, exif=b"Exif\0\0" + script)
    (folder / "images" / "poly.jpg").write_bytes(jpeg.getvalue() + script)
    extract(folder / "images", "test_resnet", folder / "new", weights="random", device="cpu")
    client = TestClient(view_app(folder / "new"))
    for image_id, path_shown, *_ in client.get("/rows/0").json()["images"]:
        for kind in ("thumbnail", "picture"):
            answer = client.get(f"/{kind}/0/{image_id}")
            assert answer.status_code == 200, path_shown
            assert answer.headers["content-type"] == "image/jpeg"
            assert script not in answer.content
            with Image.open(io.BytesIO(answer.content)) as image:
                assert not image.getexif()


def test_paths_that_lead_out_of_the_root_show_nothing(
    tmp_path: Path, write_store: Callable[..., Path]
) -> None:
    """A store may come from anyone. Its paths and its root are no reason to read other files."""
    (tmp_path / "images").mkdir()
    secret = tmp_path / "secret.png"
    PICTURE.save(secret)
    names = [b"../secret.png", os.fsencode(secret), b"a/../../secret.png", b"fine.png"]
    shutil.copy(secret, tmp_path / "images" / "fine.png")
    out = write_store(
        tmp_path / "out",
        [np.eye(4, 3, dtype=np.float32)],
        names=[names],
        root=str(tmp_path / "images"),
    )
    client = TestClient(view_app(out))
    images = client.get("/rows/0").json()["images"]
    answers = {path: client.get(f"/thumbnail/0/{i}").json()["error"] for i, path, *_ in images}
    assert all(answers[os.fsdecode(name)].startswith("outside: ") for name in names[:3])
    assert answers["fine.png"].startswith("changed: ")  # the record of the store is made up


def declared_as(width: int, height: int) -> bytes:
    """Content of a PNG of one pixel that claims another size."""
    content = io.BytesIO()
    Image.new("1", (1, 1)).save(content, "PNG")
    png = content.getvalue()
    head = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + head + struct.pack(">I", zlib.crc32(head)) + png[33:]


def test_huge_and_broken_images_have_the_limits_of_a_run(
    folder: Path, write_store: Callable[..., Path]
) -> None:
    images = folder / "images"
    (images / "huge.png").write_bytes(declared_as(20_000, 20_000))
    (images / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    os.mkfifo(images / "pipe.png")
    (images / "folder.png").mkdir()
    names = [b"broken.jpg", b"folder.png", b"huge.png", b"pipe.png"]
    out = write_store(
        folder / "odd", [np.eye(4, 3, dtype=np.float32)], names=[names], root=str(images)
    )
    client = TestClient(view_app(out))
    rows = client.get("/rows/0").json()["images"]
    answers = {path: client.get(f"/thumbnail/0/{i}") for i, path, *_ in rows}
    assert {path: answer.status_code for path, answer in answers.items()} == dict.fromkeys(
        map(os.fsdecode, names), 404
    )
    reasons = {path: answer.json()["error"].split(":")[0] for path, answer in answers.items()}
    assert reasons["huge.png"] == "too-large"
    assert reasons["pipe.png"] == reasons["folder.png"] == "not-a-file"
    assert reasons["broken.jpg"] in ("corrupt", "truncated")
    assert client.get("/state").json()["stores"][0]["problems"] == 4
    assert len(client.get("/failures/0").json()["problems"]) == 4


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let files ``0.png`` and uploads that begin with ``hang`` hang; the list counts them."""
    release = threading.Event()
    begun: list[str] = []

    def hang(source: Any, *arguments: Any) -> Any:
        data = getattr(source, "data", b"")
        if data.startswith(b"hang") or str(source).endswith("0.png"):
            begun.append(str(source))
            release.wait(20)
        return decode_into(source, *arguments)

    monkeypatch.setattr(time_limit, "decode_into", hang)
    monkeypatch.setattr(time_limit, "IMAGE_SECONDS", 0.2)
    monkeypatch.setattr(time_limit, "_hanging", [])
    yield begun
    release.set()


def test_decoder_that_hangs_blocks_no_other_image(folder: Path, hanging: list[str]) -> None:
    app = view_app(folder / "out", root=folder / "images")
    with TestClient(app) as client:  # one event loop for all requests
        for _ in range(10):  # more than there are slots
            assert client.get("/thumbnail/0/0").status_code == 404
        assert client.get("/thumbnail/0/1").status_code == 200
        assert client.get("/failures/0").json()["problems"] == [
            ["a/0.png", "timeout", "not decoded within 0.2 s"]
        ]
    assert len(hanging) == 1


def test_upload_that_hangs_blocks_no_other_search(client: TestClient, hanging: list[str]) -> None:
    for _ in range(3):
        (result,) = client.post("/search", content=b"hang").json()["results"]
        assert result["error"] == "not decoded within 0.2 s"
    content = io.BytesIO()
    noise(3, 40, 30).save(content, "PNG")
    (result,) = client.post("/search?k=2", content=content.getvalue()).json()["results"]
    assert len(result["hits"]) == 2
