"""Write a store: a value for each state of a run, from the claimed folder to the published store.

:func:`take_up` turns a claimed folder into one of two values:

- :class:`ExistingStore`: a finished store, or none. ``begin`` makes it a :class:`StoreRun`.
- :class:`InterruptedRun`: a run that did not end. ``resume`` makes it a :class:`StoreRun` if the
  job is the same; ``seal`` makes it an :class:`ExistingStore` that includes its finished rows.

Only a :class:`StoreRun` writes shards, and only it can publish.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from extractor.errors import StoreDamagedError, StoreError
from extractor.store.atomic import ignore_signals, store_errors, sync_folder, write_atomically
from extractor.store.claim import ClaimedFolder, SharedFolder
from extractor.store.failures import FailureRecord, failure_lines, read_failures
from extractor.store.format import (
    FAILURES,
    FEATURES,
    HISTORY,
    IMAGES,
    JOB,
    JOURNAL,
    LIST_ROWS,
    MANIFEST,
    DamagedManifestError,
    Description,
    Difference,
    FileEntry,
    Manifest,
    ShardEntry,
    images_name,
    ranges,
)
from extractor.store.history import history_lines
from extractor.store.ids import (
    history_of_new,
    history_of_same_rows,
    history_to_continue,
    history_with,
    id_after_damage,
)
from extractor.store.index import (
    Images,
    index_bytes,
    read_ids,
    read_images,
    read_records,
    rows_of_paths,
)
from extractor.store.job import Job
from extractor.store.plan import Move, Plan, StoredImages
from extractor.store.publish import check_size, publish_staged
from extractor.store.shard import (
    FinishedShard,
    ShardWriter,
    clear_attempts,
    done_name,
    finished_shards,
)

__all__ = [
    "ExistingComputation",
    "ExistingStore",
    "InterruptedRun",
    "StoreRun",
    "check_extendable",
    "existing_computation",
    "has_rows_of_list",
    "join",
    "published_images",
    "rewrite",
    "take_up",
]

DIFFERENCES_SHOWN = 5
# Flags whose value a description records as it is typed.
FLAGS = {
    "computation.batch_size": "--batch-size",
    "computation.decode": "--decode",
    "computation.device": "--device",
    "computation.precision": "--precision",
    "embedding.augment": "--augment",
    "embedding.dtype": "--dtype",
    "embedding.normalized": "--normalize",
    "embedding.scales": "--scales",
    "shard_images": "--shard-images",
}


@dataclass(frozen=True)
class ExistingComputation:
    """How the rows that a run keeps were computed.

    Attributes:
        computation: the manifest's ``computation``.
        images: number of images in the finished store.
        shard_images: number of images in one shard.
        is_interrupted: the rows belong to an interrupted run.
    """

    computation: Mapping[str, Any]
    images: int
    shard_images: int
    is_interrupted: bool


def existing_computation(
    claim: ClaimedFolder | SharedFolder, description: Description
) -> ExistingComputation | None:
    """Return how existing rows were computed that a run would keep; None if there are none.

    Args:
        claim: the output folder.
        description: description of the new rows; its ``computation`` is ignored, and its
            ``shard_images`` is 0 if nobody chose one.

    Raises:
        StoreError: the existing store cannot be read.
    """
    with store_errors(claim.out):
        job = claim.staged_job()
        if job is not None and not (
            claim.overwrite and (job.base or _differ_elsewhere(job.description, description))
        ):
            before = job.description
            return ExistingComputation(
                before.computation, 0, before.shard_images, is_interrupted=True
            )
        if claim.overwrite or not (claim.out / MANIFEST).is_file():
            return None
        manifest = Manifest.read(claim.out / MANIFEST)
        before = manifest.description
        return ExistingComputation(
            before.computation, manifest.images, before.shard_images, is_interrupted=False
        )


def _differ_elsewhere(description: Description, other: Description) -> bool:
    """Return whether two descriptions differ in more than the computation."""
    may_differ = ("computation.", *(() if other.shard_images else ("shard_images",)))
    return description.root != other.root or any(
        not difference.key.startswith(may_differ) for difference in description.differences(other)
    )


def take_up(claim: ClaimedFolder, description: Description) -> ExistingStore | InterruptedRun:
    """Read the store or the interrupted run in a claimed folder.

    Args:
        claim: the output folder.
        description: description of the requested store.

    Raises:
        StoreError: the folder holds something else, and ``overwrite`` is not set; names what
            differs.
    """
    with store_errors(claim.out):
        base = None
        if not claim.overwrite and (claim.out / MANIFEST).is_file():
            base = Manifest.read(claim.out / MANIFEST)
            _check_same(claim, base.description, description, "a finished store")
        replaced, first_id = _replaced(claim) if base is None else (None, base.next_id)
        first_shard = base.next_shard if base is not None else 0
        existing = ExistingStore(claim, base, first_shard, first_id, replaced=replaced)
        job = claim.staged_job()
        if job is None:
            return existing
        if claim.overwrite and (job.base or _is_other_work(job.description, description)):
            return existing
        _check_same(claim, job.description, description, "an interrupted run")
        if job.base != (base.checksum if base is not None else ""):
            raise StoreError(
                f"{claim.out} holds an interrupted run that does not extend its store; start over "
                f"with --overwrite, or discard the run: rm -r {claim.staging}"
            )
        claim.keep_work()
        if job.first_id is None:  # version 1 of the format began the run
            before = (job.first - first_shard) * description.shard_images
            job = replace(job, first_id=first_id + before)
        for name in (FEATURES, IMAGES, JOURNAL):
            (claim.staging / name).mkdir(exist_ok=True)
        finished, unfinished = clear_attempts(claim.staging)
        begun = [number for number in unfinished if number >= job.first]
        return InterruptedRun(claim, base, job, finished, begun, replaced=replaced)


def join(claim: ClaimedFolder | SharedFolder, description: Description) -> StoreRun:
    """Return the run in a folder to compute some of its shards, and change nothing.

    Args:
        claim: the output folder.
        description: description of the requested store.

    Raises:
        StoreError: there is no such run; names what differs.
    """
    with store_errors(claim.out):
        job = claim.staged_job()
        if job is None or job.first_id is None:
            raise StoreError(f"{claim.out} holds no run to join; run the same command again")
        _check_same(claim, job.description, description, "a run")
        base = Manifest.read(claim.out / MANIFEST) if job.base else None
        replaced = None if base is not None else _replaced(claim)[0]
        finished = finished_shards(claim.staging)
        return StoreRun(claim, job, base, finished, replaced=replaced)


def _replaced(claim: ClaimedFolder | SharedFolder) -> tuple[Manifest | None, int]:
    """Return the manifest of a store that is replaced, if it can be read, and the next id."""
    try:
        manifest = Manifest.read(claim.out / MANIFEST)
    except FileNotFoundError:
        return None, 0
    except DamagedManifestError:
        return None, id_after_damage()
    return manifest, manifest.next_id


def _is_other_work(description: Description, other: Description) -> bool:
    """Return whether a run that starts over should not resume an interrupted one."""
    return bool(description.differences(other)) or description.root != other.root


def _check_same(
    claim: ClaimedFolder | SharedFolder, old: Description, new: Description, kind: str
) -> None:
    if new.transform is None:
        check_extendable(claim.out, old)
    differences = old.differences(new)
    if not differences:
        return
    shown = "; ".join(map(str, differences[:DIFFERENCES_SHOWN]))
    of, repeat = "of something else", "repeat the earlier command"
    arguments = [_argument(difference) for difference in differences]
    source = _renamed_source(old, new)
    if source and all(difference.key.startswith("preprocess.") for difference in differences):
        repeat = f"give the file of the weights its earlier name, {source}, which sets the pixels"
    if all(arguments):
        of, repeat = "made with other options", f"extend it {', '.join(arguments)}"
    raise StoreError(
        f"{claim.out} holds {kind} {of} ({shown}); {repeat}, replace it with --overwrite, or "
        "choose another --out"
    )


def check_extendable(out: Path, description: Description) -> None:
    """Check that the rows of a store are embeddings of images, not of another store.

    Raises:
        StoreError: A transform made them.
    """
    if description.transform is not None:
        source = description.transform["source"]["store"]
        raise StoreError(
            f"{out} holds rows that a transform made from {source}; extend that store "
            "and run extract transform again, replace this one with --overwrite, or "
            "choose another --out"
        )


def _renamed_source(old: Description, new: Description) -> str:
    """Return the earlier name of the file of the weights; empty if it is the same now."""
    names = [str(side.backbone.get("source") or "").rpartition("/")[2] for side in (old, new)]
    return names[0] if names[0] != names[1] else ""


def _argument(difference: Difference) -> str:
    """Return how to ask for the earlier value: ``with --dtype float16``; empty if no flag can."""
    flag, value = FLAGS.get(difference.setting, ""), difference.before
    if isinstance(value, bool) or value is None:
        return flag and f"{'with' if value else 'without'} {flag}"
    if difference.setting == "embedding.scales":
        return f"with {flag} {','.join(f'{scale:g}' for scale in value)}"
    is_one_word = str(value).isalnum()  # the precision of joined backbones is none
    return f"with {flag} {value}" if flag and is_one_word else ""


@dataclass(frozen=True)
class ExistingStore:
    """State before a run: the rows that exist, and nothing planned.

    Attributes:
        claim: the output folder.
        base: manifest of the finished store; None if there is none.
        first_shard: number of the first shard of the next run.
        first_id: id of the first row of that shard.
        sealed: finished shards of an interrupted run; None if nothing is staged.
        replaced: manifest of the store that the run replaces, if it can be read.
    """

    claim: ClaimedFolder
    base: Manifest | None
    first_shard: int
    first_id: int
    sealed: dict[int, FinishedShard] | None = None
    replaced: Manifest | None = None

    @property
    def description(self) -> Description | None:
        """Description of the finished store; None if there is none."""
        return self.base.description if self.base is not None else None

    def stored(self, *, digests: bool) -> StoredImages:
        """Return all images that have a row or a failure.

        Args:
            digests: also read the SHA-256 of the files.
        """
        return _stored_images(self.claim, self.base, self.sealed or {}, digests=digests)

    def begin(self, job: Job, files: Mapping[str, bytes] | None = None) -> StoreRun:
        """Begin a run; if it is interrupted, the next one can resume it.

        Args:
            job: the images that the run computes.
            files: content of files that the description names and the store has not, by name.
        """
        job = replace(job, first_id=self.first_id)
        with store_errors(self.claim.out):
            if self.sealed is None:
                self.claim.start_staging()
            for name, content in (files or {}).items():
                write_atomically(self.claim.staging / name, content)
            write_atomically(self.claim.staging / JOB, job.to_json().encode())
            sync_folder(self.claim.staging)
            self.claim.keep_work()
        return StoreRun(self.claim, job, self.base, self.sealed, replaced=self.replaced)


@dataclass(frozen=True)
class InterruptedRun:
    """State before a run: the rows that exist, and a run that did not end.

    Attributes:
        claim: the output folder.
        base: manifest of the finished store; None if there is none.
        job: the images that the run was computing.
        finished: its finished shards by number, and those of runs that were sealed before it.
        unfinished: numbers of its shards that were begun, ascending.
        replaced: manifest of the store that the run replaces, if it can be read.
    """

    claim: ClaimedFolder
    base: Manifest | None
    job: Job
    finished: dict[int, FinishedShard]
    unfinished: Sequence[int] = ()
    replaced: Manifest | None = None

    @property
    def description(self) -> Description:
        """Description of the run's rows."""
        return self.job.description

    @property
    def first_shard(self) -> int:
        """Number of the first shard of the run."""
        return self.job.first

    def stored(self, *, planned: bool, digests: bool) -> StoredImages:
        """Return all images that have a row or a failure.

        Args:
            planned: include the images of this run, not only those that it started from.
            digests: also read the SHA-256 of the files.
        """
        finished = {
            number: shard
            for number, shard in self.finished.items()
            if planned or number < self.job.first
        }
        stored = _stored_images(self.claim, self.base, finished, digests=digests)
        if not planned:
            return stored
        shards, failures = dict(stored.shards), [*stored.new_failures]
        with store_errors(self.claim.out):
            for number in self.unfinished:
                with self._shard(number) as shard:
                    entries = shard.entries
                records = [record for entry in entries for record in entry.records]
                shards[number] = Images.of(records)
                failures.extend(failure for entry in entries for failure in entry.failures)
        return replace(stored, shards=dict(sorted(shards.items())), new_failures=failures)

    def resume(self, job: Job) -> StoreRun | None:
        """Resume the run, whichever of its shards are done; None if the job is another one."""
        job = replace(job, first_id=self.job.first_id)
        if replace(self.job, description=job.description) != job:
            return None
        for number, finished in self.finished.items():
            if number >= job.first and finished.images != job.images_in_shard(number):
                return None
        begun = {}
        with store_errors(self.claim.out):
            for number in self.unfinished:
                expected = job.images_in_shard(number)
                with self._shard(number) as shard:
                    if shard.images > expected:
                        return None
                    if shard.images and shard.images == expected:
                        self.finished[number] = shard.finish()  # the run died before it could
                    else:
                        begun[number] = shard.images
            if job != self.job:  # software or the root changed
                write_atomically(self.claim.staging / JOB, job.to_json().encode())
        return StoreRun(
            self.claim, job, self.base, self.finished, begun=begun, replaced=self.replaced
        )

    def seal(self) -> ExistingStore:
        """End the run: keep its rows, so that the remaining images can be planned anew."""
        with store_errors(self.claim.out):
            for number in self.unfinished:
                with self._shard(number) as shard:
                    if shard.images:
                        self.finished[number] = shard.finish()
                    else:
                        shard.discard()
        last = max(self.finished, default=-1)
        first_shard = max(last + 1, self.job.first)
        first_id = self.job.first_id_in_shard(first_shard)
        return ExistingStore(
            self.claim, self.base, first_shard, first_id, self.finished, self.replaced
        )

    def _shard(self, number: int) -> ShardWriter:
        staging, description = self.claim.staging, self.job.description
        return ShardWriter(staging, number, description, lock=self.claim.lock)


def _stored_images(
    claim: ClaimedFolder,
    base: Manifest | None,
    finished: Mapping[int, FinishedShard],
    *,
    digests: bool,
) -> StoredImages:
    """Return the images of a published store and of finished shards in the staging folder."""
    with store_errors(claim.out):
        stored = StoredImages()
        if base is not None:
            stored = published_images(claim.out, base, digests=digests)
        shards = dict(stored.shards)
        failures: list[FailureRecord] = []
        for number, shard in sorted(finished.items()):
            failures.extend(shard.failures)
            if shard.entry is not None:
                shards[number] = read_images(claim.staging / images_name(number), digests=digests)
    return replace(stored, shards=shards, new_failures=failures)


def published_images(out: Path, manifest: Manifest, *, digests: bool) -> StoredImages:
    """Return the images of a finished store.

    Args:
        out: folder of the store.
        manifest: its manifest.
        digests: also read the SHA-256 of the files.

    Raises:
        StoreDamagedError: A file of the store is missing, or has another size.
    """
    try:
        for entry in manifest.files:
            if entry not in (manifest.list_rows, manifest.history):  # the next run writes them anew
                check_size(out, entry)
    except StoreError as error:
        raise StoreDamagedError(
            f"{error}; restore the file, or start over with --overwrite"
        ) from error
    history_to_continue(out, manifest)  # to warn before the work
    indexes = {shard.shard: out / shard.index.name for shard in manifest.shards}
    return StoredImages(
        {shard: read_images(path, digests=digests) for shard, path in indexes.items()},
        {shard.shard: shard.live_mask() for shard in manifest.shards},
        read_failures(out / FAILURES),
        vanished=manifest.vanished,
    )


def rewrite(
    claim: ClaimedFolder, job: Job, *, vanished: int = 0, same_rows: Manifest | None = None
) -> StoreRun:
    """Begin a run that replaces the finished store; if it is interrupted, its work is lost.

    Args:
        claim: the output folder.
        job: the images of the new store.
        vanished: number of rows that are kept although their images are gone.
        same_rows: manifest of the finished store, if the new one holds the same rows in another
            order. The indexes then hold the ids of the rows.
    """
    with store_errors(claim.out):
        claim.start_staging()
        replaced, first_id = _replaced(claim)
    job = replace(job, first_id=first_id)
    if same_rows is not None:
        return StoreRun(claim, job, vanished=vanished, replaced=same_rows, keeps_ids=True)
    return StoreRun(claim, job, vanished=vanished, replaced=replaced)


class StoreRun:
    """State during a run: shards are written, and :meth:`publish` completes the store.

    Args:
        claim: the output folder.
        job: the images that the run computes.
        base: manifest of the store that the run extends.
        finished: finished shards in the staging folder, by number.
        begun: number of images that are done in unfinished shards, by number of the shard.
        vanished: number of rows that are kept although their images are gone, without a plan.
        replaced: manifest of the store that the run replaces, if it can be read.
        keeps_ids: the rows are those of the replaced store, and the indexes hold their ids.
    """

    def __init__(
        self,
        claim: ClaimedFolder | SharedFolder,
        job: Job,
        base: Manifest | None = None,
        finished: dict[int, FinishedShard] | None = None,
        *,
        begun: Mapping[int, int] | None = None,
        vanished: int = 0,
        replaced: Manifest | None = None,
        keeps_ids: bool = False,
    ) -> None:
        self.job = job
        self._begun = {} if begun is None else begun
        self._claim = claim
        self._base = base
        self._vanished = vanished
        self._replaced = replaced
        self._keeps_ids = keeps_ids
        self._finished = {} if finished is None else finished
        self.resumed = sum(map(self.done_in, [*self._finished, *self._begun]))

    @property
    def finished(self) -> list[FinishedShard]:
        """Finished shards of this run, in order."""
        return [shard for n, shard in sorted(self._finished.items()) if n >= self.job.first]

    @property
    def failures(self) -> list[FailureRecord]:
        """Failures of the images of this run so far, in finished shards."""
        return [
            failure
            for number, shard in sorted(self._finished.items())
            if number >= self.job.first
            for failure in shard.failures
        ]

    def is_finished(self, number: int) -> bool:
        """Return whether a shard is finished."""
        return number in self._finished

    def done_in(self, number: int) -> int:
        """Return the number of images of a shard that are done; 0 for one of an earlier run."""
        if number < self.job.first:
            return 0
        finished = self._finished.get(number)
        return self._begun.get(number, 0) if finished is None else finished.images

    def missing(self) -> list[int]:
        """Return the shards that are not finished; what other processes finished counts."""
        last = self.job.first - (-self.job.images // self.job.description.shard_images)
        missing = [n for n in range(self.job.first, last) if n not in self._finished]
        for number in missing:
            shard = FinishedShard.read(self._claim.staging, number)
            if shard is not None:
                self.add(shard)
        return [number for number in missing if number not in self._finished]

    @contextlib.contextmanager
    def shard(self, number: int) -> Iterator[ShardWriter]:
        """Open a shard, new or unfinished; it counts if it is finished when the block ends."""
        staging, description = self._claim.staging, self.job.description
        with store_errors(self._claim.out):
            writer = ShardWriter(staging, number, description, lock=self._claim.lock)
        with writer:
            yield writer
        if writer.finished is not None:
            self.add(writer.finished)

    def add(self, shard: FinishedShard) -> None:
        """Let a finished shard count."""
        self._finished[shard.shard] = shard

    def collect(self, number: int) -> FinishedShard:
        """Let a shard count that another process finished, and return it.

        Raises:
            StoreError: it is not there, or not complete.
        """
        with store_errors(self._claim.out):
            shard = FinishedShard.read(self._claim.staging, number)
        if shard is None:
            raise StoreError(
                f"shard {number} of {self._claim.out} was finished, but its files are not in "
                f"{self._claim.staging}; expected that nobody removes them, and that all "
                "processes see the same folder"
            )
        self.add(shard)
        return shard

    def publish(
        self,
        plan: Plan | None = None,
        *,
        listing: str = "",
        listed: Iterable[bytes] | None = None,
    ) -> Manifest:
        """Complete the store, make it visible and return its manifest.

        Args:
            plan: the rows and failures of before that still count; None counts all rows.
            listing: digest of all paths of the store; by default that of the job.
            listed: path of each line of a list, to write the number of its row. None writes none.

        Raises:
            StoreError: the file system refuses, or the folder holds other files by now.
        """
        out, staging = self._claim.out, self._claim.staging
        with store_errors(out):
            manifest = self._manifest(plan, listing or self.job.listing)
            if listed is not None:
                manifest = replace(manifest, list_rows=self._write_list_rows(manifest, listed))
            for name in (FEATURES, IMAGES):
                sync_folder(staging / name)
            assert isinstance(self._claim, ClaimedFolder)  # others may not compute meanwhile
            self._claim.check()
            with ignore_signals():
                # Now the new store is complete: if this run dies, the next one publishes it.
                write_atomically(staging / MANIFEST, manifest.to_json().encode())
                sync_folder(staging)
                publish_staged(out)
                self._claim.finish()
        return manifest

    def _manifest(self, plan: Plan | None, listing: str) -> Manifest:
        """Write the lists of failures and of changes; return the manifest of the complete store."""
        base = self._base.shards if self._base is not None else ()
        live = plan.live if plan is not None else {}
        moves = plan.moves if plan is not None else {}
        shards = [
            _retire(self._move(entry, moves.get(entry.shard, {})), live.get(entry.shard))
            for entry in (*base, *self._new_shards())
        ]
        kept = plan.kept if plan is not None else ()
        failures = list(plan.failures) if plan is not None else []
        failures.extend(failure for failure in self.failures if failure.path not in kept)
        path = self._claim.staging / FAILURES
        write_atomically(path, failure_lines(sorted(failures)))
        rows = sum(shard.live_rows for shard in shards)
        created = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return Manifest(
            self.job.description,
            rows + len(failures),
            listing,
            rows,
            tuple(shards),
            FileEntry.of(path, FAILURES),
            created,
            vanished=plan.vanished if plan is not None else self._vanished,
            history=self._write_history(shards, created),
            next_id=self._next_id,
        )

    def _new_shards(self) -> list[ShardEntry]:
        finished = [shard for _, shard in sorted(self._finished.items())]
        entries = [shard.entry for shard in finished if shard.entry is not None]
        if self._keeps_ids:
            return entries
        return [
            replace(entry, first_id=self.job.first_id_in_shard(entry.shard)) for entry in entries
        ]

    @property
    def _next_id(self) -> int:
        if self._keeps_ids and self._replaced is not None:
            return self._replaced.next_id
        # Those of images without a row included, so that it does not depend on failures.
        return (self.job.first_id or 0) + self.job.images

    def _write_history(self, shards: Sequence[ShardEntry], created: str) -> FileEntry:
        out, staging = self._claim.out, self._claim.staging
        if self._base is not None:
            history = history_with(self._base, shards, created, out=out, staging=staging)
        elif self._keeps_ids and self._replaced is not None:
            history = history_of_same_rows(self._replaced, created, out=out)
        else:
            history = history_of_new(self._replaced, shards, created, out=out)
        write_atomically(staging / HISTORY, history_lines(history))
        return FileEntry.of(staging / HISTORY, HISTORY)

    def _move(self, entry: ShardEntry, moves: Mapping[int, Move]) -> ShardEntry:
        """Write the index of a shard with moved or touched rows again, and return its entry."""
        staging, number = self._claim.staging, entry.shard
        finished = self._finished.get(number)
        staged = staging / entry.index.name
        if not moves:
            if finished is None:  # a run may have died that found other moves
                staged.unlink(missing_ok=True)
            return entry
        index = staged if finished is not None else self._claim.out / entry.index.name
        records, ids = read_records(index), None if entry.first_id is not None else read_ids(index)
        for row, move in moves.items():
            records[row] = records[row]._replace(
                path=move.path, size=move.size, mtime_ns=move.mtime_ns
            )
        # While its index is exchanged, a staged shard is not finished.
        if finished is not None:
            (staging / done_name(number)).unlink(missing_ok=True)
            sync_folder((staging / done_name(number)).parent)
        write_atomically(staged, index_bytes(records, ids))
        entry = replace(entry, index=FileEntry.of(staged, entry.index.name))
        if finished is not None and finished.entry is not None:
            done_entry = replace(finished.entry, index=entry.index)
            self._finished[number] = replace(finished, entry=done_entry)
            done = self._finished[number].to_json().encode()
            write_atomically(staging / done_name(number), done)
        return entry

    def _write_list_rows(self, manifest: Manifest, listed: Iterable[bytes]) -> FileEntry:
        out, staging = self._claim.out, self._claim.staging
        names = [shard.index.name for shard in manifest.shards]
        paths = [staging / name if (staging / name).is_file() else out / name for name in names]
        content = io.BytesIO()
        np.save(content, _rows_of(manifest, paths, listed))
        write_atomically(staging / LIST_ROWS, content.getvalue())
        return FileEntry.of(staging / LIST_ROWS, LIST_ROWS)


def has_rows_of_list(out: Path, manifest: Manifest, listed: Iterable[bytes]) -> bool:
    """Return whether a finished store already has the row of each line of a list.

    Args:
        out: folder of the store.
        manifest: its manifest.
        listed: path of each line.
    """
    if manifest.list_rows is None:
        return False
    try:
        stored = np.load(out / manifest.list_rows.name, allow_pickle=False)
    except (OSError, ValueError):
        return False
    indexes = [out / shard.index.name for shard in manifest.shards]
    return bool(np.array_equal(stored, _rows_of(manifest, indexes, listed)))


def _rows_of(
    manifest: Manifest, indexes: Iterable[Path], listed: Iterable[bytes]
) -> npt.NDArray[np.int64]:
    shards = (
        (read_images(index).paths, shard.live_mask())
        for shard, index in zip(manifest.shards, indexes, strict=True)
    )
    return rows_of_paths(shards, listed)


def _retire(entry: ShardEntry, live: npt.NDArray[np.bool_] | None) -> ShardEntry:
    """Return an entry in which only live rows count; None leaves it as it is."""
    return entry if live is None else replace(entry, retired=ranges(~live))
