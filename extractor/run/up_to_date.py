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
from extractor.run.run_json import request_of, request_that_made
from extractor.run.snapshot import seen_from, take_snapshot, unlisted_folders
from extractor.store.format import MANIFEST, STAGING, Manifest, listing_digest
from extractor.store.plan import Snapshot, StoredImages, plan_run
from extractor.store.writer import has_rows_of_list, published_images

__all__ = ["up_to_date_report"]


def up_to_date_report(
    images: ImageList, models: Sequence[str], out: str | None, options: Options
) -> Report | None:
    """Return the report of a run that has nothing to do, or None if it may have something to do.

    Compares the request of the last run, the index and the files. Loads no model.
    """
    started = datetime.now(timezone.utc)
    existing = _matching_stores(images, models, out, options)
    if not existing or not all(store.knows_all for store in existing):
        return None
    snapshot = take_snapshot(images, content=options.check == "content")
    stores = []
    for store in existing:
        report = _store_report(store, snapshot, options)
        if report is None:
            return None
        stores.append(report)
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
    def knows_all(self) -> bool:
        """Whether the store has all images by name. Looks at no file."""
        if self.manifest.listing == listing_digest(self.images.paths):
            return True
        known = {path for shard in self.stored.shards.values() for path in shard.paths}
        known.update(failure.path for failure in self.stored.failures)
        return known.issuperset(self.images.paths)


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
        manifests[folder] = manifest, listed
    digests = options.check == "content"
    return [
        _Existing(folder, manifest, published_images(folder, manifest, digests=digests), listed)
        for folder, (manifest, listed) in manifests.items()
    ]


def _store_report(store: _Existing, snapshot: Snapshot, options: Options) -> StoreReport | None:
    """Return the report of a store whose images are unchanged, else None."""
    folder, manifest, stored, listed = store.folder, store.manifest, store.stored, store.images
    snapshot = seen_from(listed, snapshot)
    planned = plan_run(
        snapshot,
        stored,
        keep_missing=options.keep_missing,
        retry=options.retry_failed,
        retire=options.retire,
    )
    if planned.todo or planned.changes(stored):
        return None
    if options.keep_order and not has_rows_of_list(folder, manifest, listed.paths_in_order):
        return None
    return StoreReport(
        out=folder,
        rows=manifest.rows,
        failed=manifest.failed,
        added=0,
        changed=0,
        gone=0,
        shape=manifest.description.shape,
        backbone=manifest.description.made_with,
        first_failures=tuple(
            (display_path(failure.path), failure.message)
            for failure in stored.failures[:FAILURES_SHOWN]
        ),
        unseen=planned.unseen,
        vanished=planned.vanished,
    )
