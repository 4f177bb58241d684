"""Checks of caches and of the hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from extractor.doctor import weights
from extractor.doctor.finding import Finding
from extractor.doctor.weights import check_weights


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(weights, "answers", lambda *_: True)
    return tmp_path


def findings() -> dict[str, Finding]:
    return {each.name: each for each in check_weights("") if isinstance(each, Finding)}


def cached(caches: Path, model: str, content: bytes) -> Path:
    folder = caches / "hf" / "hub" / f"models--timm--{model}" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(content)
    (folder / "config.json").write_text("{}")
    return folder / "model.safetensors"


def test_empty_caches_are_no_fault(caches: Path) -> None:
    found = findings()
    assert list(found) == ["hub cache", "torch cache", "lite", "hub"]
    assert {each.state for each in found.values()} == {"ok"}
    assert found["hub cache"].details["files"] == found["torch cache"].details["files"] == 0


def test_cached_weights_are_counted_and_named(caches: Path) -> None:
    for number in range(4):
        cached(caches, f"net{number}", b"x" * 1000)
    (caches / "torch" / "hub" / "checkpoints").mkdir(parents=True)
    (caches / "torch" / "hub" / "checkpoints" / "resnet18-f37072fd.pth").write_bytes(b"y" * 77)
    found = findings()
    assert (found["hub cache"].details["files"], found["hub cache"].details["bytes"]) == (4, 4000)
    assert "(timm/net0, timm/net1, timm/net2, ...)" in found["hub cache"].text
    assert found["torch cache"].details["bytes"] == 77
    assert "resnet18-f37072fd.pth" in found["torch cache"].text


def test_link_to_a_missing_file_is_an_incomplete_download(caches: Path) -> None:
    path = cached(caches, "net", b"")
    path.unlink()
    path.symlink_to("../../blobs/none")
    found = findings()["hub cache"]
    assert found.state == "warning"
    assert "timm/net is incomplete" in found.text
    assert found.advice == "extract download timm/net"


def test_hub_is_asked_only_if_its_variables_allow(
    caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "answers", lambda *_: False)
    assert findings()["hub"].state == "warning"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert (findings()["hub"].state, findings()["hub"].text) == (
        "ok",
        "not asked: HF_HUB_OFFLINE is set",
    )


def test_password_of_a_mirror_is_not_shown(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://me:secret@mirror.example/hub")
    assert findings()["hub"].text == "mirror.example answers"
