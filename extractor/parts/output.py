"""One store as a part of a job array sees it: compared by another part, filled by all of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path

from extractor.images.listing import display_path
from extractor.models.embedding import EmbeddingSpec
from extractor.options import Options
from extractor.parts.plan import PlannedImages, PlannedStore, stored_lines
from extractor.report import FAILURES_SHOWN, StoreReport
from extractor.run.output import StoreOutput
from extractor.store.claim import ClaimedFolder, SharedFolder
from extractor.store.format import Description
from extractor.store.plan import Snapshot
from extractor.store.writer import join

__all__ = ["PlannedOutput"]


class PlannedOutput(StoreOutput):
    """One store of a plan, whose shards are computed by several processes.

    Args:
        claim: Folder of the store.
        spec: Embedding that the store holds.
        description: Description for the manifest.
        images: Images of the plan.
        planned: What the plan says about the store.
        options: Options of the run.
        lines: Folder of the paths of the lines of a list.

    Raises:
        StoreError: The models of this process would make other rows.
    """

    def __init__(
        self,
        claim: ClaimedFolder | SharedFolder,
        spec: EmbeddingSpec,
        description: Description,
        images: PlannedImages,
        planned: PlannedStore,
        options: Options,
        lines: Path,
    ) -> None:
        self._planned = planned
        self._lines = lines
        super().__init__(claim, spec, description, images, _no_snapshot, options)

    def _prepare(self) -> None:
        planned = self._planned
        self._plan = planned.plan
        self.todo = range(max(planned.start, 0), max(planned.start, 0) + planned.count)
        if not planned.is_up_to_date:
            self._run = join(self._claim, self._description)
            self._description = self._run.job.description
            self.done = self._run.resumed
            for shard in self._run.finished:
                self._count(shard)
        self.rows += self._plan.rows
        self._count_failures(self._plan.failures)

    @property
    def is_planned(self) -> bool:
        """Whether the plan has a pass over the images of the store."""
        return self._planned.start >= 0

    @property
    def listing(self) -> str:
        """Digest of all paths that the store will have."""
        return self._planned.listing

    @property
    def lines(self) -> Iterable[bytes] | None:
        """Path of each line of the list; None if their rows are not asked for."""
        return stored_lines(self._lines) if self._planned.has_order else None

    @property
    def shards(self) -> int:
        """Number of shards to compute."""
        return -(-len(self.todo) // self.shard_images)

    def count_missing(self) -> int:
        """Return the number of shards that no process has finished yet."""
        return 0 if self._run is None else len(self._run.missing())

    def part_report(self, shards: Collection[int]) -> StoreReport:
        """Report on some of the shards.

        Args:
            shards: Their indices among the shards to compute.
        """
        finished = []
        if self._run is not None:
            first = self._run.job.first
            finished = [each for each in self._run.finished if each.shard - first in shards]
        failures = [failure for shard in finished for failure in shard.failures]
        rows = sum(shard.entry.rows for shard in finished if shard.entry is not None)
        shown = [(display_path(each.path), each.message) for each in failures[:FAILURES_SHOWN]]
        return replace(
            self.report(),
            rows=rows,
            failed=len(failures),
            added=rows,
            first_failures=tuple(shown),
        )


def _no_snapshot() -> Snapshot:
    raise AssertionError("the plan was compared with the images before")
