"""SHA-256 of files, block by block."""

from __future__ import annotations

import hashlib
from typing import IO

__all__ = ["hash_file"]

BLOCK_BYTES = 2**20


def hash_file(file: IO[bytes]) -> tuple[bytes, int]:
    """Return the SHA-256 digest, 32 bytes, and the number of bytes of an open file.

    Reads from the current position to the end.

    >>> import io
    >>> digest, size = hash_file(io.BytesIO(b"abc"))
    >>> digest.hex()[:16], size
    ('ba7816bf8f01cfea', 3)
    """
    digest = hashlib.sha256()
    size = 0
    while block := file.read(BLOCK_BYTES):
        digest.update(block)
        size += len(block)
    return digest.digest(), size
