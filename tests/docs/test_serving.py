"""The web server of the guide answers, from one client and from several at a time."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.pictures import noise

import extractor

GUIDE = Path(__file__).parents[2] / "docs" / "serving.md"
MODEL = "torchvision:squeezenet1_1"


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Client of the guide's application, with a small network."""
    testclient = pytest.importorskip("fastapi.testclient")
    small = functools.partial(extractor.Extractor, weights="random", device="cpu")
    monkeypatch.setattr(extractor, "Extractor", lambda _, **options: small(MODEL, **options))
    (example,) = (
        block
        for block in re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text("utf-8"), re.M | re.S)
        if "FastAPI()" in block
    )
    names: dict[str, Any] = {}
    exec(compile(example, GUIDE.name, "exec"), names)
    with testclient.TestClient(names["app"]) as client:
        client.embed = names["embed"]
        yield client


def png(seed: int) -> bytes:
    file = io.BytesIO()
    noise(seed, 40, 50).save(file, "PNG")
    return file.getvalue()


def test_server_of_the_guide_returns_the_row_of_the_image(client: Any) -> None:
    answer = client.post("/embedding", content=png(0))
    assert answer.status_code == 200
    np.testing.assert_allclose(answer.json(), client.embed([png(0)])[0], rtol=1e-5)


def test_server_of_the_guide_names_what_is_wrong_with_an_image(client: Any) -> None:
    answer = client.post("/embedding", content=b"no image")
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("not-an-image: image 0: ")


def test_server_of_the_guide_answers_several_clients_at_a_time(client: Any) -> None:
    def ask(seed: int) -> list[float]:
        answered: list[float] = client.post("/embedding", content=png(seed)).json()
        return answered

    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(ask, range(16)))
    np.testing.assert_allclose(
        answers, client.embed([png(i) for i in range(16)]), rtol=1e-3, atol=1e-4
    )
