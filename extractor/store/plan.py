"""Compare images with existing rows: which rows count, and which images to compute."""

from __future__ import annotations

import enum
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from extractor.paths import find_path, is_ascending, paths_between
from extractor.store.failures import FailureRecord
from extractor.store.index import Images

__all__ = ["Move", "Plan", "Sight", "Snapshot", "StoredImages", "count_unchanged", "plan_run"]

# Failures of the machine. They may not happen again, even with the same file.
TRANSIENT = frozenset({"out-of-memory", "timeout"})
# Failures to open a file. Their cause can go away while size and mtime stay the same.
UNOPENED = frozenset({"unreadable", "not-a-file"})
# Failures for want of a decoder, which may be installed meanwhile. Before there were decoders of
# more formats than Pillow's, their files were recorded as no images.
UNDECODABLE = frozenset({"no-decoder", "not-an-image"})

# A mount that is away looks like deleted images. Where more images than both limits are gone, their
# rows stay until someone confirms: a share that is rarely deleted between two runs, and a number
# below which computing again costs seconds.
LARGE_SHARE = 0.1
MANY_VANISHED = 10


# A shard is looked up in its part of the list if that has at most so many paths per row. Otherwise
# the table of the part would be larger than that of the shard.
DENSE = 4


class Sight(enum.Enum):
    """What a look at a path shows."""

    READABLE = enum.auto()  # a regular file that can be opened
    OTHER = enum.auto()  # a folder, a pipe or a device
    GONE = enum.auto()  # nothing (ENOENT, ENOTDIR)
    UNSEEN = enum.auto()  # unknown: no permission, a stale mount, a disk error
    EXCLUDED = enum.auto()  # unknown, and not wanted: a pattern leaves it out


@dataclass(frozen=True)
class Snapshot:
    """The requested images as they are now.

    Attributes:
        paths: paths relative to the root, strictly ascending.
        sizes: ``(images,)`` int64, bytes; -1 if a file has no status.
        mtimes: ``(images,)`` int64, nanoseconds; -1 if a file has no status.
        look: returns what is at several paths relative to the root, requested or not.
        digests: returns the SHA-256 of the files at several indices, empty for an unreadable one;
            None if no file may be read.
        has_decoder: returns whether the decoder that the image at an index needs beside Pillow is
            installed.
        unlisted: folders whose images could not be listed; empty bytes are the root.
        is_excluded: returns whether a pattern leaves out a path relative to the root.
        check_content: compare all contents, not only where path, size or time is new.
    """

    paths: Sequence[bytes]
    sizes: npt.NDArray[np.int64]
    mtimes: npt.NDArray[np.int64]
    look: Callable[[Sequence[bytes]], Sequence[Sight]]
    digests: Callable[[Sequence[int]], Sequence[bytes]] | None = None
    has_decoder: Callable[[int], bool] = lambda index: False
    unlisted: Sequence[bytes] = ()
    is_excluded: Callable[[bytes], bool] = lambda path: False
    check_content: bool = False


@dataclass(frozen=True)
class StoredImages:
    """Images with rows and failures of a store, published or staged.

    Attributes:
        shards: images of the rows of each shard, by shard number.
        live: by shard number ``(rows,)``, the rows that counted so far; new shards are left out.
        failures: images without a row in the published store.
        new_failures: failures that were found since then; they are not retried.
        vanished: number of rows that were kept so far although their images were gone.
    """

    shards: Mapping[int, Images] = field(default_factory=dict)
    live: Mapping[int, npt.NDArray[np.bool_]] = field(default_factory=dict)
    failures: Sequence[FailureRecord] = ()
    new_failures: Sequence[FailureRecord] = ()
    vanished: int = 0

    def counted(self, shard: int) -> npt.NDArray[np.bool_]:
        """Return ``(rows,)``, whether each row of a shard counted so far."""
        live = self.live.get(shard)
        return np.ones(len(self.shards[shard]), bool) if live is None else live


class Move(NamedTuple):
    """What the index says about a row from now on, since its image was moved or touched.

    Attributes:
        path: path relative to the root.
        size: bytes of the file.
        mtime_ns: modification time of the file.
        is_renamed: the path differs from the one before.
    """

    path: bytes
    size: int
    mtime_ns: int
    is_renamed: bool


@dataclass(frozen=True)
class Plan:
    """Steps after which a store holds each requested image once.

    Attributes:
        todo: indices of the images to compute, ascending.
        live: by shard number ``(rows,)``, the rows that count from now on.
        failures: failures that remain, in the order of their paths.
        missing: paths whose rows or failures are kept although they are not requested, in order.
        gone: number of rows that are retired because their images are not requested.
        changed: number of rows that are retired because their images changed.
        unseen: number of rows that are kept because their images could not be seen.
        vanished: number of rows that are kept although their images are gone, since so many are.
        replaced: shard and row of each requested image whose row is retired, by path.
        kept: paths whose rows are kept although their images failed in this run.
        moves: by shard number and row, the rows that stand for an image of another path or time.
    """

    todo: Sequence[int]
    live: Mapping[int, npt.NDArray[np.bool_]]
    failures: Sequence[FailureRecord]
    missing: Sequence[bytes]
    gone: int
    changed: int
    unseen: int = 0
    vanished: int = 0
    replaced: Mapping[bytes, tuple[int, int]] = field(default_factory=dict)
    kept: frozenset[bytes] = frozenset()
    moves: Mapping[int, Mapping[int, Move]] = field(default_factory=dict)

    @property
    def moved(self) -> int:
        """Number of rows whose images have another path than before."""
        return sum(move.is_renamed for rows in self.moves.values() for move in rows.values())

    def keeping(self, paths: Iterable[bytes]) -> Plan:
        """Return a plan that keeps replaced rows, since their images could not be read.

        Args:
            paths: some of :attr:`replaced`.
        """
        kept = frozenset(paths)
        live = dict(self.live)
        for path in kept:
            shard, row = self.replaced[path]
            live[shard] = live[shard].copy()
            live[shard][row] = True
        return replace(
            self,
            live=live,
            failures=[failure for failure in self.failures if failure.path not in kept],
            changed=self.changed - len(kept),
            unseen=self.unseen + len(kept),
            kept=kept,
        )

    def changes(self, stored: StoredImages) -> bool:
        """Return whether rows, failures or the index differ from those of a published store."""
        return bool(self.moves) or self.changes_rows(stored)

    def changes_rows(self, stored: StoredImages) -> bool:
        """Return whether other rows count, or other failures, than in a published store."""
        same = all(np.array_equal(live, stored.live[shard]) for shard, live in self.live.items())
        same &= list(self.failures) == list(stored.failures)
        return not same or self.vanished != stored.vanished

    @property
    def rows(self) -> int:
        """Number of rows that count before any image is computed."""
        return sum(int(np.count_nonzero(live)) for live in self.live.values())


def plan_run(
    snapshot: Snapshot,
    stored: StoredImages,
    *,
    keep_missing: bool = False,
    retry: bool = False,
    retire: bool = False,
) -> Plan:
    """Compare the requested images with those that have rows.

    A row counts if its image has the same path, size and modification time as when it was read.
    With ``check_content``, it counts if its image has the same path and content. Of several such
    rows, one that counted so far does, then the latest. So an image that disappears and comes back
    unchanged gets its row back.

    Where path, size or time is new, content decides: a row that no image claimed stands for an
    image of the same content, see :func:`_find_moves`.

    Any other row that counted so far is retired only if a look at its path shows that the image
    changed, is there and not requested, or is gone. What could not be seen keeps its row. So does
    what is gone, once that is a large share of the store, until ``retire`` confirms it.

    Args:
        snapshot: the requested images.
        stored: the images of the store.
        keep_missing: keep rows that counted so far although their images are not requested.
        retry: retry all failures, not only those whose file or cause may have changed.
        retire: retire the rows of images that are gone, however many there are.
    """
    matched = _match(snapshot, stored)
    unmatched = list(_unmatched(stored, matched))
    seen = _look(snapshot, matched, unmatched, keep_missing=keep_missing)
    missing: set[bytes] = set()
    for row in unmatched:
        if seen.get(row.path) in (None, Sight.UNSEEN):  # None if nobody had to look
            _keep(row, matched, missing)
    failed = _remaining_failures(snapshot, stored, matched, retry=retry)
    unseen_rows = {row for row in unmatched if row.path not in seen}
    moves = _touched(snapshot, stored, matched)
    for row, move in _find_moves(snapshot, stored, matched, unseen_rows, failed).items():
        if row in unseen_rows:
            missing.discard(row.path)
        moves.setdefault(row.shard, {})[row.row] = move
    open_rows = [row for row in unmatched if not matched.is_settled(row)]
    vanished = {row.path for row in open_rows if seen[row.path] is Sight.GONE}
    if retire or not _are_many(len(vanished), stored):
        vanished = set()
    for row in open_rows:
        if row.path in vanished:
            _keep(row, matched, missing)
    gone, changed = _count_retired(stored, matched)
    failed = {path: f for path, f in failed.items() if not matched.has_row[matched.index_of(path)]}
    unseen = _unseen_failures(snapshot, stored, matched, keep_gone=bool(vanished))
    unseen = {path: failure for path, failure in unseen.items() if path not in missing}
    failed |= unseen
    missing |= unseen.keys()
    return Plan(
        todo=_todo(matched, failed),
        live=matched.live,
        failures=[failed[path] for path in sorted(failed)],
        missing=sorted(missing),
        gone=gone,
        changed=changed,
        unseen=sum(sight is Sight.UNSEEN for sight in seen.values()),
        vanished=len(vanished),
        replaced={
            row.path: (row.shard, row.row)
            for row in open_rows
            if row.index >= 0 and row.path not in vanished
        },
        moves=moves,
    )


def _todo(matched: _Matched, failed: Collection[bytes]) -> Sequence[int]:
    """Return the indices of images without a row, except for those that failed."""
    indices = [matched.index_of(path) for path in failed]
    is_open = ~matched.has_row
    is_open[[i for i in indices if i >= 0]] = False
    return array("q", np.flatnonzero(is_open).astype(np.int64).tobytes())


def _count_retired(stored: StoredImages, matched: _Matched) -> tuple[int, int]:
    """Return how many rows no longer count: of images not requested, and of changed images."""
    gone = changed = 0
    for shard, live in matched.live.items():
        ended = stored.counted(shard) & ~live
        requested = matched.indices[shard] >= 0
        gone += int(np.count_nonzero(ended & ~requested))
        changed += int(np.count_nonzero(ended & requested))
    return gone, changed


def count_unchanged(snapshot: Snapshot, stored: StoredImages) -> tuple[int, int]:
    """Return how many rows that counted so far have an unchanged image, and how many counted.

    Args:
        snapshot: the requested images.
        stored: the images of the store.
    """
    unchanged = total = 0
    for shard, indices in _indices(snapshot, stored).items():
        images, counted = stored.shards[shard], stored.counted(shard)
        same = counted & (indices >= 0) & _are_same(snapshot, images, indices, set())
        unchanged += int(np.count_nonzero(same))
        total += int(np.count_nonzero(counted))
    return unchanged, total


@dataclass(frozen=True)
class _Matched:
    """Requested images and the rows that hold them unchanged.

    Attributes:
        paths: requested paths, ascending.
        indices: by shard number ``(rows,)``, index of the image of each row; -1 if not requested.
        live: by shard number ``(rows,)``, the rows that count.
        has_row: ``(images,)``, whether an image has a row that counts.
        unread: indices of images that should be hashed and could not be read.
    """

    paths: Sequence[bytes]
    indices: dict[int, npt.NDArray[np.int64]]
    live: dict[int, npt.NDArray[np.bool_]]
    has_row: npt.NDArray[np.bool_]
    unread: set[int]

    def index_of(self, path: bytes) -> int:
        """Return the index of a requested path; -1 if it is not requested."""
        return find_path(self.paths, path)

    def is_settled(self, row: _Row) -> bool:
        """Return whether a row counts, or another one stands for its image."""
        has_other = row.index >= 0 and bool(self.has_row[row.index])
        return has_other or bool(self.live[row.shard][row.row])


@dataclass(frozen=True)
class _Row:
    """Row that counted so far, of an image that no row holds unchanged; ``index`` as above."""

    shard: int
    row: int
    path: bytes
    index: int


def _match(snapshot: Snapshot, stored: StoredImages) -> _Matched:
    """Find the row of each requested image that is unchanged at its path."""
    indices_of = _indices(snapshot, stored)
    matched = _Matched(snapshot.paths, indices_of, {}, np.zeros(len(snapshot.paths), bool), set())
    same: dict[int, npt.NDArray[np.bool_]] = {}
    for shard, indices in indices_of.items():
        images = stored.shards[shard]
        same[shard] = (indices >= 0) & _are_same(snapshot, images, indices, matched.unread)
        matched.live[shard] = np.zeros(len(images), bool)
    for counted in (True, False):
        for shard, indices in matched.indices.items():
            rows = np.flatnonzero(same[shard] & (stored.counted(shard) == counted))
            rows = rows[~matched.has_row[indices[rows]]]
            # Several rows of a shard may have had the same path, one after the other.
            rows = rows[np.unique(indices[rows], return_index=True)[1]]
            matched.live[shard][rows] = True
            matched.has_row[indices[rows]] = True
    return matched


def _indices(snapshot: Snapshot, stored: StoredImages) -> dict[int, npt.NDArray[np.int64]]:
    """Return by shard number ``(rows,)``, the index of each row's image; -1 if not requested.

    The last shard comes first. Most shards hold the images of a part of the list. Their paths are
    looked up there, those of all others together, so that no table holds all paths.
    """
    found: dict[int, npt.NDArray[np.int64]] = {}
    scattered: dict[bytes, int] = {}
    for shard, images in sorted(stored.shards.items(), reverse=True):
        found[shard] = np.empty(0, np.int64)
        if len(images):
            part = paths_between(snapshot.paths, *_ends(images.paths))
            if len(part) <= DENSE * len(images):
                found[shard] = _indices_in_part(snapshot.paths, part, images)
            else:
                scattered.update(dict.fromkeys(images.paths, -1))
    if not scattered:
        return found
    for i, path in enumerate(snapshot.paths):
        if path in scattered:
            scattered[path] = i
    for shard, images in stored.shards.items():
        if len(images) and not len(found[shard]):
            found[shard] = np.fromiter(map(scattered.__getitem__, images.paths), np.int64)
    return found


def _ends(paths: Sequence[bytes]) -> tuple[bytes, bytes]:
    """Return the first and the last path by their bytes."""
    return (paths[0], paths[-1]) if is_ascending(paths) else (min(paths), max(paths))


def _indices_in_part(paths: Sequence[bytes], part: range, images: Images) -> npt.NDArray[np.int64]:
    """Return ``(rows,)``, the index of each image among some of the paths; -1 if not there."""
    listed = paths[part.start : part.stop]
    if images.paths == listed:
        return np.arange(part.start, part.stop, dtype=np.int64)
    index = dict(zip(listed, part, strict=True))
    return np.fromiter((index.get(path, -1) for path in images.paths), np.int64, len(images))


def _keep(row: _Row, matched: _Matched, missing: set[bytes]) -> None:
    """Keep a row although its image was not found unchanged."""
    matched.live[row.shard][row.row] = True
    if row.index >= 0:
        matched.has_row[row.index] = True
    else:
        missing.add(row.path)


def _touched(
    snapshot: Snapshot, stored: StoredImages, matched: _Matched
) -> dict[int, dict[int, Move]]:
    """Return the rows whose images have the same path and content, but another time."""
    moves: dict[int, dict[int, Move]] = {}
    if not snapshot.check_content or not len(snapshot.paths):
        return moves
    for shard, images in stored.shards.items():
        indices = matched.indices[shard]
        touched = (indices >= 0) & (snapshot.mtimes[indices] != images.mtimes)
        # Kept rows of images that could not be read are live, too.
        touched &= matched.live[shard] & (snapshot.sizes[indices] == images.sizes)
        touched &= np.array([i not in matched.unread for i in indices.tolist()], bool)
        if touched.any():
            moves[shard] = {
                row: _move(snapshot, int(indices[row]), images.paths[row])
                for row in np.flatnonzero(touched).tolist()
            }
    return moves


def _find_moves(
    snapshot: Snapshot,
    stored: StoredImages,
    matched: _Matched,
    unseen: Collection[_Row],
    failed: Collection[bytes],
) -> dict[_Row, Move]:
    """Let rows that no image claimed stand for images of the same content.

    Such a row had counted until its image was renamed, touched, changed or deleted, or it was
    retired earlier. The same path is preferred, then a row that counted so far, then the latest
    shard. Only files are read whose size is that of such a row.

    Args:
        snapshot: the requested images.
        stored: the images of the store.
        matched: the rows that count; those found here are added.
        unseen: rows that are kept without a look; they may stand for another image if theirs is
            gone.
        failed: paths of images that need no row.
    """
    if not unseen and all(live.all() for live in matched.live.values()):
        return {}
    open_images = np.flatnonzero(~matched.has_row & (snapshot.sizes >= 0)).tolist()
    open_images = [i for i in open_images if snapshot.paths[i] not in failed]
    if snapshot.digests is None or not open_images:
        return {}
    rows = _unclaimed(snapshot, stored, matched, np.unique(snapshot.sizes[open_images]), unseen)
    sizes = {int(stored.shards[row.shard].sizes[row.row]) for row in rows}
    images = [i for i in open_images if int(snapshot.sizes[i]) in sizes]
    fitting: dict[tuple[int, bytes, bytes | None], list[_Row]] = {}  # by size, content and path
    for row in reversed(rows) if images else ():
        shard = stored.shards[row.shard]
        size, digest = int(shard.sizes[row.row]), shard.digests[row.row]
        for path in (row.path, None) if digest else ():
            fitting.setdefault((size, digest, path), []).append(row)
    digests = snapshot.digests(images) if fitting else []
    found: dict[_Row, Move] = {}
    for same_path in (True, False):
        for i, digest in zip(images, digests, strict=bool(fitting)):
            path = snapshot.paths[i]
            key = int(snapshot.sizes[i]), digest, path if same_path else None
            candidates = fitting.get(key, [])
            while candidates and not matched.has_row[i]:
                row = candidates.pop()
                if row not in found:
                    matched.live[row.shard][row.row] = matched.has_row[i] = True
                    found[row] = _move(snapshot, i, row.path)
    return found


def _unclaimed(
    snapshot: Snapshot,
    stored: StoredImages,
    matched: _Matched,
    sizes: npt.NDArray[np.int64],
    unseen: Collection[_Row],
) -> list[_Row]:
    """Return the rows of files of certain sizes that no image claimed, preferred ones first."""
    rows = [row for row in unseen if stored.shards[row.shard].sizes[row.row] in sizes]
    sights = snapshot.look([row.path for row in rows])
    rows = [row for row, sight in zip(rows, sights, strict=True) if sight is Sight.GONE]
    ended: list[_Row] = []
    for shard, images in stored.shards.items():
        counted = stored.counted(shard)
        free = ~matched.live[shard] & np.isin(images.sizes, sizes)
        for row in np.flatnonzero(free).tolist():
            index = int(matched.indices[shard][row])
            (rows if counted[row] else ended).append(_Row(shard, row, images.paths[row], index))
    return [row for some in (rows, ended) for row in sorted(some, key=lambda r: (-r.shard, r.row))]


def _move(snapshot: Snapshot, i: int, before: bytes) -> Move:
    path = snapshot.paths[i]
    return Move(path, int(snapshot.sizes[i]), int(snapshot.mtimes[i]), path != before)


def _unmatched(stored: StoredImages, matched: _Matched) -> Iterator[_Row]:
    """Yield the latest row that counted so far of each image that no row holds unchanged."""
    paths: set[bytes] = set()
    for shard, images in sorted(stored.shards.items(), reverse=True):
        indices = matched.indices[shard]
        ended = stored.counted(shard) & ~matched.live[shard]
        requested = indices >= 0
        ended[requested] &= ~matched.has_row[indices[requested]]
        for row in np.flatnonzero(ended).tolist():
            path = images.paths[row]
            if path not in paths:
                paths.add(path)
                yield _Row(shard, row, path, int(indices[row]))


def _look(
    snapshot: Snapshot, matched: _Matched, rows: Sequence[_Row], *, keep_missing: bool
) -> dict[bytes, Sight]:
    """Return what is at the paths of rows; rows that are kept anyway are left out."""
    seen: dict[bytes, Sight] = {}
    open_rows = []
    for row in rows:
        if row.index < 0 and _is_below(row.path, snapshot.unlisted):
            seen[row.path] = Sight.UNSEEN
        elif row.index < 0 and not keep_missing and snapshot.is_excluded(row.path):
            seen[row.path] = Sight.EXCLUDED
        elif row.index >= 0 or not keep_missing:
            open_rows.append(row)
    sights = snapshot.look([row.path for row in open_rows])
    for row, sight in zip(open_rows, sights, strict=True):
        is_unread = sight is Sight.READABLE and row.index in matched.unread
        seen[row.path] = Sight.UNSEEN if is_unread else sight
    return seen


def _are_many(vanished: int, stored: StoredImages) -> bool:
    """Return whether so many images are gone that their rows stay, or did so far.

    Rows that stayed once stay, although a store that grows makes them a smaller share.
    """
    counted = sum(int(np.count_nonzero(stored.counted(shard))) for shard in stored.shards)
    return stored.vanished > 0 or vanished > max(MANY_VANISHED, LARGE_SHARE * counted)


def _is_below(path: bytes, folders: Sequence[bytes]) -> bool:
    return any(not folder or path.startswith(folder + b"/") for folder in folders)


def _remaining_failures(
    snapshot: Snapshot, stored: StoredImages, matched: _Matched, *, retry: bool
) -> dict[bytes, FailureRecord]:
    """Return the failures of requested images that are not retried, by path."""
    remaining: dict[bytes, FailureRecord] = {}
    for failures, are_new in ((stored.failures, False), (stored.new_failures, True)):
        for failure in failures:
            i = matched.index_of(failure.path)
            if i < 0 or matched.has_row[i] or not _is_same_file(failure, snapshot, i):
                continue
            if are_new or not (retry or _may_be_over(failure, snapshot, i)):
                remaining[failure.path] = failure
    return remaining


def _unseen_failures(
    snapshot: Snapshot, stored: StoredImages, matched: _Matched, *, keep_gone: bool
) -> dict[bytes, FailureRecord]:
    """Return the failures of images that are not requested, but could not be seen either."""
    failures = {
        failure.path: failure
        for failure in (*stored.failures, *stored.new_failures)
        if matched.index_of(failure.path) < 0 and not snapshot.is_excluded(failure.path)
    }
    kept = {Sight.UNSEEN, Sight.GONE} if keep_gone else {Sight.UNSEEN}
    sights = snapshot.look(list(failures))
    return {
        path: failure
        for (path, failure), sight in zip(failures.items(), sights, strict=True)
        if sight in kept or _is_below(path, snapshot.unlisted)
    }


def _are_same(
    snapshot: Snapshot, images: Images, indices: npt.NDArray[np.int64], unread: set[int]
) -> npt.NDArray[np.bool_]:
    """Return ``(rows,)``, whether each image is still the one its row was computed from."""
    if not len(snapshot.paths):
        return np.zeros(len(images), bool)
    if not snapshot.check_content or snapshot.digests is None:
        same: npt.NDArray[np.bool_] = (snapshot.sizes[indices] == images.sizes) & (
            snapshot.mtimes[indices] == images.mtimes
        )
        return same
    rows = np.flatnonzero(indices >= 0)
    digests = snapshot.digests([int(i) for i in indices[rows]])
    same = np.zeros(len(images), bool)
    for row, digest in zip(rows.tolist(), digests, strict=True):
        same[row] = digest != b"" and digest == images.digests[row]
        if not digest:
            unread.add(int(indices[row]))
    return same


def _is_same_file(failure: FailureRecord, snapshot: Snapshot, i: int) -> bool:
    return (int(snapshot.sizes[i]), int(snapshot.mtimes[i])) == (failure.size, failure.mtime_ns)


def _may_be_over(failure: FailureRecord, snapshot: Snapshot, i: int) -> bool:
    if failure.reason in UNOPENED:
        (sight,) = snapshot.look([failure.path])
        return sight is Sight.READABLE
    if failure.reason in UNDECODABLE:
        return snapshot.has_decoder(i)
    return failure.reason in TRANSIENT
