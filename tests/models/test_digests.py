from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch

from extractor.models.digests import sha256_of_file, sha256_of_state


def test_digest_of_a_state_depends_on_names_types_shapes_and_values() -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    digest = sha256_of_state(base)
    assert digest == sha256_of_state(dict(reversed(base.items())))
    for changed in (
        {"a": torch.zeros(2, 3), "c": torch.ones(1)},
        {"a": torch.zeros(3, 2), "b": torch.ones(1)},
        {"a": torch.zeros(2, 3).half(), "b": torch.ones(1)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(1)},
    ):
        assert sha256_of_state(changed) != digest


def test_digest_of_a_file_is_its_sha256(tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    (tmp_path / "w").write_bytes(content)
    assert sha256_of_file(tmp_path / "w") == hashlib.sha256(content).hexdigest()
