"""Writes a store beside its place and publishes it whole: files first, the manifest last."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import numpy.typing as npt

from extractor.errors import StoreError
from extractor.store.files import describe, sync_folder, undisturbed, write_whole
from extractor.store.format import (
    FAILURES,
    FEATURES,
    IMAGES,
    MANIFEST,
    STAGING,
    Description,
    Manifest,
    ShardEntry,
    features_name,
    images_name,
)
from extractor.store.index import index_bytes, read_index
from extractor.store.journal import (
    BatchEntry,
    FailureRecord,
    ImageRecord,
    Journal,
    read_journal,
)
from extractor.store.lock import Lock

__all__ = ["Job", "ShardWriter", "StoreWriter", "check_place", "finish_publishing"]

JOB = "job.json"  # what the run was asked for
JOURNAL = "journal"  # what it has done of each shard
REPLACED = "replaced.json"  # the old manifest, while the new store takes its place


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
        self._finished: dict[int, _FinishedShard] = {}

    def __enter__(self) -> StoreWriter:
        check_place(self._out, overwrite=self._overwrite)
        with _explained(self._out):
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
        with _explained(self._out):
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
        with _explained(self._out):
            if not self._prepared:
                self._start_anew()
            return ShardWriter(self._staging, number, description, self._finished)

    def records_done(self, description: Description) -> Iterator[ImageRecord]:
        """The images that an interrupted run has given rows, as they were then."""
        with _explained(self._out):
            for number, finished in sorted(self._finished.items()):
                if finished.entry is not None:
                    yield from read_index(self._staging / images_name(number))
            number = self._next_shard()
            if (self._staging / _journal_name(number)).exists():
                with ShardWriter(self._staging, number, description, self._finished) as shard:
                    for entry in shard.entries:
                        yield from entry.records

    def failures_done(self, description: Description) -> Iterator[FailureRecord]:
        """The images that an interrupted run has found without a row."""
        with _explained(self._out):
            for _, finished in sorted(self._finished.items()):
                yield from finished.failures
            number = self._next_shard()
            if (self._staging / _journal_name(number)).exists():
                with ShardWriter(self._staging, number, description, self._finished) as shard:
                    for entry in shard.entries:
                        yield from entry.failures

    def publish(self, job: Job) -> Manifest:
        """Complete the store, make it visible and return its manifest."""
        with _explained(self._out):
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
        _clear(self._staging)
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
            finished = _FinishedShard.from_json(path.read_bytes())
            if finished.is_whole(self._staging):
                self._finished[finished.shard] = finished

    def _next_shard(self) -> int:
        return max(self._finished, default=-1) + 1

    def _images_done(self, job: Job) -> int:
        done = sum(finished.images for finished in self._finished.values())
        number = self._next_shard()
        if not (self._staging / _journal_name(number)).exists():
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
            _clear(self._staging)
            (self._staging / "lock").unlink(missing_ok=True)
            self._staging.rmdir()
        self._lock.__exit__()
        self._unmake_folders()


@dataclass(frozen=True)
class _FinishedShard:
    """A shard that is done; ``entry`` is None where none of its images has a row."""

    shard: int
    images: int
    entry: ShardEntry | None
    failures: Sequence[FailureRecord]

    def to_json(self) -> str:
        failures = [[os.fsdecode(one.path), *one[1:]] for one in self.failures]
        entry = None if self.entry is None else asdict(self.entry)
        content = {
            "shard": self.shard,
            "images": self.images,
            "entry": entry,
            "failures": failures,
        }
        return json.dumps(content, ensure_ascii=True) + "\n"

    @classmethod
    def from_json(cls, text: bytes) -> _FinishedShard:
        content = json.loads(text)
        failures = [FailureRecord(os.fsencode(one[0]), *one[1:]) for one in content["failures"]]
        entry = None if content["entry"] is None else ShardEntry.from_mapping(content["entry"])
        return cls(content["shard"], content["images"], entry, failures)

    def is_whole(self, staging: Path) -> bool:
        """Whether its files are there in their full size."""
        files = () if self.entry is None else (self.entry.features, self.entry.index)
        return all(_size(staging / file.name) == file.bytes for file in files)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


class ShardWriter:
    """Appends rows to one shard; memory does not grow with them, but for the index.

    A context manager; leaving it without :meth:`finish` leaves no shard, but what the next run of
    the same job goes on with.
    """

    def __init__(
        self,
        staging: Path,
        number: int,
        description: Description,
        finished: dict[int, _FinishedShard],
    ) -> None:
        self._staging = staging
        self._number = number
        self._dtype = np.dtype(description.dtype).newbyteorder("<")
        self._row_shape = description.shape
        self._finished = finished
        self._path = staging / features_name(number)
        self._beside = self._path.with_name(self._path.name + ".partial")
        header = self._header(0)
        if self._path.exists():  # a run died between its last rows and the end of the shard
            os.replace(self._path, self._beside)
        self._file = self._beside.open("r+b" if self._beside.exists() else "x+b")
        row_bytes = math.prod(self._row_shape) * self._dtype.itemsize
        journal = staging / _journal_name(number)
        self.entries = read_journal(journal, self._file, row_bytes, len(header))
        self._file.seek(0)
        self._file.write(header)
        rows = sum(len(entry.records) for entry in self.entries)
        self._file.seek(len(header) + rows * row_bytes)
        self._file.truncate()
        self._journal = Journal(journal, self._file, self.entries)

    @property
    def images(self) -> int:
        """Images that the shard answers for so far."""
        return sum(entry.images for entry in self.entries)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._journal.sync()
        with contextlib.suppress(OSError):  # of a shard that is given up anyway
            self._journal.close()
            self._file.close()

    def append(
        self,
        rows: npt.NDArray[np.floating],
        records: Sequence[ImageRecord],
        failures: Sequence[FailureRecord] = (),
    ) -> None:
        """Add one batch: embeddings ``(n, *shape)``, cast to the stored type, with a record each.

        Args:
            failures: the images of the batch that have no row.
        """
        if rows.shape != (len(records), *self._row_shape):
            raise ValueError(
                f"{rows.shape} rows for {len(records)} records of shape {self._row_shape}"
            )
        entry = BatchEntry(tuple(records), tuple(failures))
        with _explained(self._staging.parent):
            self._journal.append(np.ascontiguousarray(rows, dtype=self._dtype).tobytes(), entry)
        self.entries.append(entry)

    def finish(self) -> ShardEntry | None:
        """Close the shard; None and no file where none of its images has a row."""
        records = [record for entry in self.entries for record in entry.records]
        failures = [failure for entry in self.entries for failure in entry.failures]
        entry = None
        with _explained(self._staging.parent):
            self._journal.sync()
            self._journal.close()
            if records:
                self._file.seek(0)
                self._file.write(self._header(len(records)))
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self._beside, self._path)
                index = images_name(self._number)
                write_whole(self._staging / index, index_bytes(records))
                entry = ShardEntry(
                    self._number,
                    self.images,
                    len(records),
                    describe(self._path, features_name(self._number)),
                    describe(self._staging / index, index),
                )
            else:
                self._file.close()
                self._beside.unlink()
            done = _FinishedShard(self._number, self.images, entry, failures)
            write_whole(self._staging / _done_name(self._number), done.to_json().encode())
            (self._staging / _journal_name(self._number)).unlink()
        self._finished[self._number] = done
        return entry

    def _header(self, rows: int) -> bytes:
        # numpy pads the header so that its length does not change with the number of rows.
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header,
            {"descr": self._dtype.str, "fortran_order": False, "shape": (rows, *self._row_shape)},
        )
        return header.getvalue()


def _journal_name(shard: int) -> str:
    return f"{JOURNAL}/{shard:05d}.jsonl"


def _done_name(shard: int) -> str:
    return f"{JOURNAL}/{shard:05d}.done"


def _failure_line(failure: FailureRecord) -> str:
    entry = {
        "path": os.fsdecode(failure.path),
        "error": failure.reason,
        "message": failure.message,
    }
    return json.dumps(entry, ensure_ascii=True) + "\n"


def finish_publishing(out: Path) -> None:
    """Publish the store of a run that was complete when it died, and clear what it left.

    What an interrupted run has done, and the next one goes on with, is not touched.

    Raises:
        StoreError: another run is at work there, or the place cannot be written.
    """
    staging = out / STAGING
    complete = (staging / MANIFEST).is_file()
    if not complete and ((staging / JOB).is_file() or not staging.is_dir()):
        return
    with _explained(out):
        _check_staging(staging)
        with Lock(staging / "lock"):
            recover(out)
            _clear(staging)
            (staging / "lock").unlink(missing_ok=True)
            staging.rmdir()


def check_place(out: Path, *, overwrite: bool, locked: bool = False) -> None:
    """See whether a store may be written to ``out``; changes nothing.

    Args:
        locked: see, too, whether another run is at work there.

    Raises:
        StoreError: it is a file, holds a finished store that may not be replaced, or other files.
    """
    with _explained(out):
        if not out.exists():
            if out.is_symlink():
                raise StoreError(f"{out} is a link that leads nowhere; choose another --out")
            return
        if not out.is_dir():
            raise StoreError(
                f"{out} is a file, expected a folder for the store; choose another --out"
            )
        _check_staging(out / STAGING)
        if locked:
            Lock(out / STAGING / "lock").check()
        if (out / MANIFEST).is_file():
            there = Manifest.from_json((out / MANIFEST).read_bytes(), str(out / MANIFEST))
            if not overwrite:
                raise StoreError(
                    f"{out} holds a finished store: {there.rows} rows of "
                    f"{there.description.made_with}; replace it with --overwrite, or choose "
                    "another --out"
                )
            _check_only(out, there)
        elif any(name != STAGING for name in os.listdir(out)) and not _is_published_halfway(out):
            raise StoreError(
                f"{out} is not empty and holds no store; nothing in it was touched, choose "
                "another --out"
            )


def _check_staging(staging: Path) -> None:
    """Refuse to take for our own a staging folder that we did not make."""
    named = (FAILURES, MANIFEST, JOB)
    ours = {"lock", FEATURES, IMAGES, JOURNAL, REPLACED, *named}
    ours |= {f"{name}.partial" for name in named}
    if staging.is_symlink() or (staging.is_dir() and not ours.issuperset(os.listdir(staging))):
        raise StoreError(
            f"{staging} is not what a run of this program leaves there; move it away, or choose "
            "another --out"
        )


def _check_only(out: Path, there: Manifest) -> None:
    """Refuse to replace a store in whose folders someone has put files of their own."""
    listed = set(_files_of(there))
    for folder in (FEATURES, IMAGES):
        if (out / folder).is_symlink():
            raise StoreError(f"{out / folder} is a link, expected a folder; choose another --out")
        if (out / folder).is_dir():
            foreign = sorted({f"{folder}/{name}" for name in os.listdir(out / folder)} - listed)
            if foreign:
                raise StoreError(
                    f"{out} holds files that are not the store's ({', '.join(foreign[:5])}); move "
                    "them away, or choose another --out"
                )


def recover(out: Path) -> None:
    """Bring a store that is complete but not yet published to its place; else do nothing.

    Every step may be repeated: a run that dies in here leaves the rest to the next one. The old
    manifest goes first and the new one comes last, so that at no time it lists files that are not
    its own.
    """
    staging = out / STAGING
    if not (staging / MANIFEST).is_file():
        return
    new = Manifest.from_json((staging / MANIFEST).read_bytes(), str(staging / MANIFEST))
    (staging / JOB).unlink(missing_ok=True)  # there is nothing left to go on with
    replaced = staging / REPLACED
    if (out / MANIFEST).is_file():
        os.replace(out / MANIFEST, replaced)
        sync_folder(out)
    for folder in (FEATURES, IMAGES):
        (out / folder).mkdir(exist_ok=True)
    names = _files_of(new)
    for name in names:
        if (staging / name).is_file():
            os.replace(staging / name, out / name)
    if replaced.is_file():
        old = Manifest.from_json(replaced.read_bytes(), str(replaced))
        for name in set(_files_of(old)) - set(names):
            (out / name).unlink(missing_ok=True)
    for folder in (FEATURES, IMAGES):
        sync_folder(out / folder)
    sync_folder(out)
    os.replace(staging / MANIFEST, out / MANIFEST)
    sync_folder(out)


def _files_of(manifest: Manifest) -> list[str]:
    shards = [entry.name for shard in manifest.shards for entry in (shard.features, shard.index)]
    return [*shards, manifest.failures.name]


def _is_published_halfway(out: Path) -> bool:
    return (out / STAGING / MANIFEST).is_file()


def _clear(staging: Path) -> None:
    """Remove whatever a run that died has left, but for the lock."""
    for entry in os.scandir(staging):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        elif entry.name != "lock":
            os.unlink(entry.path)


@contextlib.contextmanager
def _explained(out: Path) -> Iterator[None]:
    """Turn what the file system says into a :class:`StoreError`."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"cannot write the store {out}: {error.strerror or error}"
            f"{f' ({error.filename})' if error.filename else ''}; nothing that was there is lost"
        ) from error
