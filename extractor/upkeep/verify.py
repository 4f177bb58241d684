"""Check every byte of a store."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from extractor.errors import StoreError, StoreReplacedError
from extractor.reading.array import map_array
from extractor.reading.reader import manifest_errors
from extractor.store.atomic import PARTIAL
from extractor.store.format import (
    DERIVED,
    FAILURES,
    FEATURES,
    HISTORY,
    IMAGES,
    LIST_ROWS,
    MANIFEST,
    RUN,
    STAGING,
    FileEntry,
    Manifest,
    ShardEntry,
    checksum,
)
from extractor.store.history import are_in, difference, net_changes
from extractor.store.ids import live_ids, read_history, shard_ids
from extractor.store.index import Images, read_column, read_images
from extractor.text import plural

__all__ = ["verify", "verify_images"]

Progress: TypeAlias = Callable[[str, int, int], None]
Digests: TypeAlias = npt.NDArray[np.int64]

# Rows checked for NaN and infinity at a time.
BLOCK_ROWS = 4096


def verify(folder: Path, progress: Progress | None = None) -> Iterator[str]:
    """Yield one message per problem of a store; none if the store is intact.

    Checks the checksum of the manifest, and size and SHA-256 of every file. Features must have the
    right shape and type, and finite values. The index must have one row per embedding, and no path
    may occur twice, nor an id. The history must fit the ids. The folders may hold no other files.

    Args:
        folder: folder of the store.
        progress: called with the phase (``reading``), the number of rows that are done, and how
            many there are.

    Raises:
        StoreReplacedError: there is a problem, and a run has changed the store meanwhile.
        StoreError: no finished store, or a manifest that cannot be read.
    """
    name = folder / MANIFEST
    with manifest_errors(folder):
        text = name.read_bytes()
    for problem in _problems(folder, text, Manifest.from_json(text, str(name)), progress):
        if (folder / STAGING / MANIFEST).exists() or not _holds(name, text):
            raise StoreReplacedError(f"{folder} was changed while it was verified; verify it again")
        yield problem


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except OSError:
        return False


def _problems(
    folder: Path, text: bytes, manifest: Manifest, progress: Progress | None
) -> Iterator[str]:
    yield from _own_checksum(MANIFEST, text)
    if (folder / RUN).is_file():
        yield from _own_checksum(RUN, (folder / RUN).read_bytes())
    elif (folder / RUN).exists():
        yield f"{RUN}: no regular file"
    yield from _extra(folder, manifest)
    digests: list[Digests] = []
    intact = []
    total, done = sum(shard.rows for shard in manifest.shards), 0
    for shard in manifest.shards:
        is_intact = True
        for entry in (shard.features, shard.index):
            for problem in _file(folder, entry):
                is_intact = False
                yield problem
        if is_intact:
            intact.append(shard)
            yield from _rows(folder, shard, manifest)
            yield from _index(folder, shard, digests)
        done += shard.rows
        if progress is not None:
            progress("reading", done, total)
    yield from _ids(folder, intact, manifest)
    failed: dict[bytes, None] = {}
    problems = list(_file(folder, manifest.failures))
    yield from problems or _failures(folder, manifest, failed)
    yield from _repeated(folder, intact, digests, failed)
    for entry in manifest.description.transform_files:
        yield from _file(folder, entry)
    if manifest.list_rows is not None:
        problems = list(_file(folder, manifest.list_rows))
        yield from problems or _list_rows(folder, manifest)
    if manifest.history is not None:
        problems = list(_file(folder, manifest.history))
        if len(intact) == len(manifest.shards):  # otherwise the ids are not all known
            problems = problems or list(_history(folder, manifest))
        yield from problems


def verify_images(
    folder: Path, root: str | None = None, progress: Progress | None = None
) -> Iterator[str]:
    """Yield one message per image file that changed after its row was computed.

    Args:
        folder: folder of the store.
        root: folder of the images, if they were moved.
        progress: called with the phase (``images``), the number of images that are done, and how
            many there are.

    Raises:
        StoreError: a manifest or an index that cannot be read.
    """
    manifest = Manifest.read(folder / MANIFEST)
    top = os.fsencode(root or manifest.description.root)
    if not os.path.isdir(top):
        hint = "" if root else "; if the images were moved, name their folder with --root"
        yield f"{os.fsdecode(top)!a}: no such folder of images{hint}"
        return
    done = 0
    for shard in manifest.shards:
        images = read_images(folder / shard.index.name)
        for row in np.flatnonzero(shard.live_mask()):
            path = images.paths[int(row)]
            problem = _image(Path(os.fsdecode(os.path.join(top, path))), images, int(row))
            if problem:
                yield f"image {os.fsdecode(path)!a}: {problem}"
            done += 1
            if progress is not None:
                progress("images", done, manifest.rows)


def _image(path: Path, images: Images, row: int) -> str:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return "is no longer a regular file"
        now = FileEntry.of(path, "")
    except OSError as error:
        return error.strerror or str(error)
    if now.bytes != images.sizes[row]:
        return f"has {now.bytes} bytes, had {images.sizes[row]} when it was read"
    same = now.sha256 == images.digests[row].hex()
    return "" if same else "its content changed since it was read"


def _own_checksum(name: str, text: bytes) -> Iterator[str]:
    found = re.search(rb'"checksum": "([0-9a-f]{64})"\n\}\n\Z', text)
    if found is None:
        yield f"{name}: does not end with its own checksum"
    elif checksum(text.decode("ascii", "replace")) != found.group(1).decode():
        yield f"{name}: was changed, its own checksum does not match"


def _extra(folder: Path, manifest: Manifest) -> Iterator[str]:
    listed = {
        MANIFEST,
        RUN,
        f"{RUN}{PARTIAL}",  # of a run that died after it had published the store
        FEATURES,
        IMAGES,
        STAGING,
        DERIVED,
        *(entry.name for entry in manifest.files),
    }
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
                yield f"{path!a}: is not part of the store"


def _file(folder: Path, entry: FileEntry) -> Iterator[str]:
    path = folder / entry.name
    if path.is_symlink() or not path.is_file():
        yield f"{entry.name}: {'is not a regular file' if path.exists() else 'is missing'}"
        return
    try:
        found = FileEntry.of(path, entry.name)
    except OSError as error:
        yield f"{entry.name}: cannot be read: {error.strerror}"
        return
    if found.bytes != entry.bytes:
        yield f"{entry.name}: has {found.bytes} bytes, expected {entry.bytes}"
    elif found.sha256 != entry.sha256:
        yield f"{entry.name}: content changed: SHA-256 {found.sha256}, expected {entry.sha256}"


def _list_rows(folder: Path, manifest: Manifest) -> Iterator[str]:
    try:
        rows = map_array(folder / LIST_ROWS)
    except Exception as error:  # numpy parses the header as Python and raises anything
        yield f"{LIST_ROWS}: is not a numpy array: {error}"
        return
    if rows.ndim != 1 or rows.dtype != np.int64:
        yield f"{LIST_ROWS}: holds {rows.shape} {rows.dtype}, expected one dimension of int64"
    elif len(rows) and not -1 <= rows.min() <= rows.max() < manifest.rows:
        yield f"{LIST_ROWS}: holds row numbers outside of -1 to {manifest.rows - 1}"


def _rows(folder: Path, shard: ShardEntry, manifest: Manifest) -> Iterator[str]:
    name, described = shard.features.name, manifest.description
    try:
        array = map_array(folder / name)
    except Exception as error:  # numpy parses the header as Python and raises anything
        yield f"{name}: is not a numpy array: {error}"
        return
    expected = ((shard.rows, *described.shape), np.dtype(described.dtype))
    if (array.shape, array.dtype) != expected:
        yield f"{name}: holds {array.shape} {array.dtype}, expected {expected[0]} {expected[1]}"
        return
    for start in range(0, len(array), BLOCK_ROWS):
        block = array[start : start + BLOCK_ROWS]
        finite = np.isfinite(block).reshape(len(block), -1).all(axis=1)
        for row in np.flatnonzero(~finite):
            yield f"{name}: row {start + row} holds NaN or infinity"


def _index(folder: Path, shard: ShardEntry, digests: list[Digests]) -> Iterator[str]:
    name = shard.index.name
    try:
        paths = _paths(folder, shard)
    except Exception as error:  # damaged bytes make pyarrow raise anything
        yield f"{name}: cannot be read: {error}"
        return
    if len(paths) != shard.rows:
        yield f"{name}: has {plural(len(paths), 'row')}, expected {shard.rows}"
    digests.append(_digests(itertools.compress(paths, shard.live_mask())))


def _paths(folder: Path, shard: ShardEntry) -> list[bytes]:
    return [os.fsencode(path) for path in read_column(folder / shard.index.name, "path")]


def _digests(paths: Iterable[bytes]) -> Digests:
    """Return a number for each path. Paths of the same number are compared byte by byte."""
    return np.fromiter(map(hash, paths), np.int64)


def _repeated(
    folder: Path,
    shards: Sequence[ShardEntry],
    digests: Sequence[Digests],
    failed: Collection[bytes],
) -> Iterator[str]:
    """Find paths that occur twice. No table of all paths is in memory, only their numbers."""
    numbers = np.concatenate([*digests, np.unique(_digests(failed))])
    numbers.sort()
    suspects = set(numbers[1:][numbers[1:] == numbers[:-1]].tolist())
    if not suspects:
        return
    seen: dict[bytes, int] = {}
    for shard in shards:
        with contextlib.suppress(Exception):  # reported before
            for path in itertools.compress(_paths(folder, shard), shard.live_mask()):
                if hash(path) not in suspects:
                    continue
                if path in seen:
                    name, other = shard.index.name, seen[path]
                    yield f"{name}: {os.fsdecode(path)!a} already has a row in shard {other}"
                seen[path] = shard.shard
    for path in failed:
        if path in seen:
            yield f"{FAILURES}: {os.fsdecode(path)!a} has a row in shard {seen[path]}"


def _ids(folder: Path, shards: Sequence[ShardEntry], manifest: Manifest) -> Iterator[str]:
    parts = [np.empty(0, np.int64)]
    for shard in shards:
        try:
            ids = shard_ids(shard, folder / shard.index.name)
        except Exception as error:  # damaged bytes make pyarrow raise anything
            yield f"{shard.index.name}: {error}"
            continue
        if len(ids) and not 0 <= ids.min() <= ids.max() < manifest.next_id:
            yield f"{shard.index.name}: holds ids outside of 0 to {manifest.next_id - 1}"
        parts.append(ids)
    every = np.concatenate(parts)
    every.sort()
    for row_id in np.unique(every[1:][every[1:] == every[:-1]]).tolist():
        yield f"{IMAGES}: id {row_id} belongs to several rows"


def _history(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Check that the history is a chain, and that it ends at the ids that count."""
    try:
        history = read_history(folder / HISTORY, manifest)
        live = np.sort(live_ids(manifest.shards, lambda name: folder / name))
    except StoreError as error:
        yield f"{HISTORY}: {error}"
        return
    tokens = [entry.since for entry in history]
    if not tokens:
        yield f"{HISTORY}: is empty, expected at least one state"
    elif "" in tokens[1:] or len(set(tokens)) < len(tokens):
        yield f"{HISTORY}: holds the same state twice"
    changes = net_changes(history, manifest.checksum)
    for came in (changes.added, changes.moved):
        for row_id in difference(came, live)[:1].tolist():
            yield f"{HISTORY}: id {row_id} was added, but its row does not count"
    stray = changes.removed[are_in(changes.removed, live)]
    if len(stray):
        yield f"{HISTORY}: id {int(stray[0])} was removed, but its row counts"
    if tokens and not tokens[0] and len(changes.added) != len(live):
        added, rows = len(changes.added), len(live)
        yield f"{HISTORY}: adds {plural(added, 'id')} to an empty store, expected {rows}"


def _failures(folder: Path, manifest: Manifest, failed: dict[bytes, None]) -> Iterator[str]:
    lines = (folder / FAILURES).read_bytes().splitlines()
    if len(lines) != manifest.failed:
        yield f"{FAILURES}: has {plural(len(lines), 'line')}, expected {manifest.failed}"
    for number, line in enumerate(lines, 1):
        try:
            failed[os.fsencode(json.loads(line)["path"])] = None
        except (ValueError, KeyError, TypeError) as error:
            yield f"{FAILURES}: line {number}: {error}"
