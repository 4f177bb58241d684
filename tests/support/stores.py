"""Small stores with known content, and ways to look at folders."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import extractor.store.writer as writer_module
from extractor.errors import StoreError
from extractor.reading.reader import FeatureStore
from extractor.store.claim import ClaimedFolder
from extractor.store.failures import FailureRecord
from extractor.store.format import Description
from extractor.store.index import ImageRecord
from extractor.store.job import Job
from extractor.store.publish import locate
from extractor.store.writer import StoreRun, rewrite


def _description(*, dim: int = 3, dtype: str = "float32", **changes: Any) -> Description:
    values: dict[str, Any] = {
        "backbone": {"model": "timm:tiny", "tag": "a1", "sha256": "0123456789abcdef"},
        "embedding": {
            "definition": "pre-logits",
            "dim": dim,
            "shape": [dim],
            "dtype": dtype,
            "normalized": False,
        },
        "preprocess": {"size": [8, 8]},
        "computation": {"precision": "float32", "device": "cpu", "batch_size": 2},
        "root": "/photos",
        "shard_images": 4,
        "software": {"extractor": "0.0.0"},
    }
    return Description(**{**values, **changes})


def _records(names: Sequence[bytes]) -> list[ImageRecord]:
    return [
        ImageRecord(name, 100 + i, 10**18 + i, 20 + i, 30 + i, sha256(b"x" * (100 + i)).digest())
        for i, name in enumerate(names)
    ]


def _names(shard: int, rows: int) -> list[bytes]:
    return [f"{shard}/{row}.jpg".encode() for row in range(rows)]


def _fill(
    claim: ClaimedFolder,
    parts: Sequence[np.ndarray],
    *,
    names: Sequence[Sequence[bytes]] | None = None,
    records: Sequence[Sequence[ImageRecord]] | None = None,
    numbers: Sequence[int] | None = None,
    failures: Sequence[tuple[bytes, str, str]] = (),
    **described: Any,
) -> StoreRun:
    """Write the shards of a store; the run that comes back can be published."""
    dtype = parts[0].dtype.name if parts else "float32"
    dim = parts[0].shape[1] if parts else 3
    size = max([4, *map(len, parts)])
    description = _description(**{"dim": dim, "dtype": dtype, "shard_images": size, **described})
    last = len(parts) - 1 if numbers is None else max(numbers)
    total = last * size + len(parts[-1]) if parts else 0
    run = rewrite(claim, Job(description, max(total, 0) + len(failures), "0" * 64))
    for i, part in enumerate(parts):
        number = i if numbers is None else numbers[i]
        shard_names = _names(number, len(part)) if names is None else names[i]
        images = _records(shard_names) if records is None else records[i]
        with run.shard(number) as shard:
            for start in range(0, len(part), 3):  # more than one batch, and a short last one
                rows = slice(start, start + 3)
                shard.append(part[rows], images[rows])
            shard.finish()
    if failures:
        with run.shard(len(parts) + 1) as shard:
            empty = np.empty((0, *description.shape), np.float32)
            shard.append(empty, [], [FailureRecord(*failure) for failure in failures])
            shard.finish()
    return run


def _write(
    out: Path, parts: Sequence[np.ndarray], *, overwrite: bool = False, **filled: Any
) -> Path:
    with ClaimedFolder(out, overwrite=overwrite) as claim:
        _fill(claim, parts, **filled).publish()
    return out


def content(folder: Path) -> dict[str, object]:
    """Content of every file of a store, without creation times and the checksums over these."""
    files: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "run.json":
            files[str(path.relative_to(folder))] = path.read_bytes()
    manifest = json.loads((folder / "store.json").read_bytes())
    varying = ("created", "checksum", "history")
    files["store.json"] = {key: value for key, value in manifest.items() if key not in varying}
    history = (folder / "history.jsonl").read_bytes().splitlines()
    files["history.jsonl"] = [{**json.loads(line), "created": ""} for line in history]
    return files


def _tree(folder: Path) -> dict[str, bytes | None]:
    """Content of every file under a folder, hidden ones included; None for folders."""
    return {
        os.fsdecode(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def _checked(out: Path) -> np.ndarray | None:
    """All rows of a store after a check of every file against the manifest; None if no store."""
    try:
        store = FeatureStore.open(out)
    except StoreError:
        return None
    manifest = store.manifest
    entries = [entry for shard in manifest.shards for entry in (shard.features, shard.index)]
    for entry in [*entries, manifest.failures]:
        content = locate(out, entry.name).read_bytes()
        assert len(content) == entry.bytes
        assert hashlib.sha256(content).hexdigest() == entry.sha256, entry.name
    return np.array(store.features)


@pytest.fixture
def describe_store() -> Callable[..., Description]:
    """Makes a description of a tiny store; keywords replace its values."""
    return _description


@pytest.fixture
def make_records() -> Callable[[Sequence[bytes]], list[ImageRecord]]:
    """Makes one record a name, all with different numbers."""
    return _records


@pytest.fixture
def fill() -> Callable[..., StoreRun]:
    """Writes shards into a claimed folder; returns the run, ready to be published."""
    return _fill


@pytest.fixture
def write_store() -> Callable[..., Path]:
    """Writes and publishes a whole store with the given arrays as shards."""
    return _write


@pytest.fixture
def tree() -> Callable[[Path], dict[str, bytes | None]]:
    """Lists all that lies under a folder, with its content."""
    return _tree


@pytest.fixture
def checked() -> Callable[[Path], np.ndarray | None]:
    """Opens a store, compares every file with the manifest, and returns all rows."""
    return _checked


@pytest.fixture
def parts() -> list[np.ndarray]:
    """Two shards, of 4 and 3 rows of 3 numbers; all numbers differ."""
    return [
        np.arange(12, dtype=np.float32).reshape(4, 3),
        np.arange(12, 21, dtype=np.float32).reshape(3, 3),
    ]


@pytest.fixture
def fixed_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every store is made at the same instant."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            assert tz is timezone.utc
            return datetime(2024, 1, 2, 3, 4, 5, 678, tz)

    monkeypatch.setattr(writer_module, "datetime", Clock)
