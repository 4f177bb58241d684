"""Ids of the rows of a store, and what a publication changes about them."""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from extractor.errors import StoreDamagedError
from extractor.store.format import HISTORY, Manifest, ShardEntry
from extractor.store.history import HistoryEntry, parse_history, trimmed
from extractor.store.index import read_ids, read_images
from extractor.text import plural

__all__ = [
    "history_of_new",
    "history_of_same_rows",
    "history_to_continue",
    "history_with",
    "id_after_damage",
    "live_ids",
    "read_history",
    "shard_ids",
]

log = logging.getLogger(__name__)

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

# More ids than a store uses up in one second.
IDS_PER_SECOND = 2**20


def id_after_damage() -> int:
    """Return the id to go on with if the manifest that knew the next one is damaged.

    It is above all that were used, since no store computes a million images a second.
    """
    return int(time.time()) * IDS_PER_SECOND


def shard_ids(shard: ShardEntry, index: Path) -> Ids:
    """Return the id of each row in the files of a shard, ``(rows,)``.

    Args:
        shard: entry of the shard.
        index: its index, which is read only if it holds the ids.

    Raises:
        StoreDamagedError: the index is damaged.
    """
    if shard.first_id is not None:
        return shard.first_id + np.arange(shard.rows, dtype=np.int64)
    ids = read_ids(index)
    if len(ids) != shard.rows:
        raise StoreDamagedError(f"{index} has {plural(len(ids), 'id')}, expected {shard.rows}")
    return ids


def live_ids(shards: Iterable[ShardEntry], locate: Callable[[str], Path]) -> Ids:
    """Return the id of each row that counts, ``(rows,)``, in the order of the rows.

    Args:
        shards: shards of a store.
        locate: returns the path of a file of the store.

    Raises:
        StoreDamagedError: an index is damaged.
    """
    ids = [shard_ids(shard, locate(shard.index.name))[shard.live_mask()] for shard in shards]
    return np.concatenate(ids) if ids else np.empty(0, np.int64)


def read_history(path: Path, manifest: Manifest) -> list[HistoryEntry]:
    """Return the history of a store, oldest first; nothing for a store of version 1.

    Args:
        path: file of the history.
        manifest: manifest of the store.

    Raises:
        StoreDamagedError: the file is missing or damaged.
    """
    if manifest.history is None:
        return []
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StoreDamagedError(f"{path} cannot be read: {error.strerror}") from error
    entries = parse_history(content, str(path))
    # Another digit is still a history, of other ids.
    if hashlib.sha256(content).hexdigest() != manifest.history.sha256:
        raise StoreDamagedError(f"{path} is damaged: its SHA-256 differs from the manifest's")
    return entries


def history_to_continue(out: Path, manifest: Manifest) -> list[HistoryEntry]:
    """Return the history of a store, oldest first; an empty one, with a warning, if it is damaged.

    No row depends on it. Who follows the store does a full sync, as after many runs.
    """
    try:
        return read_history(out / HISTORY, manifest)
    except StoreDamagedError as error:
        _warn_about_history(str(error))
        return []


@functools.cache  # several stages of a run look at the history
def _warn_about_history(error: str) -> None:
    log.warning("%s; the next run that changes the store begins a new history", error)


def history_with(
    before: Manifest, shards: Sequence[ShardEntry], created: str, *, out: Path, staging: Path
) -> list[HistoryEntry]:
    """Return the history of a store that a run extends, with what that run changes.

    Args:
        before: manifest of the store.
        shards: its shards from now on: the same ones, whose rows may count or not, and new ones.
        created: time of the publication.
        out: folder of the store.
        staging: folder of the new files.

    Raises:
        StoreDamagedError: the store is damaged.
    """
    entry = replace(
        _changes(before.shards, shards, out, staging), since=before.checksum, created=created
    )
    return trimmed([*history_to_continue(out, before), entry])


def history_of_same_rows(before: Manifest, created: str, *, out: Path) -> list[HistoryEntry]:
    """Return the history of a store whose rows are written in another order."""
    return trimmed(
        [*read_history(out / HISTORY, before), HistoryEntry.of(before.checksum, created)]
    )


def history_of_new(
    before: Manifest | None, shards: Sequence[ShardEntry], created: str, *, out: Path
) -> list[HistoryEntry]:
    """Return the history of a store that replaces another one, or none.

    Args:
        before: manifest of the store that is replaced; None if there is none, or if it is damaged.
        shards: shards of the new store, which have a first id.
        created: time of the publication.
        out: folder of the store.
    """
    added = live_ids(shards, lambda name: out / name)
    entry = HistoryEntry.of("", created, added=added)
    if before is None:
        return [entry]
    try:
        removed = live_ids(before.shards, lambda name: out / name)
        past = read_history(out / HISTORY, before)
    except StoreDamagedError:
        return [entry]  # a store may be replaced because it is damaged
    return trimmed([*past, replace(entry, since=before.checksum, removed=np.sort(removed))])


def _changes(
    before: Sequence[ShardEntry], after: Sequence[ShardEntry], out: Path, staging: Path
) -> HistoryEntry:
    """Return the entry of a run that extends a store, without token and time."""
    known = {shard.shard: shard for shard in before}
    new_rows: list[tuple[Path, Ids]] = []
    old_rows: list[tuple[Path, Ids]] = []
    moved: list[Ids] = [np.empty(0, np.int64)]
    for shard in after:
        old = known.get(shard.shard)
        if old == shard:
            continue
        published = out / shard.index.name
        is_new = old is None or old.index != shard.index
        index = staging / shard.index.name if is_new else published
        ids = shard_ids(shard, index)
        live = shard.live_mask()
        was_live = np.zeros(shard.rows, bool) if old is None else old.live_mask()
        new_rows.append((index, np.where(live & ~was_live, ids, -1)))
        old_rows.append((published, np.where(was_live & ~live, ids, -1)))
        if old is not None and is_new:
            moved.append(ids[live & was_live & _other_paths(published, index)])
    old_ids = dict(_ids_by_path(old_rows))
    pairs = []
    if old_ids:
        pairs = [(old_ids[p], i) for p, i in _ids_by_path(new_rows) if p in old_ids]
    return HistoryEntry.of(
        "",
        "",
        added=_known(new_rows),
        removed=_known(old_rows),
        moved=np.concatenate(moved),
        changed=pairs,
    )


def _known(parts: Iterable[tuple[Path, Ids]]) -> Ids:
    ids = [part[part >= 0] for _, part in parts]
    return np.concatenate(ids) if ids else np.empty(0, np.int64)


def _ids_by_path(parts: Iterable[tuple[Path, Ids]]) -> Iterator[tuple[bytes, int]]:
    """Yield path and id of the rows of several indexes; an id of -1 leaves a row out."""
    for index, ids in parts:
        mask = ids >= 0
        if mask.any():
            paths = read_images(index, digests=False).paths
            yield from zip(itertools.compress(paths, mask), ids[mask].tolist(), strict=True)


def _other_paths(published: Path, index: Path) -> Mask:
    """Return ``(rows,)``, whether the path of each row differs between two indexes of a shard."""
    before, now = (read_images(path, digests=False).paths for path in (published, index))
    return np.fromiter((a != b for a, b in zip(before, now, strict=True)), bool, len(now))
