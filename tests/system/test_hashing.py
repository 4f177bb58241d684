"""SHA-256 of a file in blocks equals that of all its bytes."""

from __future__ import annotations

import hashlib
import io

import pytest

from extractor.system.hashing import BLOCK_BYTES, hash_file


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1])
def test_digest_and_size_equal_those_of_all_bytes(size: int) -> None:
    content = bytes(i % 251 for i in range(1000)) * (size // 1000 + 1)
    content = content[:size]
    assert hash_file(io.BytesIO(content)) == (hashlib.sha256(content).digest(), size)


def test_hashing_begins_at_the_current_position() -> None:
    file = io.BytesIO(b"abcdef")
    file.seek(4)
    assert hash_file(file) == (hashlib.sha256(b"ef").digest(), 2)
