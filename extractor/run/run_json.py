"""``run.json`` in each store: the request of the last run and what it did. Needs no torch."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from extractor.lease.software import software_versions
from extractor.models.naming import split_model
from extractor.models.provenance import Provenance
from extractor.options import Options
from extractor.report import Report, StoreReport
from extractor.store.atomic import write_atomically
from extractor.store.format import MANIFEST, RUN, Manifest, checksum, with_checksum

__all__ = [
    "Computed",
    "read_run_json",
    "relink_run_json",
    "request_of",
    "request_that_made",
    "write_run_json",
]

log = logging.getLogger(__name__)

FORMAT = "extractor-run"
VERSION = 1

# Variables that tell the libraries where their caches are.
CACHES = ("HF_HOME", "HF_HUB_CACHE", "TORCH_HOME", "XDG_CACHE_HOME", "HOME")

# Options that change how a run works, and not its rows.
RUN_ONLY = frozenset(
    {
        "overwrite",
        "workers",
        "threads",
        "compile",
        "fuse",
        "check",
        "exclude",
        "keep_missing",
        "keep_order",
        "retire",
        "retry_failed",
        "new_root",
        "max_pixels",
        "image_timeout",
        "max_failure_rate",
        "lock",
        "profile",
        "shard_images",  # cuts the rows into files
        "devices",
        "processes",
        "part",
        "engine",
        "address",
    }
)


def request_of(models: Sequence[str], options: Options) -> dict[str, Any] | None:
    """Return all that the rows of a run depend on, but for the images and the files of weights.

    Two runs with equal requests and the same files of weights make the same rows. Returns None
    where the request does not determine the rows: code of the user may import anything.
    """
    names = [name for model in models for name in split_model(model)]
    if any(".py:" in name for name in names):
        return None
    chosen = {key: value for key, value in asdict(options).items() if key not in RUN_ONLY}
    content = {
        "models": list(models),
        "options": chosen,
        "software": software_versions(),
        "folder": os.getcwd(),  # base of relative file names
        "caches": {name: os.environ.get(name) for name in CACHES},
    }
    loaded: dict[str, Any] = json.loads(json.dumps(content))
    return loaded


def _file_stamps(weights: Iterable[str]) -> list[list[Any]] | None:
    """Return path, size and times of files of weights, and of the files that led to them.

    A snapshot in the hub's cache is chosen by a file under ``refs``. Weights in a folder of the
    user have a ``config.json`` beside them, which the network is built from. Returns None where a
    file cannot be read.
    """
    stamps = {}
    try:
        for name in filter(None, weights):
            path = Path(name).absolute()
            related = list(path.parent.glob("*.json"))
            if path.parent.parent.name == "snapshots":
                related += list((path.parent.parent.parent / "refs").glob("*"))
            for file in (path, *related):
                status = file.stat()
                times = [status.st_mtime_ns, status.st_ctime_ns]
                stamps[os.fspath(file)] = [os.fspath(file), status.st_size, *times]
    except OSError:
        return None
    return [stamps[path] for path in sorted(stamps)]


@dataclass(frozen=True)
class Computed:
    """How the rows of a run came about.

    Attributes:
        backbones: Origins of the backbones of each store.
        threads: Number of threads that computed on a CPU.
    """

    backbones: Sequence[Sequence[Provenance]]
    threads: int


def write_run_json(
    report: Report,
    request: Mapping[str, Any] | None,
    *,
    computed: Computed,
    options: Options,
    started: datetime,
    seconds: Mapping[str, float],
) -> None:
    """Write ``run.json`` into each store of a run.

    Args:
        report: Report of the run.
        request: Request of the run, see :func:`request_of`.
        computed: How the rows came about.
        options: Options of the run.
        started: Start of the run.
        seconds: Duration of each stage.
    """
    stamps = _file_stamps(origin.file for origins in computed.backbones for origin in origins)
    run = {
        "started": started.isoformat(timespec="seconds"),
        "ended": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "process": os.getpid(),
    }
    for store, origins in zip(report.stores, computed.backbones, strict=True):
        manifest = Manifest.read(store.out / MANIFEST)
        content = {
            "format": FORMAT,
            "version": VERSION,
            **run,
            "store": manifest.checksum,
            "request": request if stamps is not None else None,
            "files": stamps,
            "backbones": [_located(origin) for origin in origins],
            "computed": _computed(store, computed.threads, options),
            "options": json.loads(json.dumps(asdict(options))),
            "device": report.device,
            "precision": report.precision,
            "least_cosine": report.least_cosine,
            "compiled": report.is_compiled,
            "counts": _counts(report, store),
            "skipped": dict(report.skipped),
            "excluded": dict(report.excluded),
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "spent": report.spent and report.spent.as_dict(),
            "workers": [worker.as_dict() for worker in report.workers],
            "busy": {device: round(share, 3) for device, share in report.busy.items()},
            "exit_code": report.exit_code,
            "checksum": "",
        }
        _write(store.out, content)


def _located(origin: Provenance) -> dict[str, str]:
    """Return what finds a backbone again: its digest, and the files that it came from."""
    file = os.path.abspath(origin.file) if origin.file else ""
    return {
        "model": origin.model,
        "sha256": origin.sha256,
        "file": file,
        "function": origin.function,
    }


def _computed(store: StoreReport, threads: int, options: Options) -> dict[str, Any]:
    """Return how the newest rows of a store were computed, by this run or by an earlier one."""
    before = read_run_json(store.out).get("computed")
    if not (store.added or store.changed) and isinstance(before, dict):
        return before
    return {"threads": threads, "fuse": options.fuse}


def read_run_json(folder: Path) -> dict[str, Any]:
    """Return the content of ``run.json``, or nothing where it is missing or damaged."""
    try:
        content = json.loads((folder / RUN).read_text("ascii"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _counts(report: Report, store: StoreReport) -> dict[str, int]:
    return {
        "images": report.images,
        "resumed": report.resumed,
        "passed_over": report.passed_over,
        **store.counts,
    }


def _write(folder: Path, content: Mapping[str, Any]) -> None:
    text = with_checksum(json.dumps(content, indent=2, ensure_ascii=True) + "\n")
    try:
        write_atomically(folder / RUN, text.encode("ascii"))
    except OSError as error:  # the store itself is complete
        log.warning("cannot write %s: %s", folder / RUN, error.strerror)


def relink_run_json(folder: Path, before: Manifest, after: Manifest) -> None:
    """Make ``run.json`` refer to the new manifest of a store whose rows are the same.

    Does nothing if it does not refer to the manifest before.
    """
    content = read_run_json(folder)
    if content.get("store") == before.checksum:
        _write(folder, content | {"store": after.checksum, "checksum": ""})


def request_that_made(folder: Path, manifest: Manifest) -> object:
    """Return the request of the run that made a store.

    Returns None where ``run.json`` is missing, damaged, of another state of the store, or where a
    file of weights changed since.
    """
    try:
        text = (folder / RUN).read_text("ascii")
        content = json.loads(text)
        is_valid = content["checksum"] == checksum(text) and content["store"] == manifest.checksum
        is_same = _file_stamps(path for path, *_ in content["files"] or ()) == content["files"]
        request = content["request"] if is_valid and is_same else None
        if request is not None:
            for name in RUN_ONLY:  # earlier versions listed some of them
                request["options"].pop(name, None)
        return request
    except (OSError, ValueError, KeyError, TypeError):
        return None
