from __future__ import annotations

import hashlib
import http.server
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from extractor.errors import WeightsError
from extractor.models import weight_files


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, directory=str(tmp_path / "served"), **kwargs)  # type: ignore[arg-type]

        def log_message(self, *args: object) -> None:
            pass

    (tmp_path / "served").mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_weights_are_fetched_once(server: str, tmp_path: Path, empty_caches: Path) -> None:
    content = os.urandom(5000)
    name = f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (tmp_path / "served" / name).write_bytes(content)
    found = weight_files.find_url_file(f"{server}/{name}", tag="T", label="test")
    assert found.path == empty_caches / "torch" / "hub" / "checkpoints" / name
    assert found.path.read_bytes() == content
    assert (found.url, found.tag) == (f"{server}/{name}", "T")
    (tmp_path / "served" / name).unlink()
    assert weight_files.find_url_file(f"{server}/{name}", tag="T", label="test") == found


def test_download_must_match_the_digest_in_its_name(
    server: str, tmp_path: Path, empty_caches: Path
) -> None:
    (tmp_path / "served" / "net-0123abcd.pth").write_bytes(b"something else")
    with pytest.raises(WeightsError, match="invalid hash value"):
        weight_files.find_url_file(f"{server}/net-0123abcd.pth", tag="", label="test")
    assert not list(empty_caches.rglob("net-*"))


def test_file_missing_on_the_server_is_an_error(server: str) -> None:
    with pytest.raises(WeightsError, match="answered: HTTP Error 404"):
        weight_files.find_url_file(f"{server}/nothing.pth", tag="", label="test")


def test_server_that_refuses_the_request_is_reachable(server: str) -> None:
    assert weight_files._reachable(f"{server}/whatever")


def test_closed_port_is_unreachable_at_once() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        started = time.monotonic()
        assert not weight_files._reachable(f"http://127.0.0.1:{unused.getsockname()[1]}/")
        assert time.monotonic() - started < weight_files.PROBE_SECONDS


def test_silent_server_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "PROBE_SECONDS", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.monotonic()
        assert not weight_files._reachable(f"http://127.0.0.1:{silent.getsockname()[1]}/")
        assert time.monotonic() - started < 3
