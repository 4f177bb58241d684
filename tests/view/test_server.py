"""The page as a program: its port, its address, many clients, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from extractor import UsageError
from extractor.cli import main as cli
from extractor.view import server
from extractor.view.server import address_of, listen, new_token, open_browser

SECONDS = 60


@pytest.fixture(scope="module")
def address(made: Path) -> Iterator[str]:
    """Address of a page that another process serves; Ctrl-C ends it, without an error."""
    process = subprocess.Popen(
        [sys.executable, "-m", "extractor", "view", made / "out", "--no-browser", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    yield process.stdout.readline().strip()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 0
    assert said == "Ctrl-C ends the page.\n"


def get(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=SECONDS) as answer:
        content: bytes = answer.read()
    return content


def test_page_is_served_on_this_machine_only(address: str) -> None:
    parts = urlsplit(address)
    assert parts.hostname == "127.0.0.1"
    assert len(parts.path) > 30
    assert b"<title>extract view" in get(address)
    with pytest.raises(urllib.error.HTTPError, match="403"):
        get(f"http://{parts.netloc}/")


def test_fifty_clients_get_the_same_answers(address: str) -> None:
    def visit(number: int) -> tuple[bytes, bytes]:
        image = number % 6
        return get(f"{address}neighbors/0/{image}?k=2"), get(f"{address}thumbnail/0/{image}")

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(visit, range(150)))
    assert len(set(answers)) == 6
    for number, answer in enumerate(answers):
        assert answer == answers[number % 6]


@pytest.mark.parametrize("head", ["Content-Length: 1073741824", "Transfer-Encoding: chunked"])
def test_upload_of_a_gigabyte_is_cut_off_early(address: str, head: str) -> None:
    parts = urlsplit(address)
    block = b"x" * 2**20
    is_chunked = "chunked" in head
    sent, answer = 0, b""
    with socket.create_connection((parts.hostname, parts.port), SECONDS) as client:
        lines = [f"POST {parts.path}search HTTP/1.1", f"Host: {parts.netloc}", head, "", ""]
        client.sendall("\r\n".join(lines).encode())
        try:
            for _ in range(1024):
                client.sendall(b"100000\r\n%b\r\n" % block if is_chunked else block)
                sent += len(block)
        except OSError:
            pass  # the server closed the connection
        try:
            answer = client.recv(4096)
        except OSError:
            answer = b"HTTP/1.1 413 (lost with the connection)"
    assert answer.startswith(b"HTTP/1.1 413")
    assert sent <= (150 if is_chunked else 20) * 2**20
    assert b"<title>" in get(address)


@pytest.mark.slow
def test_ctrl_c_during_an_upload_ends_the_server_without_a_traceback(made: Path) -> None:
    words = [sys.executable, "-m", "extractor", "view", made / "out", "--no-browser", "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as view:
        assert view.stdout is not None
        parts = urlsplit(view.stdout.readline().strip())
        head = (
            f"POST {parts.path}search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n\r\nabc"
        )
        with socket.create_connection((parts.hostname, parts.port)) as client:
            client.sendall(head.encode())
            time.sleep(0.5)
            view.send_signal(signal.SIGINT)
            _, errors = view.communicate(timeout=SECONDS)
    assert view.returncode == 0
    assert errors.strip() == "Ctrl-C ends the page."


def test_next_free_port_is_taken_unless_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(server, "DEFAULT_PORT", port)
        with listen("127.0.0.1", None) as other:
            assert port < other.getsockname()[1] < port + server.PORTS_TRIED
        with pytest.raises(UsageError, match=f"{port} is taken by another program"):
            listen("127.0.0.1", port)
        monkeypatch.setattr(server, "PORTS_TRIED", 1)
        with pytest.raises(UsageError, match="are taken; name a free one with --port"):
            listen("127.0.0.1", None)


@pytest.mark.parametrize(
    ("host", "port", "words"),
    [
        ("no.such.host.invalid", 0, "is no address of this machine"),
        ("192.0.2.1", 0, "cannot listen to 192.0.2.1"),
        ("a" * 300, 0, "is no address of this machine"),
        ("127.0.0.1", 70_000, "port: got 70000, expected 0 to 65535"),
        ("127.0.0.1", -1, "port: got -1"),
    ],
)
def test_addresses_that_cannot_be_had_are_named(host: str, port: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        listen(host, port)


def test_address_holds_port_and_token() -> None:
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert address_of(listener, "127.0.0.1", "abc") == f"http://127.0.0.1:{port}/abc/"
        assert address_of(listener, "::1", "abc") == f"http://[::1]:{port}/abc/"
        assert socket.gethostname() in address_of(listener, "0.0.0.0", "abc")
        assert listener.proto == socket.IPPROTO_TCP  # or else every answer takes 45 ms
    assert len({new_token() for _ in range(100)}) == 100
    assert min(len(new_token()) for _ in range(100)) == 32


def test_browser_opens_on_a_desktop_only(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    open_browser("http://here")
    assert opened == []
    monkeypatch.setenv("DISPLAY", ":0")
    open_browser("http://here")
    assert opened == ["http://here"]


def test_command_names_what_is_missing(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["view", str(made / "nothing"), "--no-browser"]) == 1
    assert "there is no such folder" in capsys.readouterr().err
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        assert cli.main(["view", str(made / "out"), "--no-browser", "--port", port]) == 2
    assert "is taken by another program" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(["view", str(made / "out"), "--no-browser", "--port", "0"]) == 1
    assert "pip install 'backbone-extractor[view]'" in capsys.readouterr().err
    for name in [name for name in sys.modules if name.partition(".")[0] == "starlette"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "extractor.view.guard")
    assert cli.main(["view", str(made / "out"), "--no-browser", "--port", "0"]) == 1
    assert "pip install 'backbone-extractor[view]'" in capsys.readouterr().err
    assert os.environ  # nothing was opened
