"""What the parts of a job array share: the plan that the first of them leaves. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from extractor.images.listing import ImageList
from extractor.lease.paths_file import BLOCK, PathsFile
from extractor.store.atomic import write_atomically
from extractor.store.claim import ClaimedFolder, SharedFolder
from extractor.store.failures import FailureRecord
from extractor.store.format import JOB, MANIFEST, PLAN, PLAN_PATHS, mask_of, ranges
from extractor.store.plan import Move, Plan

__all__ = [
    "PartPlan",
    "PlannedImages",
    "PlannedStore",
    "order_folder",
    "state_of",
    "stored_lines",
]

VERSION = 1
ORDER = "order"  # in the folder of the paths: those of the lines of a list, for each store

Folders = Sequence[ClaimedFolder | SharedFolder]


@dataclass(frozen=True)
class PlannedStore:
    """What a part must know of a store, so that it need not compare it with the images.

    Attributes:
        state: State of the folder that the plan belongs to, see :func:`state_of`.
        is_up_to_date: Nothing is to be done for this store.
        start: Index of its first image to compute among the paths of the plan; -1 if none is left.
        count: Number of its images to compute.
        shard_images: Number of images in one shard.
        listing: Digest of all paths that the store will have.
        has_order: The row of each line of the list is asked for.
        plan: What becomes of the rows of before.
    """

    state: str
    is_up_to_date: bool
    start: int
    count: int
    shard_images: int
    listing: str
    has_order: bool
    plan: Plan

    def to_mapping(self) -> dict[str, Any]:
        """Return the store as JSON has it."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "plan"}
        return {**own, "plan": _plan_to_mapping(self.plan)}

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any]) -> PlannedStore:
        """Return the store that :meth:`to_mapping` described."""
        plan = _plan_from_mapping(content["plan"], content["count"])
        return cls(**{**content, "plan": plan})


@dataclass(frozen=True)
class PartPlan:
    """The plan of a job array: what its parts must agree on, and what only one of them found out.

    Attributes:
        request: What was asked for; the same for all parts.
        root: Folder that the paths are relative to.
        images: Number of images of the run.
        batch_size: Number of images in one batch.
        stores: Stores of the run.
        home: Index of the store whose staging folder has the paths.
        passed_over: As in the report of a run.
        skipped: As in the report of a run.
        excluded: As in the report of a run.
        unlisted: As in the report of a run.
    """

    request: Mapping[str, Any]
    root: str
    images: int
    batch_size: int
    stores: Sequence[PlannedStore]
    home: int
    passed_over: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)
    excluded: Mapping[str, int] = field(default_factory=dict)
    unlisted: Sequence[Sequence[str]] = ()

    def write(self, folder: Path) -> None:
        """Write the plan to a staging folder; the paths are there already."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "stores"}
        stores = [store.to_mapping() for store in self.stores]
        content = {"version": VERSION, **own, "stores": stores}
        write_atomically(folder / PLAN, json.dumps(content, ensure_ascii=True).encode())

    @classmethod
    def read(cls, folders: Folders) -> PartPlan | None:
        """Return the plan of a run; None if there is none, or a run changed a store since."""
        for folder in folders:
            try:
                content = json.loads((folder.staging / PLAN).read_bytes())
                if content.pop("version") != VERSION:
                    continue
                stores = [PlannedStore.from_mapping(each) for each in content.pop("stores")]
                plan = cls(**content, stores=stores)
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if [store.state for store in stores] == [state_of(each) for each in folders]:
                return plan
        return None

    def paths(self, folders: Folders) -> Path:
        """Return the folder of the paths of all images to compute."""
        return folders[self.home].staging / PLAN_PATHS


def state_of(folder: ClaimedFolder | SharedFolder) -> str:
    """Return a digest of the run and the manifest in a folder."""
    digest = hashlib.sha256()
    for path in (folder.staging / JOB, folder.out / MANIFEST):
        try:
            digest.update(path.read_bytes() + b"\n")
        except FileNotFoundError:
            digest.update(b"none\n")
    return digest.hexdigest()


@dataclass(frozen=True)
class PlannedImages(ImageList):
    """Images that the parts of a job array compute, read from the plan as they are needed.

    In contrast to other lists, several passes over images follow each other.
    """

    @classmethod
    def of(cls, plan: PartPlan, folders: Folders) -> PlannedImages:
        """Return the images of a plan.

        Args:
            plan: The plan.
            folders: Folders of its stores.
        """
        counts = [store.start + store.count for store in plan.stores if store.start >= 0]
        return cls(os.fsencode(plan.root), StoredPaths(plan.paths(folders), max(counts)))

    def __post_init__(self) -> None:
        """Accept paths in any order; they were checked before they were written."""


class StoredPaths(Sequence[bytes]):
    """Paths in a file, of which one block is in memory.

    Args:
        folder: Folder of the file.
        count: Number of paths.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self._file = PathsFile(folder)
        self._count = count
        self._block: tuple[int, list[bytes]] = (-1, [])

    def __len__(self) -> int:
        """Return the number of paths."""
        return self._count

    def __getitem__(self, index: Any) -> Any:
        """Return a path, or a list of them."""
        if isinstance(index, slice):
            return self._file.read(range(*index.indices(self._count)))
        if not 0 <= index < self._count:
            raise IndexError(index)
        number, inside = divmod(index, BLOCK)
        block = self._block
        if block[0] != number:
            start = number * BLOCK
            block = (number, self._file.read(range(start, min(start + BLOCK, self._count))))
            self._block = block
        return block[1][inside]


def order_folder(folder: Path, store: int) -> Path:
    """Return the folder for the paths of the lines of a list."""
    return folder / f"{ORDER}-{store}"


def stored_lines(folder: Path) -> Iterator[bytes]:
    """Yield all paths in a file of paths."""
    with (folder / "paths").open("rb") as file:
        rest = b""
        while chunk := file.read(1 << 20):
            *paths, rest = (rest + chunk).split(b"\0")
            yield from paths


def _plan_to_mapping(plan: Plan) -> dict[str, Any]:
    moves = {
        str(shard): [[row, os.fsdecode(move.path), *move[1:]] for row, move in sorted(rows.items())]
        for shard, rows in plan.moves.items()
    }
    return {
        "live": {str(shard): [len(live), ranges(live)] for shard, live in plan.live.items()},
        "failures": [failure.to_list() for failure in plan.failures],
        "missing": [os.fsdecode(path) for path in plan.missing],
        "replaced": [[os.fsdecode(path), *row] for path, row in plan.replaced.items()],
        "moves": moves,
        **{name: getattr(plan, name) for name in ("gone", "changed", "unseen", "vanished")},
    }


def _plan_from_mapping(content: Mapping[str, Any], count: int) -> Plan:
    return Plan(
        range(count),
        {int(shard): mask_of(text, rows) for shard, (rows, text) in content["live"].items()},
        [FailureRecord.from_list(values) for values in content["failures"]],
        [os.fsencode(path) for path in content["missing"]],
        content["gone"],
        content["changed"],
        content["unseen"],
        content["vanished"],
        replaced={os.fsencode(path): (shard, row) for path, shard, row in content["replaced"]},
        moves={
            int(shard): {
                row: Move(os.fsencode(path), size, mtime_ns, is_renamed)
                for row, path, size, mtime_ns, is_renamed in rows
            }
            for shard, rows in content["moves"].items()
        },
    )
