"""Progress and results of a run. Needs no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from extractor.errors import UsageError
from extractor.reading.reader import FeatureStore
from extractor.system.timing import Spent

__all__ = ["FAILURES_SHOWN", "Phase", "Progress", "Report", "StoreReport", "WorkerReport"]

Phase = Literal["listing", "loading", "tuning", "computing", "publishing"]
"""Phases of a run, in their order."""

SOME_IMAGES_FAILED = 3  # exit code

# Number of failed images shown in a message or a report; the store lists all of them.
FAILURES_SHOWN = 5


@dataclass(frozen=True)
class Progress:
    """Progress of a run: its phase, and how many images are done.

    >>> def show(progress):  # doctest: +SKIP
    ...     print(progress.phase, progress.done, progress.total)
    >>> report = extract("images", out="shown", progress=show)  # doctest: +SKIP
    listing 0 0
    loading 0 25
    tuning 0 25
    computing 0 25
    computing 25 25
    publishing 25 25

    Attributes:
        done: Number of images that are done, failed ones included; 0 before ``computing``.
        total: Number of images of the run; 0 while they are listed.
        failed: Number of images without a row; 0 before ``computing``.
        phase: ``listing`` the images, ``loading`` the models, ``tuning`` (precision, compilation,
            and which rows exist), ``computing`` or ``publishing``, in this order.
        shard: Shard of the run that a worker process has just finished, from 0; else None.
        worker: Number of that worker, from 1; else None.
    """

    done: int
    total: int
    failed: int
    phase: Phase = "computing"
    shard: int | None = None
    worker: int | None = None


@dataclass(frozen=True)
class StoreReport:
    """Result of one run in one store.

    >>> result = extract("images").stores[0]  # doctest: +SKIP
    >>> result.out.name, result.rows, result.failed, result.shape  # doctest: +SKIP
    ('resnet50', 25, 0, (2048,))

    Attributes:
        out: Folder of the store.
        rows: Number of images with a row.
        failed: Number of images without a row.
        added: Number of rows that are new.
        changed: Number of rows retired because their images changed.
        gone: Number of rows retired because their images are no longer among the inputs.
        shape: Shape of one embedding: ``(dim,)``, or the axes of a map or of tokens.
        backbone: Model and weights in a few words.
        first_failures: Paths and reasons of the first few failed images.
        size: Image size of the model in words, with its other published size; empty if no model
            was loaded.
        unseen: Number of rows kept although their images could not be seen.
        vanished: Number of rows kept although their images are gone from the disk; so many were
            gone that ``retire`` must confirm it.
        moved: Number of rows kept although their images have other paths than before.
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
    size: str = ""
    unseen: int = 0
    vanished: int = 0
    moved: int = 0

    @property
    def store(self) -> FeatureStore:
        """The store, opened anew each time; keep it in a variable to search it often."""
        return FeatureStore.open(self.out)

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of rows and images, as in ``run.json`` and in the events of ``--log-json``."""
        return {
            "rows": self.rows,
            "failures": self.failed,
            "added": self.added,
            "changed": self.changed,
            "moved": self.moved,
            "gone": self.gone,
            "unseen": self.unseen,
            "vanished": self.vanished,
        }

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON: ``out``, the :attr:`counts`, and more; see :class:`Report`."""
        return {
            "out": os.fspath(self.out),
            **self.counts,
            "shape": list(self.shape),
            "model": self.backbone,
            "first_failures": [list(failure) for failure in self.first_failures],
        }


@dataclass(frozen=True)
class WorkerReport:
    """What one worker process of a run did.

    Attributes:
        device: Device that it computed on, such as ``cuda:0``.
        images: Number of images that it computed.
        seconds: Seconds from its first shard to its last, without loading the models.
        computing: Seconds in which its device computed for it.
    """

    device: str
    images: int
    seconds: float
    computing: float

    @property
    def images_per_second(self) -> float:
        """Images per second."""
        return self.images / max(self.seconds, 1e-9)

    def as_dict(self) -> dict[str, Any]:
        """Return the worker as JSON."""
        return {
            "device": self.device,
            "images": self.images,
            "images_per_second": round(self.images_per_second, 2),
            "seconds": round(self.seconds, 3),
            "computing": round(self.computing, 3),
        }


@dataclass(frozen=True)
class Report:
    """Result of one run.

    >>> report = extract("images", "resnet50")  # doctest: +SKIP
    >>> report.rows, report.failed, report.store["cats/tom.jpg"].shape  # doctest: +SKIP
    (25, 0, (2048,))

    ``out``, ``rows``, ``failed``, ``dim``, ``store``, ``failures`` and ``first_failures`` belong to
    the only store of the run. With several stores, see :attr:`stores`.

    Attributes:
        stores: Stores of the run, in the order of models and layers.
        images: Number of images of the run.
        resumed: Number of images that were done before.
        passed_over: Number of files in the folders that are not images.
        device: Device that computed, such as ``cuda:0``, or several of them.
        precision: Precision of the model.
        seconds: Duration of the run.
        load_seconds: Time until the models were ready: listing, loading and tuning.
        accepted_failure_rate: Fraction of images that may fail without an exit code.
        least_cosine: Smallest cosine to a float32 embedding, over a sample of the images; None if
            nothing was compared.
        is_compiled: Whether a network was compiled.
        skipped: Number of files in the folders that are not images, by suffix; as in
            :class:`~extractor.images.listing.ImageList`.
        excluded: Number of files and folders left out, by pattern; as there.
        spent: Time by kind of work; None if no model was loaded because there was nothing to do.
        unlisted: Paths of folders that could not be listed, with the reason.
        workers: What each worker process did; empty if the process itself computed.
        part: Part of the run that this process computed, such as ``3/16``; empty if all of it. Then
            ``images`` and the counts of a store that is not complete are those of the part.
        shards: Number of shards of all parts; 0 without parts.
        missing_shards: Number of shards that other parts have not finished yet.
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
    skipped: Mapping[str, int] = field(default_factory=dict)
    excluded: Mapping[str, int] = field(default_factory=dict)
    spent: Spent | None = None
    unlisted: tuple[tuple[str, str], ...] = ()
    workers: tuple[WorkerReport, ...] = ()
    part: str = ""
    shards: int = 0
    missing_shards: int = 0

    @property
    def exit_code(self) -> int:
        """Exit code of the command: 0, or 3 if more images failed than accepted, or were unseen.

        Images that could not be seen, or that vanished in large numbers, are never accepted.
        """
        is_complete = not (self.unlisted or any(s.unseen or s.vanished for s in self.stores))
        is_accepted = self.failure_rate <= self.accepted_failure_rate
        return 0 if is_complete and is_accepted else SOME_IMAGES_FAILED

    def as_dict(self) -> dict[str, Any]:
        """Return the report as values that JSON has.

        >>> import json
        >>> report = extract("images", "resnet50")  # doctest: +SKIP
        >>> json.loads(json.dumps(report.as_dict()))["stores"][0]["rows"]  # doctest: +SKIP
        25

        Returns:
            ``exit_code``, ``images``, ``resumed``, ``passed_over``, ``skipped``, ``excluded``,
            ``unlisted`` (pairs of path and reason), ``device``, ``precision``, ``least_cosine``,
            ``compiled``, ``failure_rate``, ``seconds``, ``load_seconds``, ``spent`` (as in
            ``run.json``), ``workers``, ``part``, ``shards``, ``missing_shards`` and ``stores``.
            Each store has ``out``, ``rows``, ``failures``, ``added``, ``changed``, ``gone``,
            ``unseen``, ``vanished``, ``shape``, ``model`` and ``first_failures`` (pairs of path
            and reason). Paths are text as
            :func:`os.fsdecode` makes it.
        """
        return {
            "exit_code": self.exit_code,
            "images": self.images,
            "resumed": self.resumed,
            "passed_over": self.passed_over,
            "skipped": dict(self.skipped),
            "excluded": dict(self.excluded),
            "unlisted": [list(folder) for folder in self.unlisted],
            "device": self.device,
            "precision": self.precision,
            "least_cosine": self.least_cosine,
            "compiled": self.is_compiled,
            "failure_rate": self.failure_rate,
            "seconds": self.seconds,
            "load_seconds": self.load_seconds,
            "spent": self.spent and self.spent.as_dict(),
            "workers": [worker.as_dict() for worker in self.workers],
            "part": self.part,
            "shards": self.shards,
            "missing_shards": self.missing_shards,
            "stores": [store.as_dict() for store in self.stores],
        }

    @property
    def busy(self) -> dict[str, float]:
        """Share of the computation's time in which each device of the workers was busy."""
        by_device: dict[str, list[WorkerReport]] = {}
        for worker in self.workers:
            by_device.setdefault(worker.device, []).append(worker)
        busy = {}
        for device, workers in by_device.items():
            computing = sum(worker.computing for worker in workers)
            # Processes take turns on a GPU, and share the cores of a CPU.
            turns = len(workers) if device == "cpu" else 1
            longest = max(worker.seconds for worker in workers)
            busy[device] = min(computing / max(longest * turns, 1e-9), 1.0)
        return busy

    @property
    def images_per_second(self) -> float:
        """Images per second, failed ones included, from the time the models were ready."""
        return (self.images - self.resumed) / max(self.seconds - self.load_seconds, 1e-9)

    @property
    def failure_rate(self) -> float:
        """Fraction of images without a row, from 0 to 1; the largest one of several stores."""
        return max(store.failed for store in self.stores) / max(self.images, 1)

    @property
    def _only(self) -> StoreReport:
        if len(self.stores) != 1:
            raise UsageError(f"got {len(self.stores)} stores, expected one; see report.stores")
        return self.stores[0]

    @property
    def out(self) -> Path:
        """Folder of the store."""
        return self._only.out

    @property
    def rows(self) -> int:
        """Number of images with a row."""
        return self._only.rows

    @property
    def failed(self) -> int:
        """Number of images without a row."""
        return self._only.failed

    @property
    def dim(self) -> int:
        """Number of values in one embedding."""
        return math.prod(self._only.shape)

    @property
    def first_failures(self) -> tuple[tuple[str, str], ...]:
        """Paths and reasons of the first few failed images."""
        return self._only.first_failures

    @property
    def store(self) -> FeatureStore:
        """The store, opened anew each time; keep it in a variable to search it often."""
        return self._only.store

    @property
    def failures(self) -> list[dict[str, Any]]:
        """Read every failed image with its reason from the store."""
        return self.store.failures
