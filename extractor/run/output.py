"""One store while a run fills it."""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from extractor.images.listing import ImageList, display_path
from extractor.lease.plan import StoreTarget
from extractor.models.embedding import EmbeddingSpec
from extractor.options import Options
from extractor.report import FAILURES_SHOWN, StoreReport
from extractor.run.root import match_root
from extractor.run.snapshot import look_at, seen_from
from extractor.store.claim import ClaimedFolder, SharedFolder
from extractor.store.failures import FailureRecord
from extractor.store.format import Description, Manifest, listing_digest
from extractor.store.job import Job
from extractor.store.plan import Plan, Sight, Snapshot, StoredImages, plan_run
from extractor.store.publish import finish_publishing
from extractor.store.shard import FinishedShard
from extractor.store.writer import (
    ExistingStore,
    InterruptedRun,
    StoreRun,
    has_rows_of_list,
    take_up,
)

__all__ = ["StoreOutput", "claim_store"]

log = logging.getLogger(__name__)

# Approximate bytes per image in the journal and the index together.
INDEX_BYTES = 300


@contextmanager
def claim_store(folder: Path, options: Options) -> Iterator[ClaimedFolder]:
    """Lock the folder of a store for this run, and finish what an earlier run was publishing.

    Raises:
        StoreError: The folder cannot be written, is in use, or holds other files.
    """
    finish_publishing(folder, lock=options.lock)
    overwrite, lock = options.overwrite, options.lock
    with ClaimedFolder(folder, overwrite=overwrite, extend=True, lock=lock) as claim:
        yield claim


class StoreOutput:
    """One store while a run fills it: resumed, extended and published.

    Without :meth:`publish`, its rows are kept for the next run.

    Attributes:
        spec: Embedding that the store holds.
        todo: Indices of the images to compute, ascending.
        done: Number of images of ``todo`` that were done before the run.
        rows: Number of images with a row.
        failed: Number of images without a row.

    Args:
        claim: Folder of the store, see :func:`claim_store`.
        spec: Embedding that the store holds.
        description: Description for the manifest.
        images: Images of the run.
        snapshot: Returns the current state of the images.
        options: Options of the run.

    Raises:
        StoreError: The folder holds a store of something else.
    """

    def __init__(
        self,
        claim: ClaimedFolder | SharedFolder,
        spec: EmbeddingSpec,
        description: Description,
        images: ImageList,
        snapshot: Callable[[], Snapshot],
        options: Options,
    ) -> None:
        self.spec = spec
        self.todo: Sequence[int] = ()
        self.done = 0
        self.rows = 0
        self.failed = 0
        self._description = description
        self._images = images
        self._snapshot = snapshot
        self._options = options
        self._added = 0
        self._first_failures: list[tuple[str, str]] = []
        self._claim = claim
        self._run: StoreRun | None = None  # None if the store is up to date
        self._prepare()

    @property
    def staging(self) -> Path:
        """Folder that keeps the rows until they are published."""
        return self._claim.staging

    @property
    def pending(self) -> int:
        """Number of images that are left to compute."""
        return len(self.todo) - self.done

    @property
    def pending_bytes(self) -> int:
        """Approximate size of the pending rows on the disk."""
        row = math.prod(self._description.shape) * np.dtype(self._description.dtype).itemsize
        return self.pending * (row + INDEX_BYTES)

    @property
    def todo_digest(self) -> str:
        """Digest of the paths of the images to compute."""
        return self._run.job.listing if self._run is not None else ""

    @property
    def first_failures(self) -> tuple[tuple[str, str], ...]:
        """Path and message of the first few failures."""
        return tuple(self._first_failures)

    # -- comparing

    def _prepare(self) -> None:
        """Compare the images with the store, and plan what is left to compute."""
        assert isinstance(self._claim, ClaimedFolder)
        existing = take_up(self._claim, self._description)
        self._follow_root(existing)
        if isinstance(existing, InterruptedRun):
            self._run = self._resume(existing)
        else:
            stored = existing.stored(digests=self._compares_content)
            self._plan = self._compare(stored)
            is_up_to_date = (
                existing.base is not None
                and existing.base.description.root == self._description.root
                and not self._plan.todo
                and not self._plan.changes(stored)
                and self._has_rows_of_list(existing.base)
            )
            if not is_up_to_date:
                self._run = existing.begin(self._job_for(self._plan, existing))
        self.todo = self._plan.todo
        self.done = self._run.resumed if self._run is not None else 0
        if self.pending:
            self._report_software(existing)
        self.rows += self._plan.rows
        self._count_failures(self._plan.failures)

    @property
    def is_planned(self) -> bool:
        """Whether the store is filled in a pass over its images."""
        return self.pending > 0

    @property
    def is_up_to_date(self) -> bool:
        """Whether nothing changes in the store."""
        return self._run is None

    @property
    def plan(self) -> Plan:
        """What becomes of the rows of before."""
        return self._plan

    @property
    def listing(self) -> str:
        """Digest of all paths that the store will have."""
        missing, paths = self._plan.missing, self._images.paths
        return listing_digest(sorted([*paths, *missing]) if missing else paths)

    @property
    def lines(self) -> Iterable[bytes] | None:
        """Path of each line of the list; None if their rows are not asked for."""
        if not self._options.keep_order or self._images.order is None:
            return None
        return self._images.paths_in_order

    def _has_rows_of_list(self, base: Manifest) -> bool:
        listed = self.lines
        return listed is None or has_rows_of_list(self._claim.out, base, listed)

    def _follow_root(self, existing: ExistingStore | InterruptedRun) -> None:
        """Make the paths of the images relative to the root that the store will have."""
        images, take_snapshot = self._images, self._snapshot
        listed = match_root(self._claim.out, existing, images, take_snapshot, self._options)
        if listed is images:
            return
        self._images = listed
        self._snapshot = functools.cache(lambda: seen_from(listed, take_snapshot()))
        self._description = replace(self._description, root=os.fsdecode(listed.root))

    def _report_software(self, existing: ExistingStore | InterruptedRun) -> None:
        """Warn if other versions of software, or another GPU, made the rows that this run keeps."""
        before = existing.description
        if before is None:
            return
        changes = [
            (f"{name} {change.before}" if change.before else f"no {name}")
            + f", now {change.now or 'none'}"
            for change in before.software_changes(self._description)
            for name in ["GPU" if change.name == "device_name" else change.name]
        ]
        if changes:
            log.warning("%s was made with %s", self._claim.out, "; ".join(changes))

    def _resume(self, interrupted: InterruptedRun) -> StoreRun:
        """Resume an interrupted run.

        If its images changed since, its rows of unchanged images are kept, and the rest is planned
        again.
        """
        before = interrupted.stored(planned=False, digests=self._compares_content)
        now = interrupted.stored(planned=True, digests=self._compares_content)
        self._plan = self._compare(before)
        job = self._job_for(self._plan, interrupted)
        plan_now = self._compare(now)
        new_shards = [live for shard, live in plan_now.live.items() if shard >= job.first]
        known = {failure.path for failure in self._plan.failures}
        # Leave out failures of an earlier run that were retried successfully since.
        failures = [failure for failure in plan_now.failures if failure.path not in known]
        new_failures = len(now.new_failures) - len(before.new_failures)
        moves = {shard: rows for shard, rows in plan_now.moves.items() if shard >= job.first}
        is_same = all(live.all() for live in new_shards) and len(failures) == new_failures
        is_same &= not any(move.is_renamed for rows in moves.values() for move in rows.values())
        run = interrupted.resume(job) if is_same else None
        if run is None:
            log.warning(
                "%s: the images changed since the interrupted run (of its images, %d changed and "
                "%d are gone; %d to compute); its other rows are kept, --overwrite starts anew",
                *(self._claim.out, plan_now.changed, plan_now.gone, len(plan_now.todo)),
            )
            sealed = interrupted.seal()
            self._plan = plan_now
            return sealed.begin(self._job_for(plan_now, sealed))
        # Those of the rows that the interrupted run computed are among them.
        self._plan = replace(
            self._plan,
            unseen=plan_now.unseen,
            vanished=plan_now.vanished,
            moves={**self._plan.moves, **moves},
        )
        for shard in run.finished:
            self._count(shard)
        return run

    @property
    def _compares_content(self) -> bool:
        return self._options.check == "content"

    def _compare(self, stored: StoredImages) -> Plan:
        if not (stored.shards or stored.failures or stored.new_failures):
            return Plan(range(len(self._images)), {}, (), (), 0, 0)
        options = self._options
        return plan_run(
            self._snapshot(),
            stored,
            keep_missing=options.keep_missing,
            retry=options.retry_failed,
            retire=options.retire,
        )

    def _job_for(self, plan: Plan, existing: ExistingStore | InterruptedRun) -> Job:
        base = existing.base
        return Job(
            self._description,
            len(plan.todo),
            listing_digest(self._images.paths[i] for i in plan.todo),
            existing.first_shard,
            base.checksum if base is not None else "",
        )

    # -- computing

    @property
    def shard_images(self) -> int:
        """Number of images in one shard."""
        return self._description.shard_images

    def target(self, spec: int) -> StoreTarget:
        """Return where the pending shards go.

        Args:
            spec: Index of the store's embedding among those of the run.
        """
        assert self._run is not None  # only a store with pending images gets shards
        first, lock = self._run.job.first, self._options.lock
        return StoreTarget(self.staging, self._description, first, spec, lock)

    def done_in(self, index: int) -> int:
        """Return the number of images that are done in a shard.

        Args:
            index: Index among the shards to compute.
        """
        assert self._run is not None
        return self._run.done_in(self._run.job.first + index)

    def is_finished(self, index: int) -> bool:
        """Return whether a shard is finished; arguments as above."""
        return self._run is None or self._run.is_finished(self._run.job.first + index)

    def collect(self, index: int) -> None:
        """Count a shard that a worker finished; arguments as above.

        Raises:
            StoreError: Its files are not there.
        """
        if not self.is_finished(index):
            assert self._run is not None
            self._count(self._run.collect(self._run.job.first + index))

    def _count(self, shard: FinishedShard) -> None:
        rows = shard.entry.rows if shard.entry is not None else 0
        self.rows += rows
        self._added += rows
        self._count_failures(shard.failures)

    def discard(self) -> None:
        """Keep nothing for the next run."""
        assert isinstance(self._claim, ClaimedFolder)
        self._claim.discard_work()

    def publish(self) -> StoreReport:
        """Make the store visible, and report what it holds."""
        if self._run is not None:
            self._keep_unread(self._run)
            self._run.publish(self._plan, listing=self.listing, listed=self.lines)
        return self.report()

    def report(self) -> StoreReport:
        """Report what the store holds once it is published."""
        return StoreReport(
            out=self._claim.out,
            rows=self.rows,
            failed=self.failed,
            added=self._added,
            changed=self._plan.changed,
            gone=self._plan.gone,
            shape=self.spec.shape,
            backbone=str(self.spec),
            first_failures=self.first_failures,
            size=self.spec.size_text,
            unseen=self._plan.unseen,
            vanished=self._plan.vanished,
            moved=self._plan.moved,
        )

    def _keep_unread(self, run: StoreRun) -> None:
        """Keep the row of each changed image that could not be read; a failure may be over soon."""
        unread = [
            failure.path
            for failure in (*self._plan.failures, *run.failures)
            if failure.reason == "unreadable" and failure.path in self._plan.replaced
        ]
        # What disappeared while the run lasted is gone, and its failure stands.
        root = os.fsencode(self._description.root)
        there = (Sight.READABLE, Sight.UNSEEN)
        kept = {path for path in unread if look_at(os.path.join(root, path)) in there}
        self._plan = self._plan.keeping(kept)
        self.rows += len(kept)
        self.failed -= len(kept)
        names = {display_path(path) for path in kept}
        self._first_failures = [entry for entry in self._first_failures if entry[0] not in names]

    def _count_failures(self, failures: Iterable[FailureRecord]) -> None:
        for failure in failures:
            self.failed += 1
            if len(self._first_failures) < FAILURES_SHOWN:
                self._first_failures.append((display_path(failure.path), failure.message))
