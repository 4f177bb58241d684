"""Writes a store beside its place and publishes it whole: files first, the manifest last."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from extractor.errors import StoreError
from extractor.store.atomic import describe, sync_folder, undisturbed, write_whole
from extractor.store.format import (
    FAILURES,
    FEATURES,
    IMAGES,
    IN_FLIGHT,
    JOB,
    JOURNAL,
    MANIFEST,
    MAX_SHARDS,
    REPLACED,
    STAGING,
    SUSPECTS,
    Description,
    Manifest,
    ShardEntry,
    images_name,
    ranges,
)
from extractor.store.index import Images, read_images
from extractor.store.journal import FailureRecord
from extractor.store.lock import Lock
from extractor.store.plan import Held, Plan
from extractor.store.publish import check_place, clear, explained, recover
from extractor.store.shard import FinishedShard, ShardWriter, journal_name

__all__ = ["Before", "Job", "StoreWriter", "failure_lines", "published", "read_failures"]


@dataclass(frozen=True)
class Before:
    """What a run finds in its place.

    Attributes:
        computation: how the rows were computed, as a manifest says it.
        images: that a finished store answers for.
        is_interrupted: a run is there that did not come to its end.
    """

    computation: Mapping[str, Any]
    images: int
    is_interrupted: bool


@dataclass(frozen=True)
class Job:
    """What a run has to compute; one that is the same goes on where an interrupted one stopped.

    Attributes:
        images: how many there are.
        listing: digest of their paths, :func:`extractor.store.format.listing_digest`.
        first: number of the first shard that they come to.
        base: checksum of the manifest that is extended; empty where none is.
    """

    description: Description
    images: int
    listing: str
    first: int = 0
    base: str = ""

    def __post_init__(self) -> None:
        if self.first + -(-self.images // self.description.shard_images) > MAX_SHARDS:
            raise StoreError(
                f"{self.images} images in shards of {self.description.shard_images}, behind the "
                f"{self.first} that are there, are more than {MAX_SHARDS} shards; use a larger "
                "--shard-images, or extract compact"
            )

    def to_json(self) -> str:
        """The text of ``job.json``."""
        own = {"images": self.images, "listing": self.listing, "first": self.first}
        content = {**asdict(self.description), **own, "base": self.base}
        return json.dumps(content, ensure_ascii=True) + "\n"

    @classmethod
    def from_json(cls, text: bytes) -> Job:
        """What :meth:`to_json` wrote.

        Raises:
            ValueError, KeyError, TypeError: something else.
        """
        content = json.loads(text)
        described = {key: content[key] for key in Description.__dataclass_fields__}
        own = [content[key] for key in ("images", "listing", "first", "base")]
        return cls(Description(**described), *own)

    def images_of(self, shard: int) -> int:
        """How many images come to one of its shards."""
        size = self.description.shard_images
        return min(max(self.images - (shard - self.first) * size, 0), size)


class StoreWriter:
    """Builds one store in a hidden folder inside its place; :meth:`publish` makes it visible.

    A context manager: entering claims the place. Leaving without :meth:`publish` gives it up as it
    was, or, after :meth:`begin`, keeps what was done for the next run of the same job. Nothing that
    is there is touched before the new store is complete.

    Args:
        out: folder of the store; made where it is not there.
        overwrite: a finished store in ``out`` may be replaced, and an interrupted run thrown away.
        extend: a finished store in ``out`` may be extended.
        lock: refuse where files cannot be locked.

    Raises:
        StoreError: ``out`` cannot be written, is in use, or holds something else.
    """

    def __init__(
        self, out: Path, *, overwrite: bool = False, extend: bool = False, lock: bool = True
    ) -> None:
        self._out = out
        self._overwrite = overwrite
        self._occupied = overwrite or extend
        self._staging = out / STAGING
        self._lock = Lock(self._staging / "lock", required=lock)
        self._made: list[Path] = []  # folders that were not there before
        self._prepared = False
        self._keep = False
        self._finished: dict[int, FinishedShard] = {}
        self._staged: Job | None = None
        self._sealed = False
        self._base: Manifest | None = None

    def __enter__(self) -> StoreWriter:
        check_place(self._out, occupied=self._occupied)
        with explained(self._out):
            try:
                self._make_folders()
                self._lock.__enter__()
            except BaseException:
                self._unmake_folders()
                raise
            try:
                recover(self._out)
                check_place(self._out, occupied=self._occupied)
            except BaseException:
                self._give_up()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self._give_up()

    # -- what is there

    def take_up(self, description: Description) -> None:
        """See what is there of the store that a description speaks of.

        Raises:
            StoreError: a finished store or an interrupted run of something else is there, and
                ``overwrite`` is not set; says what differs.
        """
        with explained(self._out):
            if not self._overwrite and (self._out / MANIFEST).is_file():
                name = self._out / MANIFEST
                self._base = Manifest.from_json(name.read_bytes(), str(name))
                self._check_same(self._base.description, description, "a finished store of")
            staged = self._staged_job()
            if staged is None:
                return
            base = self._base.checksum if self._base is not None else ""
            if self._overwrite and (staged.base or staged.description.differences(description)):
                return
            self._check_same(staged.description, description, "an interrupted run of")
            if staged.base != base:
                raise StoreError(
                    f"{self._out} holds an interrupted run that does not extend the store that is "
                    f"there; repeat it with --overwrite, or give it up: rm -r {self._staging}"
                )
            self._staged = staged
            self._prepared = self._keep = True
            self._load_finished()

    def _check_same(self, there: Description, now: Description, what: str) -> None:
        differ = there.differences(now)
        if differ:
            raise StoreError(
                f"{self._out} holds {what} something else ({'; '.join(differ[:5])}); repeat what "
                "it was asked for, start anew with --overwrite, or choose another --out"
            )

    def before(self, description: Description) -> Before | None:
        """What is there already and will be kept; None where nothing is.

        Args:
            description: of what comes; what it says of the computation does not count.

        Raises:
            StoreError: the store that is there cannot be read.
        """
        with explained(self._out):
            staged = self._staged_job()
            if staged is not None and not (
                self._overwrite
                and (staged.base or _made_otherwise(staged.description, description))
            ):
                return Before(staged.description.computation, 0, is_interrupted=True)
            if self._overwrite or not (self._out / MANIFEST).is_file():
                return None
            name = self._out / MANIFEST
            manifest = Manifest.from_json(name.read_bytes(), str(name))
            return Before(manifest.description.computation, manifest.images, is_interrupted=False)

    @property
    def out(self) -> Path:
        """Folder of the store."""
        return self._out

    @property
    def staging(self) -> Path:
        """Where what is done is kept until it is published."""
        return self._staging

    @property
    def base(self) -> Manifest | None:
        """Of the finished store that is extended."""
        return self._base

    @property
    def has_staged(self) -> bool:
        """Whether an interrupted run has left something to go on with."""
        return self._staged is not None

    def held(self, *, planned: bool, digests: bool) -> Held:
        """What has been computed so far, published or staged.

        Args:
            planned: also what an interrupted run has done of what it had to compute last.
            digests: those of the files, too.
        """
        shards: dict[int, Images] = {}
        live: Mapping[int, npt.NDArray[np.bool_]] = {}
        failures: Sequence[FailureRecord] = ()
        new_failures: list[FailureRecord] = []
        with explained(self._out):
            if self._base is not None:
                there = published(self._out, self._base, digests=digests)
                shards |= there.shards
                live, failures = there.live, there.failures
            first = self._staged.first if self._staged is not None else 0
            for number, one in sorted(self._finished.items()):
                if planned or number < first or self._sealed:
                    new_failures.extend(one.failures)
                    if one.entry is not None:
                        index = self._staging / images_name(number)
                        shards[number] = read_images(index, digests=digests)
            if planned and (shard := self._in_progress()) is not None:
                with shard:
                    shards[self._next_shard()] = Images.of(
                        [record for entry in shard.entries for record in entry.records]
                    )
                    new_failures.extend(f for entry in shard.entries for f in entry.failures)
        return Held(shards, live, failures, new_failures)

    def done_of(self, job: Job) -> int | None:
        """How many images of a job, from the first on, an interrupted run has done.

        None where that was another job, or its shards are not the beginning of this one.
        """
        if self._staged is None or self._sealed:
            return None
        if replace(self._staged, description=job.description) != job:
            return None
        done = 0
        planned = [one for number, one in sorted(self._finished.items()) if number >= job.first]
        for number, finished in enumerate(planned, job.first):
            if (finished.shard, finished.images) != (number, job.images_of(number)):
                return None
            done += finished.images
        with explained(self._out):
            shard = self._in_progress()
            if shard is None:
                return done
            number = self._next_shard()
            with shard:
                if shard.images > job.images_of(number):
                    return None
                if shard.images and shard.images == job.images_of(number):
                    shard.finish()  # the run died before it could
            return done + shard.images

    def seal(self) -> None:
        """Keep what an interrupted run has done for good: what is left is planned anew."""
        with explained(self._out):
            if (shard := self._in_progress()) is not None:
                with shard:
                    if shard.images:
                        shard.finish()
                    else:
                        shard.discard()
        self._sealed = True

    def begin(self, job: Job) -> None:
        """Begin what is to be computed, behind what is there already, if anything is."""
        with explained(self._out):
            if not self._prepared:
                self._finished.clear()
                self._start_anew()
            write_whole(self._staging / JOB, job.to_json().encode())
            sync_folder(self._staging)
            self._staged = job
            self._sealed = False
            self._keep = True

    @property
    def first_shard(self) -> int:
        """The number of the first shard of what is to be computed."""
        if self._staged is not None and not self._sealed:
            return self._staged.first
        base = self._base.next_shard if self._base is not None else 0
        return max(base, self._next_shard())

    # -- what is added

    def discard(self) -> None:
        """Keep nothing of what was done: going on there would come to the same end."""
        self._keep = False

    def is_finished(self, number: int) -> bool:
        """Whether shard ``number`` is done."""
        return number in self._finished

    def shard(self, number: int, description: Description) -> ShardWriter:
        """Begin shard ``number``, or go on with it; it counts once it has been finished."""
        with explained(self._out):
            if not self._prepared:
                self._start_anew()
            return ShardWriter(self._staging, number, description, self._finished)

    def publish(self, job: Job, plan: Plan | None = None, *, listing: str = "") -> Manifest:
        """Complete the store, make it visible and return its manifest.

        Args:
            plan: what of that which was there before goes on counting.
            listing: digest of all paths of the store; that of the job where it is all of them.
        """
        with explained(self._out):
            if not self._prepared:
                self._start_anew()
            manifest = self._manifest(job, plan, listing or job.listing)
            for folder in (self._staging / FEATURES, self._staging / IMAGES):
                sync_folder(folder)
            check_place(self._out, occupied=self._occupied)
            with undisturbed():
                # From here on the new store is complete: if this run dies, the next finishes it.
                write_whole(self._staging / MANIFEST, manifest.to_json().encode())
                sync_folder(self._staging)
                recover(self._out)
                self._made.clear()
                self._keep = False
                self._give_up()
        return manifest

    def _manifest(self, job: Job, plan: Plan | None, listing: str) -> Manifest:
        finished = [one for _, one in sorted(self._finished.items())]
        base = self._base.shards if self._base is not None else ()
        new = [one.entry for one in finished if one.entry is not None]
        shards = [_still_live(entry, plan) for entry in (*base, *new)]
        failures = list(plan.failures) if plan is not None else []
        failures += [f for one in finished if one.shard >= job.first for f in one.failures]
        write_whole(self._staging / FAILURES, failure_lines(sorted(failures)))
        rows = sum(shard.live_rows for shard in shards)
        return Manifest(
            job.description,
            rows + len(failures),
            listing,
            rows,
            tuple(shard for shard in shards if shard.live_rows),
            describe(self._staging / FAILURES, FAILURES),
            datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )

    # -- what is staged

    def _start_anew(self) -> None:
        clear(self._staging)
        for name in (FEATURES, IMAGES, JOURNAL):
            (self._staging / name).mkdir()
        self._prepared = True

    def _staged_job(self) -> Job | None:
        """What an interrupted run was asked for; None where there was none, or it left nothing."""
        try:
            return Job.from_json((self._staging / JOB).read_bytes())
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):  # it died before it had begun
            return None

    def _load_finished(self) -> None:
        for name in (FEATURES, IMAGES, JOURNAL):
            (self._staging / name).mkdir(exist_ok=True)
        for path in sorted((self._staging / JOURNAL).glob("*.done")):
            finished = FinishedShard.from_json(path.read_bytes())
            if finished.is_whole(self._staging):
                self._finished[finished.shard] = finished
        # Where a finished shard is lost after all, it is that which goes on, and not one behind it.
        going_on = Path(journal_name(self._next_shard())).name
        for path in (self._staging / JOURNAL).glob("*.jsonl"):
            if path.name > going_on:
                path.unlink()

    def _next_shard(self) -> int:
        first = self._staged.first if self._staged is not None else 0
        return max(max(self._finished, default=-1) + 1, first)

    def _in_progress(self) -> ShardWriter | None:
        number = self._next_shard()
        if self._staged is None or not (self._staging / journal_name(number)).exists():
            return None
        return ShardWriter(self._staging, number, self._staged.description, self._finished)

    def _has_work(self) -> bool:
        journals = (self._staging / JOURNAL).glob("*.jsonl")
        return bool(self._finished) or any(path.stat().st_size for path in journals)

    # -- the place

    def _make_folders(self) -> None:
        missing = []
        folder = self._staging
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another run was quicker
                folder.mkdir()
                self._made.append(folder)

    def _unmake_folders(self) -> None:
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):  # not empty: someone else uses it by now
                folder.rmdir()

    def _give_up(self) -> None:
        with contextlib.suppress(OSError):  # what is left is cleared by the next run
            # The next run publishes what is complete, and removes what was replaced.
            complete = any((self._staging / name).is_file() for name in (MANIFEST, REPLACED))
            staged = not self._prepared and self._staged_job() is not None
            suspects = any((self._staging / name).is_file() for name in (SUSPECTS, IN_FLIGHT))
            known = self._has_work() or suspects
            if complete or staged or (self._keep and known):
                self._lock.__exit__()
                return
            clear(self._staging)
            (self._staging / "lock").unlink(missing_ok=True)
            self._staging.rmdir()
        self._lock.__exit__()
        self._unmake_folders()


def _made_otherwise(one: Description, other: Description) -> bool:
    """Whether they differ in more than the computation."""
    return any(not each.startswith("computation.") for each in one.differences(other))


def _still_live(entry: ShardEntry, plan: Plan | None) -> ShardEntry:
    live = plan.live.get(entry.shard) if plan is not None else None
    return entry if live is None else replace(entry, retired=ranges(~live))


def published(out: Path, manifest: Manifest, *, digests: bool) -> Held:
    """What a finished store holds.

    Args:
        digests: those of the files, too.
    """
    indexes = {one.shard: out / one.index.name for one in manifest.shards}
    return Held(
        {shard: read_images(path, digests=digests) for shard, path in indexes.items()},
        {one.shard: one.live_mask() for one in manifest.shards},
        read_failures(out / FAILURES),
    )


def failure_lines(failures: Iterable[FailureRecord]) -> bytes:
    """The content of ``failures.jsonl``."""
    lines = []
    for failure in failures:
        entry = {
            "path": os.fsdecode(failure.path),
            "error": failure.reason,
            "message": failure.message,
            "size": failure.size,
            "mtime_ns": failure.mtime_ns,
        }
        lines.append(json.dumps(entry, ensure_ascii=True) + "\n")
    return "".join(lines).encode("ascii")


def read_failures(path: Path) -> list[FailureRecord]:
    """What :func:`failure_lines` made.

    Raises:
        StoreError: something else.
    """
    keys = ("error", "message", "size", "mtime_ns")
    try:
        entries = [json.loads(line) for line in path.read_bytes().splitlines()]
        return [
            FailureRecord(os.fsencode(one["path"]), *(one[key] for key in keys)) for one in entries
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is damaged: {error}") from error
