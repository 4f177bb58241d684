"""Root of a store: whether its rows hold for images that are now in another folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from extractor.errors import StoreError
from extractor.images.listing import ImageList
from extractor.options import Options
from extractor.store.plan import Snapshot, StoredImages, count_unchanged
from extractor.store.writer import ExistingStore, InterruptedRun
from extractor.text import plural

__all__ = ["match_root"]

log = logging.getLogger(__name__)

# Fraction of the images with rows that must be unchanged in another folder.
LEAST_UNCHANGED = 0.9


def match_root(
    out: Path,
    existing: ExistingStore | InterruptedRun,
    images: ImageList,
    snapshot: Callable[[], Snapshot],
    options: Options,
) -> ImageList:
    """Return the images of a run with the paths and the root that the store records.

    They stay relative to the root of the store if they lie below it and its rows hold. Otherwise
    the root of the run becomes that of the store.

    Args:
        out: Folder of the store.
        existing: State of the store.
        images: Images of the run.
        snapshot: Returns the current state of the images.
        options: Options of the run.

    Raises:
        StoreError: Too few of the images with rows are there unchanged.
    """
    before = existing.description
    root = os.fsdecode(images.root)
    if before is None or before.root == root:
        return images
    stored = _stored(existing, digests=options.check == "content")
    same_root = images.relative_to(os.fsencode(before.root))
    if same_root is not None:
        unchanged, rows = count_unchanged(replace(snapshot(), paths=same_root.paths), stored)
        if _are_enough(unchanged, rows):
            return same_root
    unchanged, rows = count_unchanged(snapshot(), stored)
    found = f"{unchanged} of {plural(rows, 'image')} with rows"
    if not (_are_enough(unchanged, rows) or options.new_root):
        verb = "is" if unchanged == 1 else "are"
        raise StoreError(
            f"{out} was made from images in {before.root!r}; {found} {verb} unchanged in {root!r}, "
            f"expected {LEAST_UNCHANGED:.0%}; {_advice(before.root, root, options)}"
        )
    log.warning("%s was made from images in %r, now in %r; %s hold", out, before.root, root, found)
    return images


def _stored(existing: ExistingStore | InterruptedRun, *, digests: bool) -> StoredImages:
    if isinstance(existing, InterruptedRun):
        return existing.stored(planned=True, digests=digests)
    return existing.stored(digests=digests)


def _are_enough(unchanged: int, rows: int) -> bool:
    return unchanged >= LEAST_UNCHANGED * rows


def _advice(before: str, now: str, options: Options) -> str:
    """Return what to try if most of the images are not there."""
    choices = "accept it with --new-root, or choose another --out"
    if os.path.commonpath([before, now]) in (before, now):
        return (
            "paths are relative to the deepest folder that holds all inputs, and those of a list "
            f"start at the current folder; name the earlier inputs, {choices}"
        )
    if options.check == "content":
        return choices
    return f"compare contents with --check content, {choices}"
