"""The folder of a store: whether one may be written there, and how it takes its place."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from extractor.errors import StoreError
from extractor.store.atomic import sync_folder, write_whole
from extractor.store.format import (
    FAILURES,
    FEATURES,
    IMAGES,
    IN_FLIGHT,
    JOB,
    JOURNAL,
    MANIFEST,
    REPLACED,
    STAGING,
    SUSPECTS,
    Manifest,
)
from extractor.store.lock import Lock

__all__ = ["check_place", "clear", "explained", "finish_publishing", "locate", "recover"]


def finish_publishing(out: Path, *, lock: bool = True) -> None:
    """Publish the store of a run that was complete when it died, and clear what it left.

    What an interrupted run has done, and the next one goes on with, is not touched.

    Args:
        lock: refuse where files cannot be locked.

    Raises:
        StoreError: another run is at work there, or the place cannot be written.
    """
    staging = out / STAGING
    complete = (staging / MANIFEST).is_file()
    if not complete and ((staging / JOB).is_file() or not staging.is_dir()):
        return
    with explained(out):
        _check_staging(staging)
        with Lock(staging / "lock", required=lock):
            recover(out)
            clear(staging)
            (staging / "lock").unlink(missing_ok=True)
            staging.rmdir()


def check_place(out: Path, *, occupied: bool, locked: bool = False) -> None:
    """See whether a store may be written to ``out``; changes nothing.

    Args:
        occupied: a finished store may be there, to be extended or replaced.
        locked: see, too, whether another run is at work there.

    Raises:
        StoreError: it is a file, holds a finished store that may not be replaced, or other files.
    """
    with explained(out):
        if not out.exists():
            if out.is_symlink():
                raise StoreError(f"{out} is a link that leads nowhere; choose another --out")
            above = next(folder for folder in out.absolute().parents if folder.exists())
            if not above.is_dir():
                raise StoreError(f"{above} is a file, expected a folder; choose another --out")
            if not os.access(above, os.W_OK):
                raise StoreError(f"nothing can be written to {above}; choose another --out")
            return
        if not out.is_dir():
            raise StoreError(
                f"{out} is a file, expected a folder for the store; choose another --out"
            )
        _check_staging(out / STAGING)
        if locked:
            Lock(out / STAGING / "lock", required=False).check()
        if (out / MANIFEST).is_file():
            there = Manifest.from_json((out / MANIFEST).read_bytes(), str(out / MANIFEST))
            if not occupied:
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
    named = (FAILURES, MANIFEST, JOB, REPLACED, SUSPECTS)
    ours = {"lock", FEATURES, IMAGES, JOURNAL, IN_FLIGHT, *named}
    ours |= {f"{name}.partial" for name in named}
    if staging.is_symlink() or (staging.is_dir() and not ours.issuperset(os.listdir(staging))):
        raise StoreError(
            f"{staging} is not what a run of this program leaves there; move it away, or choose "
            "another --out"
        )


def _check_only(out: Path, there: Manifest) -> None:
    """Refuse to replace a store in whose folders someone has put files of their own."""
    listed = {*_files_of(there), *_leftovers(out)}
    staged = out / STAGING / MANIFEST
    if staged.is_file():  # a run died while it moved the new files to their places
        listed.update(_files_of(Manifest.from_json(staged.read_bytes(), str(staged))))
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

    Every step may be repeated: a run that dies in here leaves the rest to the next one. Where the
    new store extends the old one, the old manifest stands until the new one takes its place in
    one step. Where it replaces it, files of the same name hold something else, so the old manifest
    goes first and the new one comes last: at no time does a manifest list files that are not its
    own. Who reads a store looks for all of it in the staging folder first (:func:`locate`).
    """
    staging = out / STAGING
    replaced = staging / REPLACED
    if (staging / MANIFEST).is_file():
        new = Manifest.from_json((staging / MANIFEST).read_bytes(), str(staging / MANIFEST))
        (staging / JOB).unlink(missing_ok=True)  # there is nothing left to go on with
        if (out / MANIFEST).is_file():
            content = (out / MANIFEST).read_bytes()
            if _extends(new, Manifest.from_json(content, str(out / MANIFEST))):
                write_whole(replaced, content)
            else:
                os.replace(out / MANIFEST, replaced)
                sync_folder(out)
        for folder in (FEATURES, IMAGES):
            (out / folder).mkdir(exist_ok=True)
        for name in _files_of(new):
            if (staging / name).is_file():
                os.replace(staging / name, out / name)
        for folder in (FEATURES, IMAGES):
            sync_folder(out / folder)
        sync_folder(out)
        os.replace(staging / MANIFEST, out / MANIFEST)
        sync_folder(out)
    if replaced.is_file() and (out / MANIFEST).is_file():
        new = Manifest.from_json((out / MANIFEST).read_bytes(), str(out / MANIFEST))
        for name in sorted(set(_leftovers(out)) - set(_files_of(new))):
            (out / name).unlink(missing_ok=True)
        replaced.unlink()


def locate(out: Path, name: str) -> Path:
    """Where a file of the newest complete store is, while it may be on its way to its place.

    The new manifest stands in the staging folder from the moment on in which all is complete; each
    file of it lies there or, already, in its place.
    """
    staged = out / STAGING / name
    return staged if (out / STAGING / MANIFEST).is_file() and staged.is_file() else out / name


def _leftovers(out: Path) -> list[str]:
    """Files of the store that was replaced last, if a run died before they were removed."""
    replaced = out / STAGING / REPLACED
    if not replaced.is_file():
        return []
    return _files_of(Manifest.from_json(replaced.read_bytes(), str(replaced)))


def _extends(new: Manifest, old: Manifest) -> bool:
    """Whether no file of the old shards gets other bytes under its name."""
    entries = [entry for shard in old.shards for entry in (shard.features, shard.index)]
    before = {entry.name: entry for entry in entries}
    return all(
        before.get(entry.name, entry) == entry
        for shard in new.shards
        for entry in (shard.features, shard.index)
    )


def _files_of(manifest: Manifest) -> list[str]:
    shards = [entry.name for shard in manifest.shards for entry in (shard.features, shard.index)]
    return [*shards, manifest.failures.name]


def _is_published_halfway(out: Path) -> bool:
    return (out / STAGING / MANIFEST).is_file()


def clear(staging: Path) -> None:
    """Remove whatever a run that died has left, but for the lock."""
    for entry in os.scandir(staging):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        elif entry.name != "lock":
            os.unlink(entry.path)


@contextlib.contextmanager
def explained(out: Path) -> Iterator[None]:
    """Turn what the file system says into a :class:`StoreError`."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"cannot write the store {out}: {error.strerror or error}"
            f"{f' ({error.filename})' if error.filename else ''}; nothing that was there is lost"
        ) from error
