"""What a run tells: how far it is, and what it did. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extractor.errors import UsageError
from extractor.store.reader import FeatureStore
from extractor.system.timing import Spent

__all__ = ["FAILURES_SHOWN", "Progress", "Report", "StoreReport"]

SOME_IMAGES_FAILED = 3  # the exit code

# Failed images whose reasons stand in an error message or a report; the store lists them all.
FAILURES_SHOWN = 5


@dataclass(frozen=True)
class Progress:
    """How far a run is, in images; ``failed`` of the ``done`` ones have no row."""

    done: int
    total: int
    failed: int


@dataclass(frozen=True)
class StoreReport:
    """What one run put into one store.

    Attributes:
        out: folder of the store.
        rows, failed: images with a row and those without.
        added: of the rows, how many are new.
        changed, gone: rows that were retired, since their images are others now, or are no longer
            asked for.
        shape: of one embedding: ``(dim,)``, or the axes of a map or of tokens.
        backbone: the model and its weights in a few words.
        first_failures: path and reason of the first few failed images.
    """

    out: Path
    rows: int
    failed: int
    added: int
    changed: int
    gone: int
    shape: tuple[int, ...]
    backbone: str
    first_failures: tuple[tuple[str, str], ...]

    @property
    def store(self) -> FeatureStore:
        """The store, opened."""
        return FeatureStore.open(self.out)


@dataclass(frozen=True)
class Report:
    """What one run did.

    Attributes:
        stores: that it filled, in the order of models and layers.
        images: that were asked for.
        resumed: of those, how many an earlier run had done already.
        passed_over: files in the folders that are no images.
        device, precision: that computed.
        least_cosine: of the embeddings to those in float32, of the images that this precision was
            tried with; None where it was not.
        is_compiled: whether a network was compiled.
        spent: what the time of the computation went to, all zero where nothing was computed; None
            where it was seen without a model that there is nothing to do.
        seconds: of the whole run.
        load_seconds: of those, until the models were ready; listing, loading and tuning.
        accepted_failure_rate: share of images without a row that is no reason to complain.
    """

    stores: tuple[StoreReport, ...]
    images: int
    resumed: int
    passed_over: int
    device: str
    precision: str
    seconds: float
    load_seconds: float
    accepted_failure_rate: float = 0.0
    least_cosine: float | None = None
    is_compiled: bool = False
    spent: Spent | None = None

    @property
    def exit_code(self) -> int:
        """What the command ends with: 0, or 3 where more images failed than is accepted."""
        return 0 if self.failure_rate <= self.accepted_failure_rate else SOME_IMAGES_FAILED

    @property
    def images_per_second(self) -> float:
        """Images, failed ones included, a second since the models were ready."""
        return (self.images - self.resumed) / max(self.seconds - self.load_seconds, 1e-9)

    @property
    def failure_rate(self) -> float:
        """Share of the images that have no row, from 0 to 1; of several stores in the worst."""
        return max(store.failed for store in self.stores) / self.images

    @property
    def _only(self) -> StoreReport:
        if len(self.stores) != 1:
            raise UsageError(f"this run filled {len(self.stores)} stores; look at report.stores")
        return self.stores[0]

    @property
    def out(self) -> Path:
        """Folder of the one store."""
        return self._only.out

    @property
    def rows(self) -> int:
        """Images that have a row in the one store."""
        return self._only.rows

    @property
    def failed(self) -> int:
        """Images without a row in the one store."""
        return self._only.failed

    @property
    def dim(self) -> int:
        """Numbers in one embedding of the one store."""
        return math.prod(self._only.shape)

    @property
    def first_failures(self) -> tuple[tuple[str, str], ...]:
        """Path and reason of the first few failed images of the one store."""
        return self._only.first_failures

    @property
    def store(self) -> FeatureStore:
        """The one store, opened."""
        return self._only.store

    @property
    def failures(self) -> list[dict[str, Any]]:
        """Every image that failed in the one store with its reason, read from it."""
        return self.store.failures
