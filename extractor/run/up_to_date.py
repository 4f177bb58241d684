"""Is there anything to do? Answered from the stores and the files alone. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from extractor.images.listing import ImageList, display_path
from extractor.models.naming import planned_stores, store_folders
from extractor.options import Options
from extractor.report import FAILURES_SHOWN, Report, StoreReport
from extractor.run.run_json import request_of, request_that_made
from extractor.run.snapshot import take_snapshot
from extractor.store.format import MANIFEST, STAGING, Manifest, listing_digest
from extractor.store.plan import Snapshot, plan_run
from extractor.store.writer import has_rows_of_list, published_images

__all__ = ["up_to_date_report"]


def up_to_date_report(
    images: ImageList, models: Sequence[str], out: str | None, options: Options
) -> Report | None:
    """Return the report of a run that has nothing to do, or None if it may have something to do.

    Compares the request of the last run, the index and the files. Loads no model.
    """
    started = datetime.now(timezone.utc)
    manifests = _matching_manifests(images, models, out, options)
    if not manifests:
        return None
    snapshot = take_snapshot(images, content=options.check == "content")
    stores = []
    for folder, manifest in manifests.items():
        report = _store_report(folder, manifest, images, snapshot, options)
        if report is None:
            return None
        stores.append(report)
    computation = next(iter(manifests.values())).description.computation
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
    )


def _matching_manifests(
    images: ImageList, models: Sequence[str], out: str | None, options: Options
) -> dict[Path, Manifest] | None:
    """Return the manifest of each store if all were made by the same request, else None."""
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
        listed = _in_store(images, manifest)
        if (folder / STAGING).exists() or listed is None:
            return None
        if request_that_made(folder, manifest) != request:
            return None
        # New or missing names show without a look at any file. With --keep-missing the store may
        # hold more names than the images.
        if manifest.listing != listing_digest(listed.paths) and not options.keep_missing:
            return None
        manifests[folder] = manifest
    return manifests


def _in_store(images: ImageList, manifest: Manifest) -> ImageList | None:
    """Return the images with their paths in a store; None if they are not below its root."""
    return images.relative_to(os.fsencode(manifest.description.root))


def _store_report(
    folder: Path, manifest: Manifest, images: ImageList, snapshot: Snapshot, options: Options
) -> StoreReport | None:
    """Return the report of a store whose images are unchanged, else None."""
    listed = _in_store(images, manifest)
    assert listed is not None
    snapshot = replace(snapshot, paths=listed.paths)
    stored = published_images(folder, manifest, digests=options.check == "content")
    planned = plan_run(
        snapshot, stored, keep_missing=options.keep_missing, retry=options.retry_failed
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
    )
