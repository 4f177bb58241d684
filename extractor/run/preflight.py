"""Checks that refuse a run before hours are spent on it. Needs no torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from extractor.errors import SourceError, StoreError, UsageError
from extractor.models.naming import planned_stores, store_folders
from extractor.options import Options
from extractor.store.format import MANIFEST, MAX_SHARDS, STAGING, Manifest
from extractor.store.publish import check_output_folder
from extractor.store.writer import check_extendable
from extractor.text import as_size, plural

if TYPE_CHECKING:
    import torch

    from extractor.images.listing import ImageList
    from extractor.run.output import StoreOutput

__all__ = [
    "check_decode_device",
    "check_disk_space",
    "check_has_rows",
    "check_order",
    "check_output_folders",
    "check_output_name",
    "check_shard_count",
]


def check_output_name(out: str | os.PathLike[str] | None) -> str | None:
    """Return the output folder as a string.

    Raises:
        UsageError: The name is empty, or of another type.
    """
    name = os.fspath(out) if isinstance(out, os.PathLike) else out
    if name is not None and not isinstance(name, str):
        raise UsageError(f"out: got {out!r}, expected a path as a string or pathlib.Path")
    if name == "":
        raise UsageError("out: got an empty name, expected a folder for the store")
    return name


def check_output_folders(models: Sequence[str], out: str | None, options: Options) -> None:
    """Check that the stores of named models can be written, before any model is loaded.

    Whether an existing store matches the request only shows after loading. Does nothing where
    layers are patterns, since only a loaded model knows its stores then.

    Raises:
        StoreError: A folder cannot be written, is in use, or holds other files.
    """
    for folder in store_folders(out, planned_stores(models, options) or []):
        if options.part is not None and (Path(folder) / STAGING).is_dir():
            continue  # other parts are at work, and may be publishing
        check_output_folder(
            Path(folder), may_exist=True, overwrite=options.overwrite, check_lock=True
        )
        manifest = Path(folder) / MANIFEST
        if not options.overwrite and manifest.is_file():
            check_extendable(Path(folder), Manifest.read(manifest).description)


def check_order(images: ImageList, options: Options) -> None:
    """Check that the images have an order, if it is to be kept.

    Raises:
        UsageError: The images are those of folders.
    """
    if options.keep_order and images.order is None:
        raise UsageError(
            "keep order: got folders, whose images have no order of their own; expected --list "
            "FILE, or the paths of all images"
        )


def check_shard_count(images: int, shard_images: int) -> None:
    """Check that a store can number its shards.

    Raises:
        UsageError: There would be more shards than a store can have.
    """
    if images > MAX_SHARDS * shard_images:
        raise UsageError(
            f"got {plural(images, 'image')} in shards of {shard_images}, expected at most "
            f"{MAX_SHARDS:,} shards; use a larger --shard-images"
        )


def check_decode_device(decode: str, device: torch.device) -> None:
    """Check that the device can decode where ``decode`` is ``gpu``.

    Raises:
        UsageError: The device is not a CUDA device.
    """
    if decode == "gpu" and device.type != "cuda":
        raise UsageError(
            f"decode: got gpu, which needs a CUDA device; this run computes on {device}"
        )


def check_disk_space(outputs: Sequence[StoreOutput]) -> None:
    """Check that all pending rows fit on their disks. Quotas are not seen.

    Raises:
        StoreError: A file system has too little free space.
    """
    needed: dict[int, int] = {}
    for output in outputs:
        disk = output.staging.stat().st_dev
        needed[disk] = needed.get(disk, 0) + output.pending_bytes
    for output in outputs:
        wanted = needed[output.staging.stat().st_dev]
        free = shutil.disk_usage(output.staging).free
        if wanted > free:
            raise StoreError(
                f"{output.staging.parent}: about {as_size(wanted)} are needed and "
                f"{as_size(free)} are free; make room and repeat the command, or choose "
                "another --out"
            )


def check_has_rows(outputs: Sequence[StoreOutput]) -> None:
    """Check that every store has a row. If one has none, discard the work on all of them.

    The next run would end in the same way, so there is nothing to resume.

    Raises:
        SourceError: No image has an embedding.
    """
    for output in outputs:
        if not output.rows:
            for discarded in outputs:
                discarded.discard()
            reasons = "; ".join(f"{path}: {reason}" for path, reason in output.first_failures)
            of_store = f" of {output.spec.name}" if len(outputs) > 1 else ""
            raise SourceError(
                f"no embedding{of_store} from {plural(output.failed, 'image')} ({reasons})"
            )
