"""SHA-256 digests of weights: of files, and of tensors that no file holds."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from extractor.system.hashing import hash_file

__all__ = [
    "sha256_of_cached_file",
    "sha256_of_file",
    "sha256_of_state",
    "versions_of_state",
]


# Digests of files that a process remembers.
DIGESTS_KEPT = 64


def sha256_of_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes; a process reads an unchanged file once."""
    return _sha256(path, _stamp(path), path.stat().st_ino)


@functools.lru_cache(DIGESTS_KEPT)
def _sha256(path: Path, stamp: str, inode: int) -> str:
    del stamp, inode  # what tells apart two files that had this path, one after the other
    with path.open("rb") as file:
        digest, _ = hash_file(file)
    return digest.hex()


def sha256_of_cached_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file in a cache, computing it only once.

    The digest is kept next to the file, as ``<name>.sha256`` in the format of ``sha256sum``. It is
    trusted as long as the file has the size and times that are recorded with it.
    """
    stamp = _stamp(path)
    beside = path.with_name(path.name + ".sha256")
    with contextlib.suppress(OSError, ValueError):
        line, mark = beside.read_text("ascii").splitlines()
        if mark == stamp and (kept := re.match("([0-9a-f]{64})  ", line)):
            return kept.group(1)
    digest = sha256_of_file(path)
    with contextlib.suppress(OSError):  # a shared cache may be read-only
        partial = beside.with_name(f"{beside.name}.{os.getpid()}.partial")
        partial.write_text(f"{digest}  {path.name}\n{stamp}\n", "ascii")
        os.replace(partial, beside)
    return digest


def _stamp(path: Path) -> str:
    status = path.stat()
    # No copy can set the change time (ctime), so it reveals a file that replaced another one.
    times = f"mtime_ns={status.st_mtime_ns} ctime_ns={status.st_ctime_ns}"
    return f"# size={status.st_size} {times}"


def sha256_of_state(state: Mapping[str, torch.Tensor]) -> str:
    """Return the hexadecimal SHA-256 of a state dict: names, types, shapes and values, by name.

    For weights that no file holds. Equal weights have equal digests on every machine.
    """
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(json.dumps([key, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def versions_of_state(network: nn.Module) -> dict[str, int]:
    """Return torch's count of changes in place of each tensor of a network, by name.

    An optimizer and ``load_state_dict`` are counted, and so cost no look at the values. Changes
    through ``tensor.data`` are not.
    """
    return {
        name: 0 if tensor.is_inference() else tensor._version
        for name, tensor in network.state_dict(keep_vars=True).items()
        if isinstance(tensor, torch.Tensor)
    }
