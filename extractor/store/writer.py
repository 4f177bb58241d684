"""Writes a store beside its place and publishes it whole: files first, the manifest last."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, NamedTuple

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
from extractor.store.lock import Lock

__all__ = ["ImageRecord", "ShardWriter", "StoreWriter"]

REPLACED = "replaced.json"  # the old manifest, while the new store takes its place


class ImageRecord(NamedTuple):
    """One row of a shard's index; ``path`` relative to the root, sizes in bytes and pixels."""

    path: bytes
    size: int
    mtime_ns: int
    width: int
    height: int


class StoreWriter:
    """Builds one store in a hidden folder inside its place; :meth:`publish` makes it visible.

    A context manager: entering claims the place, leaving without :meth:`publish` gives it up as it
    was. Nothing that is there is touched before the new store is complete.

    Args:
        out: folder of the store; made where it is not there.
        overwrite: a finished store in ``out`` may be replaced.

    Raises:
        StoreError: ``out`` cannot be written, is in use, or holds something else.
    """

    def __init__(self, out: Path, *, overwrite: bool = False) -> None:
        self._out = out
        self._overwrite = overwrite
        self._staging = out / STAGING
        self._lock = Lock(self._staging / "lock")
        self._made: list[Path] = []  # folders that were not there before
        self._failures: IO[str] | None = None
        self._shards: list[ShardEntry] = []

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
                _clear(self._staging)
                (self._staging / FEATURES).mkdir()
                (self._staging / IMAGES).mkdir()
                self._failures = (self._staging / FAILURES).open("x", encoding="ascii")
            except BaseException:
                self._give_up()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self._give_up()

    def shard(self, number: int, description: Description) -> ShardWriter:
        """Begin shard ``number``; it counts once its writer has been finished."""
        return ShardWriter(self._staging, number, description, self._shards)

    def fail(self, path: bytes, reason: str, message: str) -> None:
        """Note an image that has no row."""
        assert self._failures is not None
        entry = {"path": os.fsdecode(path), "error": reason, "message": message}
        with _explained(self._out):
            self._failures.write(json.dumps(entry, ensure_ascii=True) + "\n")

    def publish(self, description: Description, images: int) -> Manifest:
        """Complete the store, make it visible and return its manifest.

        Args:
            images: how many images were asked for.
        """
        assert self._failures is not None
        with _explained(self._out):
            self._failures.flush()
            os.fsync(self._failures.fileno())
            manifest = Manifest(
                description,
                images,
                sum(shard.rows for shard in self._shards),
                tuple(self._shards),
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
                self._give_up()
        return manifest

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
        if self._failures is not None:
            with contextlib.suppress(OSError):
                self._failures.close()
            self._failures = None
        with contextlib.suppress(OSError):  # what is left is cleared by the next run
            if (self._staging / MANIFEST).is_file():  # complete: the next run publishes it
                self._lock.__exit__()
                return
            _clear(self._staging)
            (self._staging / "lock").unlink(missing_ok=True)
            self._staging.rmdir()
        self._lock.__exit__()
        self._unmake_folders()


class ShardWriter:
    """Appends rows to one shard; memory does not grow with them, but for the index.

    A context manager; leaving it without :meth:`finish` leaves no shard.
    """

    def __init__(
        self, staging: Path, number: int, description: Description, finished: list[ShardEntry]
    ) -> None:
        self._staging = staging
        self._number = number
        self._dtype = np.dtype(description.dtype).newbyteorder("<")
        self._row_shape = description.shape
        self._finished = finished
        self._records: list[ImageRecord] = []
        self._path = staging / features_name(number)
        self._beside = self._path.with_name(self._path.name + ".partial")
        with _explained(staging.parent):
            self._file = self._beside.open("xb")
            self._file.write(self._header(0))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # of a shard that is given up anyway
            self._file.close()

    def append(self, rows: npt.NDArray[np.floating], records: Sequence[ImageRecord]) -> None:
        """Add embeddings ``(n, *shape)``, cast to the stored type, with a record each."""
        if rows.shape != (len(records), *self._row_shape):
            raise ValueError(
                f"{rows.shape} rows for {len(records)} records of shape {self._row_shape}"
            )
        with _explained(self._staging.parent):
            self._file.write(np.ascontiguousarray(rows, dtype=self._dtype).data)
        self._records.extend(records)

    def finish(self, images: int) -> ShardEntry | None:
        """Close the shard of ``images`` images; None and no file where none of them has a row."""
        with _explained(self._staging.parent):
            if not self._records:
                self._file.close()
                self._beside.unlink()
                return None
            self._file.seek(0)
            self._file.write(self._header(len(self._records)))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._beside, self._path)
            index = images_name(self._number)
            write_whole(self._staging / index, _index(self._records))
            entry = ShardEntry(
                self._number,
                images,
                len(self._records),
                describe(self._path, features_name(self._number)),
                describe(self._staging / index, index),
            )
        self._finished.append(entry)
        return entry

    def _header(self, rows: int) -> bytes:
        # numpy pads the header so that its length does not change with the number of rows.
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header,
            {"descr": self._dtype.str, "fortran_order": False, "shape": (rows, *self._row_shape)},
        )
        return header.getvalue()


def check_place(out: Path, *, overwrite: bool) -> None:
    """See whether a store may be written to ``out``; changes nothing.

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
    ours = {"lock", FEATURES, IMAGES, FAILURES, MANIFEST, f"{MANIFEST}.partial", REPLACED}
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


def _index(records: Sequence[ImageRecord]) -> bytes:
    """The Parquet file of a shard's index."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths: list[str] | list[bytes] = [record.path for record in records]
    kind = pa.binary()
    with contextlib.suppress(UnicodeDecodeError):
        paths = [record.path.decode() for record in records]
        kind = pa.string()
    table = pa.table(
        {
            "path": pa.array(paths, kind),
            "size": pa.array([record.size for record in records], pa.int64()),
            "mtime_ns": pa.array([record.mtime_ns for record in records], pa.int64()),
            "width": pa.array([record.width for record in records], pa.int32()),
            "height": pa.array([record.height for record in records], pa.int32()),
        }
    )
    content = io.BytesIO()
    pq.write_table(table, content)
    return content.getvalue()


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
