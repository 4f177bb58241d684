"""What a run was asked for and what it did: ``run.json`` in each store. Needs no torch."""

from __future__ import annotations

import json
import logging
import os
import platform
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from extractor.images.listing import ImageList, show
from extractor.models.naming import planned_stores, split_model, store_folders
from extractor.options import Options
from extractor.report import FAILURES_SHOWN, Report, StoreReport
from extractor.run.snapshot import current_images
from extractor.store.atomic import write_atomically
from extractor.store.format import (
    MANIFEST,
    RUN,
    STAGING,
    Manifest,
    checksum,
    listing_digest,
    with_checksum,
)
from extractor.store.plan import plan_run
from extractor.store.writer import published_images
from extractor.version import __version__

__all__ = ["follow", "nothing_to_do", "request_of", "software_versions", "write_record"]

log = logging.getLogger(__name__)

FORMAT = "extractor-run"
VERSION = 1

LIBRARIES = ("torch", "torchvision", "timm", "pillow", "numpy", "pyarrow")

# Where the libraries look for their caches.
CACHES = ("HF_HOME", "HF_HUB_CACHE", "TORCH_HOME", "XDG_CACHE_HOME", "HOME")

# Options that say how a run goes about it, and nothing of what comes of it.
ONLY_HOW = frozenset(
    {
        "overwrite",
        "workers",
        "threads",
        "compile",
        "fuse",
        "check",
        "keep_missing",
        "retry_failed",
        "max_pixels",
        "image_timeout",
        "max_failure_rate",
        "lock",
        "profile",
    }
)


def software_versions() -> dict[str, str]:
    """Of Python, of this program and of the libraries that take part, without importing them."""
    libraries = {name: metadata.version(name) for name in LIBRARIES}
    return {"python": platform.python_version(), "extractor": __version__, **libraries}


def request_of(models: Sequence[str], options: Options) -> dict[str, Any] | None:
    """What a run is asked for, as far as its rows depend on it; None where that cannot be told.

    Two runs of the same request, with the same files of weights, make the same rows of the same
    images.
    """
    names = [name for model in models for name in split_model(model)]
    if any(".py:" in name for name in names):
        return None  # the code may import whatever it likes
    chosen = {key: value for key, value in asdict(options).items() if key not in ONLY_HOW}
    content = {
        "models": list(models),
        "options": chosen,
        "software": software_versions(),
        "folder": os.getcwd(),  # that the names of files are meant from
        "caches": {name: os.environ.get(name) for name in CACHES},
    }
    loaded: dict[str, Any] = json.loads(json.dumps(content))
    return loaded


def stamps_of(weights: Iterable[str]) -> list[list[Any]] | None:
    """Path, size and times of files that were loaded, and of those that led to them.

    In the hub's cache, the commit that a name stands for is written in a file of its own; beside
    weights in a folder of the user's lies what the network is built from.
    """
    stamps = {}
    try:
        for name in filter(None, weights):
            path = Path(name).absolute()
            beside = list(path.parent.glob("*.json"))
            if path.parent.parent.name == "snapshots":
                beside += list((path.parent.parent.parent / "refs").glob("*"))
            for one in (path, *beside):
                status = one.stat()
                times = [status.st_mtime_ns, status.st_ctime_ns]
                stamps[os.fspath(one)] = [os.fspath(one), status.st_size, *times]
    except OSError:
        return None
    return [stamps[path] for path in sorted(stamps)]


def write_record(
    report: Report,
    request: Mapping[str, Any] | None,
    *,
    weights: Iterable[str],
    options: Options,
    started: datetime,
    seconds: Mapping[str, float],
) -> None:
    """Leave ``run.json`` in each store of a run.

    Args:
        weights: files that were loaded.
        seconds: that its stages took.
    """
    stamps = stamps_of(weights)
    for store in report.stores:
        manifest = Manifest.read(store.out / MANIFEST)
        content = {
            "format": FORMAT,
            "version": VERSION,
            "started": started.isoformat(timespec="seconds"),
            "ended": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "process": os.getpid(),
            "store": manifest.checksum,
            "request": request if stamps is not None else None,
            "files": stamps,
            "options": json.loads(json.dumps(asdict(options))),
            "device": report.device,
            "precision": report.precision,
            "least_cosine": report.least_cosine,
            "compiled": report.is_compiled,
            "counts": {
                "images": report.images,
                "resumed": report.resumed,
                "passed_over": report.passed_over,
                "rows": store.rows,
                "failures": store.failed,
                "added": store.added,
                "changed": store.changed,
                "gone": store.gone,
            },
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "spent": report.spent and report.spent.as_dict(),
            "exit_code": report.exit_code,
            "checksum": "",
        }
        text = with_checksum(json.dumps(content, indent=2, ensure_ascii=True) + "\n")
        try:
            write_atomically(store.out / RUN, text.encode("ascii"))
        except OSError as error:  # the store itself is complete
            log.warning("cannot write %s: %s", store.out / RUN, error.strerror)


def follow(folder: Path, before: Manifest, after: Manifest) -> None:
    """Let ``run.json`` speak of a store that was rewritten with the same rows."""
    try:
        content = json.loads((folder / RUN).read_text("ascii"))
        known = content["store"] == before.checksum
    except (OSError, ValueError, KeyError, TypeError):
        return
    if known:
        content |= {"store": after.checksum, "checksum": ""}
        text = with_checksum(json.dumps(content, indent=2, ensure_ascii=True) + "\n")
        write_atomically(folder / RUN, text.encode("ascii"))


def _request_in(folder: Path, manifest: Manifest) -> object:
    """What the run was asked for that made the store what it is; None where that is not known."""
    try:
        text = (folder / RUN).read_text("ascii")
        content = json.loads(text)
        whole = content["checksum"] == checksum(text) and content["store"] == manifest.checksum
        same = stamps_of(path for path, *_ in content["files"] or ()) == content["files"]
        return content["request"] if whole and same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def nothing_to_do(
    images: ImageList, models: Sequence[str], out: str | None, options: Options
) -> Report | None:
    """What a run would report that finds all of its images in the stores already.

    Looks at what the last run was asked for, at the index and at the files; no model is loaded.

    Returns:
        None where there is something to do, or where only the loaded model can tell.
    """
    if options.overwrite:
        return None
    names = planned_stores(models, options)
    request = request_of(models, options) if names is not None else None
    if names is None or request is None:
        return None
    started = datetime.now(timezone.utc)
    listing = listing_digest(images.paths)
    found = []
    for folder in map(Path, store_folders(out, names)):
        try:
            manifest = Manifest.read(folder / MANIFEST)
        except OSError:
            return None
        same_root = os.fsencode(manifest.description.root) == images.root
        if (folder / STAGING).exists() or not same_root:
            return None
        if _request_in(folder, manifest) != request:
            return None
        # Names that came or went are seen without a look at any file. Of images that are no longer
        # there, and whose rows are kept, the manifest knows more.
        if manifest.listing != listing and not options.keep_missing:
            return None
        found.append((folder, manifest))
    current = current_images(images, content=options.check == "content")
    stores = []
    for folder, manifest in found:
        held = published_images(folder, manifest, digests=options.check == "content")
        made = plan_run(
            current, held, keep_missing=options.keep_missing, retry=options.retry_failed
        )
        if made.todo or made.changes(held):
            return None
        stores.append(
            StoreReport(
                out=folder,
                rows=manifest.rows,
                failed=manifest.failed,
                added=0,
                changed=0,
                gone=0,
                shape=manifest.description.shape,
                backbone=manifest.description.made_with,
                first_failures=tuple(
                    (show(one.path), one.message) for one in held.failures[:FAILURES_SHOWN]
                ),
            )
        )
    computation = found[0][1].description.computation
    return Report(
        stores=tuple(stores),
        images=len(images),
        resumed=len(images),
        passed_over=images.passed_over,
        device=str(computation["device"]),
        precision=str(computation["precision"]),
        least_cosine=computation.get("least_cosine"),
        is_compiled=bool(computation.get("compiled")),
        seconds=(datetime.now(timezone.utc) - started).total_seconds(),
        load_seconds=0.0,
        accepted_failure_rate=options.max_failure_rate,
    )
