"""Weights files in torch's cache, under names that state the digest of their content."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch


def publish(
    monkeypatch: pytest.MonkeyPatch, home: Path, entry: Any, content: bytes | dict[str, Any]
) -> Path:
    """Cache weights as those of a torchvision entry, whose address gets the digest it would have.

    Returns:
        Path of the file.
    """
    folder = home / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "fresh.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    stem, _, _ = entry.url.rpartition("-")
    url = f"{stem}-{digest[:8]}.pth"
    monkeypatch.setattr(entry.value, "url", url)
    return path.rename(folder / url.rpartition("/")[2])
