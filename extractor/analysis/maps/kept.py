"""Maps that are kept in the folder ``derived`` of a store, by the ids of its rows."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from extractor.analysis.maps.projection import Components
from extractor.errors import StoreDamagedError, StoreError, UnknownTokenError
from extractor.reading.reader import FeatureStore
from extractor.search.derived import (
    DerivedNames,
    ShardKey,
    check_file,
    derived_folders,
    publish_derived,
    shard_keys,
)
from extractor.store.format import FileEntry

__all__ = ["METHODS", "KeptMap", "MapEntry", "Method", "foreign_map", "keep_map", "kept_map"]

Method: TypeAlias = Literal["pca", "umap"]

METHODS = ("pca", "umap")
FORMAT = "extractor-map"
VERSION = 1
SUFFIX = ".map.json"
MAX_ATTEMPTS = 3  # to read a map that is replaced meanwhile


@dataclass(frozen=True)
class MapEntry:
    """What the JSON file beside the coordinates says.

    Attributes:
        method: ``pca`` or ``umap``.
        dim: Number of values in one row.
        token: State of the store that the map was last brought up to.
        shards: Shards of that state.
        fitted: Number of rows that the map was made from; later ones were placed into it.
        explained: Share of the variance along each axis; None for a UMAP.
        settings: What the map was made with, such as the seed.
        written_ns: Time of writing in nanoseconds since 1970.
        file: Name, size and SHA-256 of the coordinates.
        folder: Folder of both files.
    """

    method: Method
    dim: int
    token: str
    shards: tuple[ShardKey, ...]
    fitted: int
    explained: tuple[float, float] | None
    settings: Mapping[str, Any]
    written_ns: int
    file: FileEntry
    folder: Path

    @property
    def path(self) -> Path:
        """File of the coordinates."""
        return self.folder / self.file.name

    def to_json(self) -> str:
        """Return the content of the JSON file."""
        values = {"format": FORMAT, "version": VERSION, **asdict(self)}
        del values["folder"]
        return json.dumps(values, indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> MapEntry:
        """Read the JSON file of a map.

        Raises:
            StoreDamagedError: It has another form.
            OSError: It cannot be read.
        """
        try:
            values = json.loads(path.read_bytes())
            if (values.pop("format"), values.pop("version")) != (FORMAT, VERSION):
                raise ValueError("another format or version")
            values["shards"] = tuple((int(n), str(d), int(r)) for n, d, r in values["shards"])
            values["file"] = FileEntry(**values["file"])
            if values["explained"] is not None:
                first, second = values["explained"]
                values["explained"] = (float(first), float(second))
            entry = cls(folder=path.parent, **values)
            if entry.method not in METHODS or Path(entry.file.name).name != entry.file.name:
                raise ValueError(f"method {entry.method!r}, file {entry.file.name!r}")
            return entry
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreDamagedError(
                f"{path} describes no map ({type(error).__name__}: {error}); "
                "start over with --refit (refit=True)"
            ) from error


@dataclass(frozen=True)
class KeptMap:
    """Coordinates by id, and what places new rows.

    Attributes:
        entry: What is known about the map.
        ids: ``(n,)`` int64, ascending.
        coordinates: ``(n, 2)`` float32; NaN for rows that are not finite.
        components: Components of a PCA; None for a UMAP.
    """

    entry: MapEntry
    ids: npt.NDArray[np.int64]
    coordinates: npt.NDArray[np.float32]
    components: Components | None

    def __post_init__(self) -> None:
        """Check the shapes.

        Raises:
            ValueError: They do not fit together.
        """
        if self.ids.ndim != 1 or self.coordinates.shape != (len(self.ids), 2):
            raise ValueError(f"ids {self.ids.shape}, coordinates {self.coordinates.shape}")
        if not (self.ids[1:] > self.ids[:-1]).all():
            raise ValueError("the ids do not ascend")
        if (self.components is None) != (self.entry.method == "umap"):
            raise ValueError("components belong to a PCA, and to nothing else")

    def coordinates_of(self, ids: npt.NDArray[np.int64]) -> tuple[Any, npt.NDArray[np.bool_]]:
        """Return the coordinates of ids ``(n, 2)``, NaN for unknown ones, and which are known."""
        at = np.minimum(np.searchsorted(self.ids, ids), max(len(self.ids) - 1, 0))
        known = self.ids[at] == ids if len(self.ids) else np.zeros(len(ids), bool)
        found = np.full((len(ids), 2), np.nan, np.float32)
        found[known] = self.coordinates[at[known]]
        return found, known


def kept_map(store: FeatureStore, method: Method) -> KeptMap | None:
    """Return the map of a store that is kept; None if there is none.

    Of a map in the store and one in the user's cache, the one that was written last counts.

    Raises:
        StoreDamagedError: A file is missing or was changed.
        StoreError: The map holds rows of another store that was in this folder.
    """
    for attempt in range(MAX_ATTEMPTS):
        entries, problems = _entries(store, method)
        fitting = [entry for entry in entries if _fits(entry, store)]
        if not fitting and problems:
            raise problems[0]
        if not entries:
            return None
        entry = max(fitting or entries, key=lambda each: each.written_ns)
        if not fitting:
            raise foreign_map(entry, store)
        if entry.path.exists() or attempt == MAX_ATTEMPTS - 1:
            return _loaded(entry)
    raise AssertionError("unreachable")


def _entries(store: FeatureStore, method: Method) -> tuple[list[MapEntry], list[StoreError]]:
    """Return what the JSON files of a map say, and why some of them cannot be read."""
    entries: list[MapEntry] = []
    problems: list[StoreError] = []
    own, *others = derived_folders(store.path)
    for folder in (own, *others):
        path = folder / f"map-{method}{SUFFIX}"
        try:
            entries.append(MapEntry.read(path))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except StoreError as error:
            problems.append(error)
        except OSError as error:
            if folder == own or not isinstance(error, PermissionError):
                problems.append(StoreError(f"cannot read {path}: {error.strerror}"))
    return entries, problems


def foreign_map(entry: MapEntry, store: FeatureStore) -> StoreError:
    """Return the error of a map that has no row in common with a store."""
    return StoreError(
        f"{entry.path} is a map of other rows than {store.path} holds now; start over with --refit "
        "(refit=True)"
    )


def _fits(entry: MapEntry, store: FeatureStore) -> bool:
    """Return whether the ids of a map stand for the same rows in a store."""
    if entry.dim != store.dim:
        return False
    if set(shard_keys(store.manifest)).issuperset(entry.shards):
        return True
    try:  # shards were merged or rewritten, and the store remembers that
        store.changes_since(entry.token)
    except UnknownTokenError:
        return False
    return True


def _loaded(entry: MapEntry) -> KeptMap:
    problem = check_file(entry.path, entry.file)
    if not problem:
        try:
            with np.load(entry.path, allow_pickle=False) as arrays:
                components = None
                if entry.method == "pca":
                    shares = entry.explained or (0.0, 0.0)
                    components = Components(arrays["mean"], arrays["axes"], shares)
                return KeptMap(entry, arrays["ids"], arrays["coordinates"], components)
        except (OSError, ValueError, KeyError) as error:
            problem = str(error)
    raise StoreDamagedError(
        f"{entry.path} cannot be used: {problem}; start over with --refit (refit=True)"
    )


def keep_map(store: FeatureStore, kept: KeptMap) -> KeptMap:
    """Write a map to the store, or to the user's cache if the store is read-only.

    Returns:
        The map with the folder and the file that were written.

    Raises:
        StoreError: It cannot be written to either.
    """
    arrays: dict[str, Any] = {"ids": kept.ids, "coordinates": kept.coordinates}
    if kept.components is not None:
        arrays |= {"mean": kept.components.mean, "axes": kept.components.axes}
    written = replace(
        kept.entry,
        token=store.token,
        shards=shard_keys(store.manifest),
        written_ns=time.time_ns(),
    )

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    def describe(folder: Path, file: FileEntry) -> str:
        nonlocal written
        written = replace(written, folder=folder, file=file)
        return written.to_json()

    names = DerivedNames(f"map-{kept.entry.method}", ".npz", SUFFIX)
    publish_derived(store.path, write, names, describe, "map")
    return replace(kept, entry=written)
