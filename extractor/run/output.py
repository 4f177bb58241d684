"""One of the stores of a run: what is there already, what is to be done, and the rows that come."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from extractor.images.listing import ImageList, show
from extractor.images.types import Failure, ImageInfo
from extractor.models.embedding import EmbeddingSpec
from extractor.options import Options
from extractor.report import FAILURES_SHOWN, StoreReport
from extractor.store.claim import ClaimedFolder
from extractor.store.failures import FailureRecord
from extractor.store.format import Description, listing_digest
from extractor.store.index import ImageRecord
from extractor.store.job import Job
from extractor.store.plan import Plan, Snapshot, StoredImages, plan_run
from extractor.store.publish import finish_publishing
from extractor.store.shard import ShardWriter
from extractor.store.writer import ExistingStore, InterruptedRun, StoreRun, take_up

__all__ = ["Filling", "claimed"]

log = logging.getLogger(__name__)

# Of one image, in the journal and the index together, about.
INDEX_BYTES = 300


@contextmanager
def claimed(folder: Path, options: Options) -> Iterator[ClaimedFolder]:
    """The place of a store, for this run alone; what is half done there is brought to its end.

    Raises:
        StoreError: it cannot be written, is in use, or holds something else.
    """
    finish_publishing(folder, lock=options.lock)
    overwrite, lock = options.overwrite, options.lock
    with ClaimedFolder(folder, overwrite=overwrite, extend=True, lock=lock) as claim:
        yield claim


class Filling:
    """One store while a run fills it: taken up as it was left, extended, published.

    Without :meth:`publish`, what is done is kept for the next run.

    Attributes:
        spec: what it holds.
        todo: places in the list of images of those that have to be computed, ascending.
        done: how many of these, from the first on, are dealt with.
        rows, failed: images with a row and images without.
        is_finished: nothing had to be done, and nothing was.

    Args:
        claim: its folder, see :func:`claimed`.

    Raises:
        StoreError: what is there is of something else.
    """

    def __init__(
        self,
        claim: ClaimedFolder,
        spec: EmbeddingSpec,
        description: Description,
        sources: ImageList,
        current: Callable[[], Snapshot],
        options: Options,
    ) -> None:
        self.spec = spec
        self.todo: Sequence[int] = ()
        self.done = 0
        self.rows = 0
        self.failed = 0
        self.is_finished = False
        self._description = description
        self._sources = sources
        self._current = current
        self._options = options
        self._added = 0
        self._first_failures: list[tuple[str, str]] = []
        self._claim = claim
        self._run: StoreRun | None = None  # None where nothing had to be done
        self._shard: ShardWriter | None = None
        self._prepare()

    @property
    def staging(self) -> Path:
        """Where it keeps what is done until it is published."""
        return self._claim.staging

    @property
    def bytes_to_come(self) -> int:
        """About what the rows that are left to do will take on the disk."""
        row = math.prod(self._description.shape) * np.dtype(self._description.dtype).itemsize
        return (len(self.todo) - self.done) * (row + INDEX_BYTES)

    # -- what is there

    def _prepare(self) -> None:
        """Compare what is there with the images, and plan what is left to do."""
        existing = take_up(self._claim, self._description)
        if isinstance(existing, InterruptedRun):
            self._run = self._resume(existing)
        else:
            stored = existing.stored(digests=self._compares_content)
            self._plan = self._compare(stored)
            self.is_finished = (
                existing.base is not None and not self._plan.todo and not self._plan.changes(stored)
            )
            if not self.is_finished:
                self._run = existing.begin(self._job_of(self._plan, existing))
        self.todo = self._plan.todo
        self.done = self._run.resumed if self._run is not None else 0
        self.rows += self._plan.rows
        self._note(self._plan.failures)

    def _resume(self, interrupted: InterruptedRun) -> StoreRun:
        """Resume an interrupted run.

        If its images changed, its rows of the others are kept, and the rest is planned anew.
        """
        digests = self._compares_content
        held = interrupted.stored(planned=False, digests=digests)
        every = interrupted.stored(planned=True, digests=digests)
        self._plan = self._compare(held)
        job = self._job_of(self._plan, interrupted)
        whole = self._compare(every)
        fresh = [live for shard, live in whole.live.items() if shard >= job.first]
        known = {failure.path for failure in self._plan.failures}
        # Not those that an earlier run found, and that were mended since.
        failures = [failure for failure in whole.failures if failure.path not in known]
        same = all(live.all() for live in fresh) and len(failures) == len(every.new_failures) - len(
            held.new_failures
        )
        run = interrupted.resume(job) if same else None
        if run is None:
            log.warning(
                "%s: the images are no longer those of the interrupted run (of those that it had "
                "done, %d changed and %d are gone; %d are to be computed); what it did of others "
                "is kept, --overwrite starts anew",
                *(self._claim.out, whole.changed, whole.gone, len(whole.todo)),
            )
            sealed = interrupted.seal()
            self._plan = whole
            return sealed.begin(self._job_of(whole, sealed))
        self._note(failures)
        self.rows += run.resumed - len(failures)
        self._added += run.resumed - len(failures)
        return run

    @property
    def _compares_content(self) -> bool:
        return self._options.check == "content"

    def _compare(self, held: StoredImages) -> Plan:
        if not (held.shards or held.failures or held.new_failures):
            return Plan(range(len(self._sources)), {}, (), (), 0, 0)
        options = self._options
        return plan_run(
            self._current(), held, keep_missing=options.keep_missing, retry=options.retry_failed
        )

    def _job_of(self, made: Plan, existing: ExistingStore | InterruptedRun) -> Job:
        base = existing.base
        return Job(
            self._description,
            len(made.todo),
            listing_digest(self._sources.paths[i] for i in made.todo),
            existing.first_shard,
            base.checksum if base is not None else "",
        )

    # -- what comes

    @contextmanager
    def shard(self, place: int) -> Iterator[None]:
        """Open a shard for :meth:`append`; it counts once this is left without an error.

        Args:
            place: among those to be done, counted from 0.
        """
        assert self._run is not None  # something is to be done
        number = self._run.job.first + place
        if self._run.is_finished(number):
            yield  # another store of the run is behind
            return
        with self._run.shard(number) as self._shard:
            yield
            self._shard.finish()
        self._shard = None

    def append(
        self,
        start: int,
        rows: npt.NDArray[np.float32],
        outcomes: Sequence[ImageInfo | Failure],
    ) -> None:
        """EmbeddingPart the rows to keep, with their records, from the failures.

        Args:
            start: place of the first of the images in :attr:`todo`.
        """
        if start < self.done or self._shard is None:
            return
        kept, records, failures = [], [], []
        with np.errstate(over="ignore"):  # beyond what float16 holds is seen as not finite
            stored = rows.astype(self._description.dtype, copy=False)
        finite = np.asarray(np.isfinite(stored).reshape(len(rows), -1).all(axis=1))
        paths = [self._sources.paths[i] for i in self.todo[start : start + len(outcomes)]]
        for i, (path, outcome) in enumerate(zip(paths, outcomes, strict=True)):
            if isinstance(outcome, ImageInfo) and not finite[i]:
                why = _not_finite(rows[i])
                outcome = Failure("not-finite", why, outcome.size, outcome.mtime_ns)
            if isinstance(outcome, Failure):
                what = (outcome.reason, outcome.message, outcome.size, outcome.mtime_ns)
                failures.append(FailureRecord(path, *what))
            else:
                kept.append(i)
                records.append(_record(path, outcome))
        self._shard.append(stored[kept], records, failures)
        self._note(failures)
        self.rows += len(records)
        self._added += len(records)
        self.done = start + len(outcomes)

    def discard(self) -> None:
        """Keep nothing for another run."""
        self._claim.discard_work()

    @property
    def listing(self) -> str:
        """Digest of the paths of what is to be done."""
        return self._run.job.listing if self._run is not None else ""

    @property
    def first_failures(self) -> tuple[tuple[str, str], ...]:
        """Path and reason of the first few images without a row."""
        return tuple(self._first_failures)

    def publish(self) -> StoreReport:
        """Make it visible, and say what is in it."""
        if self._run is not None:
            listing = listing_digest(self._all_paths())
            self._run.publish(self._plan, listing=listing)
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
        )

    def _all_paths(self) -> Iterable[bytes]:
        missing = self._plan.missing
        return sorted([*self._sources.paths, *missing]) if missing else self._sources.paths

    def _note(self, failures: Iterable[FailureRecord]) -> None:
        for failure in failures:
            self.failed += 1
            if len(self._first_failures) < FAILURES_SHOWN:
                self._first_failures.append((show(failure.path), failure.message))


def _record(path: bytes, info: ImageInfo) -> ImageRecord:
    return ImageRecord(path, info.size, info.mtime_ns, info.width, info.height, info.sha256)


def _not_finite(row: npt.NDArray[np.float32]) -> str:
    if np.isfinite(row).all():
        return f"the embedding holds {abs(row).max():.3g}, more than float16 does"
    return "the embedding holds NaN or infinity"
