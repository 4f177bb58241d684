"""Output folder of a store: check it, publish a complete store by rename, locate its files."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from extractor.errors import StoreDamagedError, StoreError
from extractor.store.atomic import store_errors, sync_folder, write_atomically
from extractor.store.format import (
    DERIVED,
    FAILURES,
    FEATURES,
    HISTORY,
    IMAGES,
    IN_FLIGHT,
    JOB,
    JOURNAL,
    LIST_ROWS,
    MANIFEST,
    PLAN,
    PLAN_PATHS,
    REPLACED,
    RUN,
    STAGING,
    SUSPECTS,
    TRANSFORM,
    WORKERS,
    DamagedManifestError,
    FileEntry,
    Manifest,
)
from extractor.store.lock import Lock
from extractor.text import plural

__all__ = [
    "check_output_folder",
    "check_size",
    "clear_staging",
    "enclosing_store",
    "finish_publishing",
    "locate",
    "publish_staged",
]

NAMES_SHOWN = 5
# Everything that a store holds on its top level.
_NAMES = frozenset(
    {MANIFEST, RUN, FAILURES, HISTORY, LIST_ROWS, FEATURES, IMAGES, STAGING, DERIVED, *TRANSFORM}
)


def check_output_folder(
    out: Path, *, may_exist: bool, overwrite: bool = False, check_lock: bool = False
) -> None:
    """Check that a store may be written to a folder; change nothing.

    Args:
        out: the folder.
        may_exist: accept a finished store, which is then extended or replaced.
        overwrite: accept a store whose manifest is damaged, too.
        check_lock: also check that no other run is writing there.

    Raises:
        StoreDamagedError: the manifest is damaged.
        StoreBusyError: the folder is in use.
        StoreError: not a folder, not writable, in another store, or it holds a finished store or
            other files.
    """
    with store_errors(out):
        is_store = (out / MANIFEST).is_file() or (out / STAGING).is_dir()
        if not is_store and (above := enclosing_store(out)) is not None:
            raise StoreError(f"{out} is in the store {above}; choose an --out beside it")
        if not out.exists():
            _check_parent(out)
            return
        if not out.is_dir():
            raise StoreError(
                f"{out} is a file, expected a folder for the store; choose another --out"
            )
        _check_staging(out / STAGING)
        if check_lock:
            Lock(out / STAGING / "lock", required=False).check()
        if (out / MANIFEST).is_file():
            try:
                manifest = Manifest.read(out / MANIFEST)
            except DamagedManifestError as error:
                if not overwrite or not _files_by_name(out):
                    start = "" if overwrite else "start over with --overwrite, "
                    raise StoreDamagedError(
                        f"{error}; restore the file, {start}or choose another --out"
                    ) from error
                _check_foreign_files(out, _files_by_name(out))
                _check_foreign_names(out)
                return
            if not may_exist:
                raise StoreError(
                    f"{out} holds a finished store: {plural(manifest.rows, 'row')} of "
                    f"{manifest.description.made_with}; replace it with --overwrite, or choose "
                    "another --out"
                )
            _check_foreign_files(out, _files_of(manifest))
        elif any(name != STAGING for name in os.listdir(out)) and not _is_complete(out / STAGING):
            raise StoreError(
                f"{out} is not empty and holds no store; nothing in it was changed, choose "
                "another --out"
            )


def enclosing_store(path: str | os.PathLike[str]) -> Path | None:
    """Return the folder of the store that a file or folder is or would be in; None for none."""
    folders = Path(os.path.realpath(path)).parents
    return next((each for each in folders if os.path.isfile(each / MANIFEST)), None)


def _check_parent(out: Path) -> None:
    """Check that a missing folder can be made."""
    if out.is_symlink():
        raise StoreError(f"{out} is a broken link; choose another --out")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise StoreError(f"{parent} is a file, expected a folder; choose another --out")
    if not os.access(parent, os.W_OK):
        raise StoreError(f"{parent} is not writable; choose another --out")


def _check_staging(staging: Path) -> None:
    """Check that a staging folder holds only what this program leaves there."""
    files = (FAILURES, HISTORY, LIST_ROWS, MANIFEST, JOB, PLAN, REPLACED, SUSPECTS, *TRANSFORM)
    known = {"lock", FEATURES, IMAGES, JOURNAL, IN_FLIGHT, PLAN_PATHS, WORKERS, *files}
    known |= {f"{name}.partial" for name in files}
    if staging.is_symlink() or (staging.is_dir() and not known.issuperset(os.listdir(staging))):
        raise StoreError(
            f"{staging} was not left by a run of this program; move it away, or choose another "
            "--out"
        )


def _check_foreign_names(out: Path) -> None:
    """Check that a folder with a damaged manifest holds nothing else than a store."""
    foreign = sorted(set(os.listdir(out)) - _NAMES)
    if foreign:
        raise StoreError(
            f"{out / MANIFEST} is damaged, and {out} holds files that are not part of a store "
            f"({', '.join(foreign[:NAMES_SHOWN])}); move them away, or choose another --out"
        )


def _check_foreign_files(out: Path, files: Iterable[str]) -> None:
    """Check that the folders of a store hold no files of someone else."""
    listed = {*files, *_replaced_files(out)}
    staged = out / STAGING / MANIFEST
    if staged.is_file():  # a run died while it moved the new files
        listed.update(_files_of(Manifest.read(staged)))
    for folder in (FEATURES, IMAGES):
        if (out / folder).is_symlink():
            raise StoreError(f"{out / folder} is a link, expected a folder; choose another --out")
        if (out / folder).is_dir():
            foreign = sorted({f"{folder}/{name}" for name in os.listdir(out / folder)} - listed)
            if foreign:
                raise StoreError(
                    f"{out} holds files that are not part of the store "
                    f"({', '.join(foreign[:NAMES_SHOWN])}); move them away, or choose another --out"
                )


def finish_publishing(out: Path, *, lock: bool = True) -> None:
    """Publish the store of a run that died after it was complete, and clear its staging folder.

    An interrupted run, which the next one resumes, is not touched.

    Args:
        out: folder of the store.
        lock: fail if the file system does not support locks.

    Raises:
        StoreError: another run is writing there, or the folder is not writable.
    """
    staging = out / STAGING
    if not _is_complete(staging) and ((staging / JOB).is_file() or not staging.is_dir()):
        return
    with store_errors(out):
        _check_staging(staging)
        with Lock(staging / "lock", required=lock):
            publish_staged(out)
            clear_staging(staging)
            (staging / "lock").unlink(missing_ok=True)
            staging.rmdir()


def publish_staged(out: Path) -> None:
    """Publish a store that is complete in the staging folder; do nothing if there is none.

    Each step may be repeated: if a run dies in here, the next one does the rest. If the new store
    extends the old one, the old manifest stays until the new one replaces it in one step. If the
    new store replaces the old one, files of the same name have other content. Then the old manifest
    goes first and the new one comes last, so that no manifest ever lists files of another store.
    Readers look into the staging folder first (:func:`locate`).
    """
    staging = out / STAGING
    replaced = staging / REPLACED
    if _is_complete(staging):
        new = Manifest.read(staging / MANIFEST)
        (staging / JOB).unlink(missing_ok=True)  # nothing is left to resume
        if (out / MANIFEST).is_file():
            content = (out / MANIFEST).read_bytes()
            if _extends(new, content):
                write_atomically(replaced, content)
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
        new = Manifest.read(out / MANIFEST)
        for name in sorted(set(_replaced_files(out)) - set(_files_of(new))):
            (out / name).unlink(missing_ok=True)
        replaced.unlink()


def locate(out: Path, name: str) -> Path:
    """Return the path of a file of the newest complete store, even while it is published.

    Once the staging folder holds a manifest, that store is complete. Each of its files is in the
    staging folder or already in ``out``.
    """
    staged = out / STAGING / name
    return staged if _is_complete(out / STAGING) and staged.is_file() else out / name


def check_size(folder: Path, entry: FileEntry) -> None:
    """Check that a file of a store is there with its size.

    Raises:
        StoreDamagedError: It is missing, or has another size.
    """
    path = locate(folder, entry.name)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise StoreDamagedError(f"{path} is missing from the store") from error
    if size != entry.bytes:
        raise StoreDamagedError(f"{path} has {size} bytes, expected {entry.bytes}")


def clear_staging(staging: Path) -> None:
    """Remove everything in a staging folder except the lock."""
    for entry in os.scandir(staging):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        elif entry.name != "lock":
            os.unlink(entry.path)


def _is_complete(staging: Path) -> bool:
    """Return whether a staging folder holds a complete store that is not yet published."""
    return (staging / MANIFEST).is_file()


def _replaced_files(out: Path) -> list[str]:
    """Return the files of the store that was replaced last, if a run died before removing them."""
    replaced = out / STAGING / REPLACED
    if not replaced.is_file():
        return []
    try:
        return _files_of(Manifest.read(replaced))
    except DamagedManifestError:
        return _files_by_name(out)


def _files_by_name(out: Path) -> list[str]:
    """Return the files that have a name as in a store, for a store whose manifest is damaged."""
    names = [
        f"{folder}/{name}"
        for folder, suffix in ((FEATURES, "npy"), (IMAGES, "parquet"))
        if (out / folder).is_dir()
        for name in os.listdir(out / folder)
        if re.fullmatch(rf"\d{{5}}\.{suffix}", name)
    ]
    others = (FAILURES, HISTORY, LIST_ROWS, *TRANSFORM)
    return [*names, *(name for name in others if (out / name).is_file())]


def _extends(new: Manifest, old: bytes) -> bool:
    """Return whether all files of shards and transform in an old manifest keep their content."""
    try:
        kept = Manifest.from_json(old, MANIFEST).kept_files
    except DamagedManifestError:
        return False
    before = {entry.name: entry for entry in kept}
    return all(before.get(entry.name, entry) == entry for entry in new.kept_files)


def _files_of(manifest: Manifest) -> list[str]:
    return [entry.name for entry in manifest.files]
