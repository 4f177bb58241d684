"""Finds what is wrong with a store: every byte of it is looked at."""

from __future__ import annotations

import itertools
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from extractor.errors import StoreError
from extractor.store.atomic import describe
from extractor.store.format import (
    FAILURES,
    FEATURES,
    IMAGES,
    MANIFEST,
    RUN,
    STAGING,
    FileEntry,
    Manifest,
    ShardEntry,
    checksum,
)
from extractor.store.index import Images, read_column, read_images

__all__ = ["verify", "verify_images"]

# Rows that are looked at for NaN and infinity at a time.
BLOCK = 4096


def verify(folder: Path) -> Iterator[str]:
    """What is wrong with a store, a sentence each; nothing where all is right.

    Checks the manifest against its own checksum, every file against its size and SHA-256, the
    features for their shape, type and for values that are not finite, the index row by row against
    the features, paths for repetition, and the folders for files that are not the store's.

    Raises:
        StoreError: there is no store, or no manifest that can be read.
    """
    name = folder / MANIFEST
    try:
        text = name.read_bytes()
    except OSError as error:
        raise StoreError(f"{folder} is no finished store: {name}: {error.strerror}") from error
    manifest = Manifest.from_json(text, str(name))
    yield from _own_checksum(MANIFEST, text)
    if (folder / RUN).exists():
        yield from _own_checksum(RUN, (folder / RUN).read_bytes())
    yield from _extra(folder, manifest)
    seen: dict[bytes, int] = {}
    for shard in manifest.shards:
        whole = True
        for entry in (shard.features, shard.index):
            for problem in _file(folder, entry):
                whole = False
                yield problem
        if whole:
            yield from _rows(folder, shard, manifest)
            yield from _index(folder, shard, seen)
    problems = list(_file(folder, manifest.failures))
    yield from problems or _failures(folder, manifest, seen)


def verify_images(folder: Path, root: str | None = None) -> Iterator[str]:
    """Which image files are no longer what they were when a store was made.

    Args:
        root: where the images are now, if not where they were.

    Raises:
        StoreError: as :func:`verify`.
    """
    manifest = Manifest.from_json((folder / MANIFEST).read_bytes(), str(folder / MANIFEST))
    top = os.fsencode(root or manifest.description.root)
    for shard in manifest.shards:
        images = read_images(folder / shard.index.name)
        for row in np.flatnonzero(shard.live_mask()):
            path = images.paths[int(row)]
            problem = _image(Path(os.fsdecode(os.path.join(top, path))), images, int(row))
            if problem:
                yield f"image {os.fsdecode(path)!a}: {problem}"


def _image(path: Path, images: Images, row: int) -> str:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return "is no regular file any more"
        now = describe(path, "")
    except OSError as error:
        return error.strerror or str(error)
    if now.bytes != images.sizes[row]:
        return f"{now.bytes} bytes, {images.sizes[row]} when it was read"
    same = now.sha256 == images.digests[row].hex()
    return "" if same else "its bytes changed since it was read"


def _own_checksum(name: str, text: bytes) -> Iterator[str]:
    found = re.search(rb'"checksum": "([0-9a-f]{64})"\n\}\n\Z', text)
    if found is None:
        yield f"{name}: it does not end with its own checksum"
    elif checksum(text.decode("ascii", "replace")) != found.group(1).decode():
        yield f"{name}: it was changed, its own checksum does not fit"


def _extra(folder: Path, manifest: Manifest) -> Iterator[str]:
    listed = {manifest.failures.name, MANIFEST, RUN, FEATURES, IMAGES, STAGING}
    for shard in manifest.shards:
        listed |= {shard.features.name, shard.index.name}
    for below in ("", FEATURES, IMAGES):
        try:
            names = sorted(os.listdir(folder / below))
        except OSError as error:
            if manifest.shards:
                yield f"{below}: {error.strerror}"
            continue
        for name in names:
            path = f"{below}/{name}" if below else name
            if path not in listed:
                yield f"{path!a}: is not of the store"


def _file(folder: Path, entry: FileEntry) -> Iterator[str]:
    path = folder / entry.name
    if path.is_symlink() or not path.is_file():
        yield f"{entry.name}: {'is no regular file' if path.exists() else 'is missing'}"
        return
    try:
        there = describe(path, entry.name)
    except OSError as error:
        yield f"{entry.name}: cannot be read: {error.strerror}"
        return
    if there.bytes != entry.bytes:
        yield f"{entry.name}: {there.bytes} bytes, expected {entry.bytes}"
    elif there.sha256 != entry.sha256:
        yield f"{entry.name}: its bytes changed: SHA-256 {there.sha256}, expected {entry.sha256}"


def _rows(folder: Path, shard: ShardEntry, manifest: Manifest) -> Iterator[str]:
    name, described = shard.features.name, manifest.description
    try:
        array = np.lib.format.open_memmap(folder / name, mode="r")
    except Exception as error:  # numpy parses the header as Python, and raises what that raises
        yield f"{name}: no array of numpy: {error}"
        return
    expected = ((shard.rows, *described.shape), np.dtype(described.dtype))
    if (array.shape, array.dtype) != expected:
        yield f"{name}: {array.shape} {array.dtype}, expected {expected[0]} {expected[1]}"
        return
    for start in range(0, len(array), BLOCK):
        block = array[start : start + BLOCK]
        finite = np.isfinite(block).reshape(len(block), -1).all(axis=1)
        for row in np.flatnonzero(~finite):
            yield f"{name}: row {start + row} holds NaN or infinity"


def _index(folder: Path, shard: ShardEntry, seen: dict[bytes, int]) -> Iterator[str]:
    name = shard.index.name
    try:
        paths = [os.fsencode(path) for path in read_column(folder / name, "path")]
    except Exception as error:  # whatever a reader of Parquet says of damaged bytes
        yield f"{name}: cannot be read: {error}"
        return
    if len(paths) != shard.rows:
        yield f"{name}: {len(paths)} rows, expected {shard.rows}"
    if paths != sorted(paths):
        yield f"{name}: its paths are not in order"
    for path in itertools.compress(paths, shard.live_mask()):
        if path in seen:
            yield f"{name}: {os.fsdecode(path)!a} has a row in shard {seen[path]} already"
        seen[path] = shard.shard


def _failures(folder: Path, manifest: Manifest, seen: dict[bytes, int]) -> Iterator[str]:
    lines = (folder / FAILURES).read_bytes().splitlines()
    if len(lines) != manifest.failed:
        yield f"{FAILURES}: {len(lines)} lines, expected {manifest.failed}"
    for number, line in enumerate(lines, 1):
        try:
            path = os.fsencode(json.loads(line)["path"])
        except (ValueError, KeyError, TypeError) as error:
            yield f"{FAILURES}: line {number}: {error}"
            continue
        if path in seen:
            yield f"{FAILURES}: {os.fsdecode(path)!a} has a row in shard {seen[path]}"
