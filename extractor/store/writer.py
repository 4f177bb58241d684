"""Writes a store beside its place and publishes it whole: files first, the manifest last."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from extractor.errors import StoreError
from extractor.store.files import describe, sync_folder, undisturbed, write_whole
from extractor.store.format import (
    FAILURES,
    FEATURES,
    IMAGES,
    JOB,
    JOURNAL,
    MANIFEST,
    STAGING,
    Description,
    Manifest,
    images_name,
)
from extractor.store.index import read_index
from extractor.store.journal import FailureRecord, ImageRecord
from extractor.store.lock import Lock
from extractor.store.place import check_place, clear, explained, recover
from extractor.store.shard import FinishedShard, ShardWriter, journal_name

__all__ = ["Job", "StoreWriter"]


@dataclass(frozen=True)
class Job:
    """What a run is asked for; one that is the same goes on where an interrupted one stopped.

    Attributes:
        images: how many there are.
        listing: digest of their paths, :func:`extractor.store.format.listing_digest`.
    """

    description: Description
    images: int
    listing: str

    def differences(self, other: Job) -> list[str]:
        """What an interrupted run was asked for otherwise, each with both sides."""
        differ = self.description.differences(other.description)
        if (self.images, self.listing) != (other.images, other.listing):
            differ.append(f"images: {self.images} there, {other.images} now, not the same paths")
        return differ

    def to_json(self) -> str:
        """The text of ``job.json``."""
        content = {**asdict(self.description), "images": self.images, "listing": self.listing}
        return json.dumps(content, ensure_ascii=True) + "\n"

    @classmethod
    def from_json(cls, text: bytes) -> Job:
        """What :meth:`to_json` wrote.

        Raises:
            ValueError, KeyError, TypeError: something else.
        """
        content = json.loads(text)
        described = {key: content[key] for key in Description.__dataclass_fields__}
        return cls(Description(**described), content["images"], content["listing"])


class StoreWriter:
    """Builds one store in a hidden folder inside its place; :meth:`publish` makes it visible.

    A context manager: entering claims the place. Leaving without :meth:`publish` gives it up as it
    was, or, after :meth:`begin`, keeps what was done for the next run of the same job. Nothing that
    is there is touched before the new store is complete.

    Args:
        out: folder of the store; made where it is not there.
        overwrite: a finished store in ``out`` may be replaced, and an interrupted run thrown away.

    Raises:
        StoreError: ``out`` cannot be written, is in use, or holds something else.
    """

    def __init__(self, out: Path, *, overwrite: bool = False) -> None:
        self._out = out
        self._overwrite = overwrite
        self._staging = out / STAGING
        self._lock = Lock(self._staging / "lock")
        self._made: list[Path] = []  # folders that were not there before
        self._prepared = False
        self._keep = False
        self._finished: dict[int, FinishedShard] = {}

    def __enter__(self) -> StoreWriter:
        check_place(self._out, overwrite=self._overwrite)
        with explained(self._out):
            try:
                self._make_folders()
                self._lock.__enter__()
            except BaseException:
                self._unmake_folders()
                raise
            try:
                recover(self._out)
                check_place(self._out, overwrite=self._overwrite)
            except BaseException:
                self._give_up()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self._give_up()

    def begin(self, job: Job, *, anew: bool = False) -> int:
        """Take up what an interrupted run of the same job has done, or start anew.

        Args:
            anew: take up nothing.

        Returns:
            How many images, from the first on, are done.

        Raises:
            StoreError: an interrupted run was asked for something else, and ``overwrite`` is not
                set; says what.
        """
        with explained(self._out):
            there = None if anew else self._staged_job()
            differ = there.differences(job) if there is not None else []
            if differ and not self._overwrite:
                raise StoreError(
                    f"{self._out} holds an interrupted run that was asked for something else "
                    f"({'; '.join(differ[:5])}); repeat what it was asked for, or start anew with "
                    "--overwrite, or choose another --out"
                )
            if there is None or differ:
                self._finished.clear()
                self._start_anew()
                write_whole(self._staging / JOB, job.to_json().encode())
                sync_folder(self._staging)
            else:
                self._prepared = True
                self._take_up()
            self._keep = True
            return self._images_done(job)

    def discard(self) -> None:
        """Keep nothing of what was done: going on there would come to the same end."""
        self._keep = False

    def is_finished(self, number: int) -> bool:
        """Whether shard ``number`` is done."""
        return number in self._finished

    def shard(self, number: int, description: Description) -> ShardWriter:
        """Begin shard ``number``, or go on with it; it counts once it has been finished."""
        with explained(self._out):
            if not self._prepared:
                self._start_anew()
            return ShardWriter(self._staging, number, description, self._finished)

    def records_done(self, description: Description) -> Iterator[ImageRecord]:
        """The images that an interrupted run has given rows, as they were then."""
        with explained(self._out):
            for number, finished in sorted(self._finished.items()):
                if finished.entry is not None:
                    yield from read_index(self._staging / images_name(number))
            number = self._next_shard()
            if (self._staging / journal_name(number)).exists():
                with ShardWriter(self._staging, number, description, self._finished) as shard:
                    for entry in shard.entries:
                        yield from entry.records

    def failures_done(self, description: Description) -> Iterator[FailureRecord]:
        """The images that an interrupted run has found without a row."""
        with explained(self._out):
            for _, finished in sorted(self._finished.items()):
                yield from finished.failures
            number = self._next_shard()
            if (self._staging / journal_name(number)).exists():
                with ShardWriter(self._staging, number, description, self._finished) as shard:
                    for entry in shard.entries:
                        yield from entry.failures

    def publish(self, job: Job) -> Manifest:
        """Complete the store, make it visible and return its manifest."""
        with explained(self._out):
            if not self._prepared:
                self._start_anew()
            finished = [one for _, one in sorted(self._finished.items())]
            failures = "".join(map(_failure_line, itertools.chain(*(f.failures for f in finished))))
            write_whole(self._staging / FAILURES, failures.encode("ascii"))
            shards = tuple(one.entry for one in finished if one.entry is not None)
            manifest = Manifest(
                job.description,
                job.images,
                job.listing,
                sum(shard.rows for shard in shards),
                shards,
                describe(self._staging / FAILURES, FAILURES),
                datetime.now(timezone.utc).isoformat(timespec="seconds"),
            )
            for folder in (self._staging / FEATURES, self._staging / IMAGES):
                sync_folder(folder)
            check_place(self._out, overwrite=self._overwrite)
            with undisturbed():
                # From here on the new store is complete: if this run dies, the next finishes it.
                write_whole(self._staging / MANIFEST, manifest.to_json().encode())
                sync_folder(self._staging)
                recover(self._out)
                self._made.clear()
                self._keep = False
                self._give_up()
        return manifest

    # -- what is staged

    def _start_anew(self) -> None:
        clear(self._staging)
        for name in (FEATURES, IMAGES, JOURNAL):
            (self._staging / name).mkdir()
        self._prepared = True

    def _staged_job(self) -> Job | None:
        """What an interrupted run was asked for; None where there was none, or it left nothing."""
        try:
            return Job.from_json((self._staging / JOB).read_bytes())
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):  # it died before it had begun
            return None

    def _take_up(self) -> None:
        for name in (FEATURES, IMAGES, JOURNAL):
            (self._staging / name).mkdir(exist_ok=True)
        for path in sorted((self._staging / JOURNAL).glob("*.done")):
            finished = FinishedShard.from_json(path.read_bytes())
            if finished.is_whole(self._staging):
                self._finished[finished.shard] = finished

    def _next_shard(self) -> int:
        return max(self._finished, default=-1) + 1

    def _images_done(self, job: Job) -> int:
        done = sum(finished.images for finished in self._finished.values())
        number = self._next_shard()
        if not (self._staging / journal_name(number)).exists():
            return done
        with ShardWriter(self._staging, number, job.description, self._finished) as shard:
            if shard.images == min(job.description.shard_images, job.images - done):
                shard.finish()  # the run died before it could
            return done + shard.images

    def _has_work(self) -> bool:
        journals = (self._staging / JOURNAL).glob("*.jsonl")
        return bool(self._finished) or any(path.stat().st_size for path in journals)

    # -- the place

    def _make_folders(self) -> None:
        missing = []
        folder = self._staging
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another run was quicker
                folder.mkdir()
                self._made.append(folder)

    def _unmake_folders(self) -> None:
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):  # not empty: someone else uses it by now
                folder.rmdir()

    def _give_up(self) -> None:
        with contextlib.suppress(OSError):  # what is left is cleared by the next run
            complete = (self._staging / MANIFEST).is_file()  # the next run publishes it
            staged = not self._prepared and self._staged_job() is not None
            if complete or staged or (self._keep and self._has_work()):
                self._lock.__exit__()
                return
            clear(self._staging)
            (self._staging / "lock").unlink(missing_ok=True)
            self._staging.rmdir()
        self._lock.__exit__()
        self._unmake_folders()


def _failure_line(failure: FailureRecord) -> str:
    entry = {
        "path": os.fsdecode(failure.path),
        "error": failure.reason,
        "message": failure.message,
    }
    return json.dumps(entry, ensure_ascii=True) + "\n"
