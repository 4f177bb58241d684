"""Where an export is written: complete or not at all, and never over files of someone else."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from extractor.errors import StoreBusyError, StoreError, UsageError
from extractor.store.atomic import sync, sync_folder
from extractor.store.format import MANIFEST
from extractor.store.lock import Lock
from extractor.store.publish import clear_staging, enclosing_store

__all__ = ["SIDECAR", "Target"]

SIDECAR = "_export.json"  # readers of Parquet folders pass over names with an underscore
NAMES_SHOWN = 5


class Target:
    """File or folder that an export replaces in one step.

    It is written in a hidden folder beside it, which an export that was killed leaves behind and
    the next one removes.

    Args:
        path: The file or folder.
        is_folder: Which of the two.
        overwrite: Replace an export that is there.

    Raises:
        UsageError: Something is there already, or no export can be there.
    """

    def __init__(self, path: Path, *, is_folder: bool, overwrite: bool) -> None:
        self.path = Path(os.path.realpath(path))
        self.is_folder = is_folder
        self._staging = self.path.with_name(f".{self.path.name}.partial")
        self.sidecar = (
            self.path / SIDECAR if is_folder else self.path.with_name(f"{self.path.name}.json")
        )
        self._overwrite = overwrite
        self._check()

    def _check(self) -> None:
        store = enclosing_store(self.path / MANIFEST)  # a store itself is no target, either
        if store is not None:
            raise UsageError(f"{self.path} is in the store {store}; export to a folder beside it")
        parent = next(folder for folder in self.path.parents if folder.exists())
        if not parent.is_dir():
            raise UsageError(f"{parent} is a file, expected a folder; choose another target")
        if self.is_folder:
            self._check_folder()
            return
        if self.path.is_dir():
            raise UsageError(f"{self.path} is a folder, expected a file for this format")
        for path in (self.path, self.sidecar):
            if path.exists() and not self._overwrite:
                raise UsageError(f"{path} exists; replace it with --overwrite")

    def _check_folder(self) -> None:
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UsageError(f"{self.path} is a file, expected a folder for this format")
        present = {
            path.relative_to(self.path).as_posix()
            for path in self.path.rglob("*")
            if not path.is_dir() or path.is_symlink()
        }
        if not present:
            return
        foreign = sorted(present - {SIDECAR, *self._listed()})
        if foreign:
            raise UsageError(
                f"{self.path} holds files that are not part of an export "
                f"({', '.join(map(ascii, foreign[:NAMES_SHOWN]))}); nothing was changed, choose "
                "another target"
            )
        if not self._overwrite:
            raise UsageError(f"{self.path} holds an export; replace it with --overwrite")

    def _listed(self) -> list[str]:
        """Return the files of the export that is there, as it recorded them."""
        try:
            content = json.loads(self.sidecar.read_text("utf-8"))
            return [str(name) for name in content["files"]]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    @contextlib.contextmanager
    def writing(self) -> Iterator[Path]:
        """Give the path to write to; what was written stays there until :meth:`publish`.

        Raises:
            StoreBusyError: Another export is writing there.
            StoreError: The disk is full or not writable.
        """
        try:
            self._staging.mkdir(parents=True, exist_ok=True)
            with self._locked():
                try:
                    self._clear()
                    written = self._staging / self.path.name
                    if self.is_folder:
                        written.mkdir()
                    yield written
                finally:
                    self._restore()
                    shutil.rmtree(self._staging, ignore_errors=True)
        except OSError as error:
            raise StoreError(
                f"cannot write {self.path}: {error.strerror or error}; what was there is unchanged"
            ) from error

    def publish(self, provenance: dict[str, Any]) -> None:
        """Put what was written in place, with its provenance beside it."""
        written = self._staging / self.path.name
        files = [written]
        if self.is_folder:
            files = sorted(path for path in written.rglob("*") if path.is_file())
            names = [path.relative_to(written).as_posix() for path in files]
            provenance = {**provenance, "files": names}
        sidecar = (written if self.is_folder else self._staging) / self.sidecar.name
        sidecar.write_text(json.dumps(provenance, indent=1, ensure_ascii=True) + "\n", "ascii")
        for file in [*files, sidecar]:
            with file.open("rb") as opened:
                sync(opened.fileno())
        self._check()  # something may have appeared in the meantime
        if not self.is_folder:
            self.sidecar.unlink(missing_ok=True)  # never that of another file
            os.replace(written, self.path)
            os.replace(sidecar, self.sidecar)
        else:
            if self.path.exists():
                os.replace(self.path, self._replaced)
            os.replace(written, self.path)
        sync_folder(self.path.parent)

    @property
    def _replaced(self) -> Path:
        return self._staging / "replaced"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        known = {"lock", "replaced", self.path.name, self.sidecar.name}
        if not known.issuperset(os.listdir(self._staging)):
            raise UsageError(f"{self._staging} was not left by an export; move it away")
        lock = Lock(self._staging / "lock", required=False)
        try:
            lock.__enter__()
        except StoreBusyError as error:
            raise StoreBusyError(f"{self.path} is being written by another export") from error
        try:
            yield
        finally:
            lock.__exit__()

    def _restore(self) -> None:
        """Put back what an export moved away before it died."""
        if self._replaced.exists() and not self.path.exists():
            os.replace(self._replaced, self.path)

    def _clear(self) -> None:
        """Remove what an export that died left behind."""
        self._restore()
        clear_staging(self._staging)
