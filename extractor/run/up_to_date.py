"""Is there anything to do? Answered from the stores and the files alone. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from extractor.images.listing import ImageList, display_path
from extractor.models.naming import planned_stores, store_folders
from extractor.options import Options
from extractor.report import FAILURES_SHOWN, Report, StoreReport
from extractor.run.run_json import relink_run_json, request_of, request_that_made
from extractor.run.snapshot import seen_from, take_snapshot, unlisted_folders
from extractor.store.claim import ClaimedFolder
from extractor.store.format import MANIFEST, STAGING, Manifest, listing_digest
from extractor.store.job import Job
from extractor.store.plan import Plan, Snapshot, StoredImages, plan_run
from extractor.store.writer import ExistingStore, has_rows_of_list, published_images, take_up

__all__ = ["up_to_date_report"]


def up_to_date_report(
    images: ImageList, models: Sequence[str], out: str | None, options: Options
) -> Report | None:
    """Return the report of a run that has nothing to compute, or None if it may have something.

    Compares the request of the last run, the index and the files. Loads no model. If images were
    only renamed, moved or touched, the stores learn it here.

    Raises:
        StoreError: A store cannot be written.
    """
    started = datetime.now(timezone.utc)
    existing = _matching_stores(images, models, out, options)
    if not existing or not all(store.may_know_all for store in existing):
        return None
    snapshot = take_snapshot(images, content=options.check == "content")
    plans = [_plan(store, snapshot, options) for store in existing]
    if not all(_is_up_to_date(*pair, options) for pair in zip(existing, plans, strict=True)):
        return None
    if not all(_learn(*pair, options) for pair in zip(existing, plans, strict=True)):
        return None
    stores = [_store_report(store, plan) for store, plan in zip(existing, plans, strict=True)]
    computation = existing[0].manifest.description.computation
    return Report(
        stores=tuple(stores),
        images=len(images),
        resumed=len(images),
        passed_over=images.passed_over,
        skipped=images.skipped,
        excluded=images.excluded,
        device=str(computation["device"]),
        precision=str(computation["precision"]),
        least_cosine=computation.get("least_cosine"),
        is_compiled=bool(computation.get("compiled")),
        seconds=(datetime.now(timezone.utc) - started).total_seconds(),
        load_seconds=0.0,
        accepted_failure_rate=options.max_failure_rate,
        unlisted=unlisted_folders(images),
    )


@dataclass(frozen=True)
class _Existing:
    """A finished store, and the images of the run with their paths in it."""

    folder: Path
    manifest: Manifest
    stored: StoredImages
    images: ImageList

    @property
    def may_know_all(self) -> bool:
        """Whether the store has all images by name, or as many other rows. Looks at no file."""
        if self.manifest.listing == listing_digest(self.images.paths):
            return True
        paths = [path for shard in self.stored.shards.values() for path in shard.paths]
        known = {*paths, *(failure.path for failure in self.stored.failures)}
        requested = set(self.images.paths)
        return len(requested - known) <= sum(path not in requested for path in paths)


def _matching_stores(
    images: ImageList, models: Sequence[str], out: str | None, options: Options
) -> list[_Existing] | None:
    """Return all stores of the run if they were made by the same request, else None."""
    names = None if options.overwrite else planned_stores(models, options)
    request = request_of(models, options) if names is not None else None
    if names is None or request is None:
        return None
    manifests = {}
    for folder in map(Path, store_folders(out, names)):
        try:
            manifest = Manifest.read(folder / MANIFEST)
        except OSError:
            return None
        listed = images.relative_to(os.fsencode(manifest.description.root))
        if (folder / STAGING).exists() or listed is None:
            return None
        if request_that_made(folder, manifest) != request:
            return None
        if options.shard_images not in (None, manifest.description.shard_images):
            return None
        manifests[folder] = manifest, listed
    digests = options.check == "content"
    return [
        _Existing(folder, manifest, published_images(folder, manifest, digests=digests), listed)
        for folder, (manifest, listed) in manifests.items()
    ]


def _plan(store: _Existing, snapshot: Snapshot, options: Options) -> Plan:
    return plan_run(
        seen_from(store.images, snapshot),
        store.stored,
        keep_missing=options.keep_missing,
        retry=options.retry_failed,
        retire=options.retire,
    )


def _is_up_to_date(store: _Existing, plan: Plan, options: Options) -> bool:
    """Return whether a run would change nothing but the index of a store."""
    if plan.todo or plan.changes_rows(store.stored):
        return False
    lines = store.images.paths_in_order
    keeps_order = options.keep_order and not plan.moves
    return not keeps_order or has_rows_of_list(store.folder, store.manifest, lines)


def _learn(store: _Existing, plan: Plan, options: Options) -> bool:
    """Publish the moves of a plan; return whether the store is still the one that was compared."""
    if not plan.moves:
        return True
    images, before = store.images, store.manifest
    with ClaimedFolder(store.folder, extend=True, lock=options.lock) as claim:
        existing = take_up(claim, before.description)
        if not isinstance(existing, ExistingStore) or existing.base != before:
            return False
        job = Job(before.description, 0, listing_digest([]), existing.first_shard, before.checksum)
        paths = sorted([*images.paths, *plan.missing])
        listed = images.paths_in_order if options.keep_order else None
        run = existing.begin(job)
        after = run.publish(plan, listing=listing_digest(paths), listed=listed)
    relink_run_json(store.folder, before, after)
    return True


def _store_report(store: _Existing, plan: Plan) -> StoreReport:
    return StoreReport(
        out=store.folder,
        rows=store.manifest.rows,
        failed=store.manifest.failed,
        added=0,
        changed=0,
        gone=0,
        shape=store.manifest.description.shape,
        backbone=store.manifest.description.made_with,
        first_failures=tuple(
            (display_path(failure.path), failure.message)
            for failure in store.stored.failures[:FAILURES_SHOWN]
        ),
        unseen=plan.unseen,
        vanished=plan.vanished,
        moved=plan.moved,
    )
