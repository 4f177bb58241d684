"""What a search for duplicates found: groups of images, read as they are asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from extractor.analysis.same_rows import Files
from extractor.analysis.unit_rows import Numbers
from extractor.reading.reader import FeatureStore

__all__ = ["DuplicateGroup", "DuplicateImage", "Duplicates", "GroupTable"]

Floats = npt.NDArray[np.float64]

GROUPS_AT_ONCE = 4096


@dataclass(frozen=True)
class DuplicateImage:
    """One image of a group.

    >>> image = find_duplicates("features/resnet50", threshold=0.5)[0].images[0]  # doctest: +SKIP
    >>> image.path in store, image.same_file, round(image.similarity, 6)  # doctest: +SKIP
    (True, True, 1.0)

    Attributes:
        row: Row in its store.
        id: Id of the row.
        path: Path of the image, as in ``store.paths``.
        width: Width in pixels.
        height: Height in pixels.
        size: Bytes of the file.
        mtime_ns: Modification time of the file.
        similarity: Cosine similarity to the first image of the group; None if a row holds NaN.
        same_file: Whether the file has the same bytes as that of the first image.
        in_other: Whether it is in the other store, that of ``against``.
    """

    row: int
    id: int
    path: str
    width: int
    height: int
    size: int
    mtime_ns: int
    similarity: float | None
    same_file: bool
    in_other: bool = False


@dataclass(frozen=True)
class DuplicateGroup:
    """Images that are equal or nearly so.

    >>> group = find_duplicates("features/resnet50", threshold=0.5)[0]  # doctest: +SKIP
    >>> group.kind, len(group.images) > 1, group.omitted  # doctest: +SKIP
    ('near', True, 0)

    Attributes:
        kind: ``identical`` if all files have the same bytes, otherwise ``near``.
        images: The images. The first one is proposed to be kept: it has the most pixels, then the
            oldest file, then the lowest row. With ``against``, it is the image of the store, and
            the others are those of the other store. The others follow by falling similarity.
        omitted: Number of further images, which are left out.
    """

    kind: str
    images: tuple[DuplicateImage, ...]
    omitted: int = 0


@dataclass(frozen=True)
class GroupTable:
    """Groups as arrays: rows ``starts[i]`` to ``starts[i + 1]`` are those of group i."""

    rows: Numbers  # of both stores, the other one's behind those of the store
    similarities: Floats
    same_file: npt.NDArray[np.bool_]
    starts: Numbers
    omitted: Numbers


class Duplicates(Sequence[DuplicateGroup]):
    """Groups of duplicates, largest first; each group is read as it is asked for.

    >>> duplicates = find_duplicates("features/resnet50")  # doctest: +SKIP
    >>> for group in duplicates:  # doctest: +SKIP
    ...     keep, *others = group.images
    >>> duplicates.method, duplicates.left_out  # doctest: +SKIP
    ('exact', 0)

    Attributes:
        store: The store.
        other: The store of ``against``; None without one.
        threshold: Least cosine similarity of two near duplicates.
        method: ``exact``, or ``clusters`` if rows were compared with those of near clusters only.
        recall: Share of near pairs that the clusters found, among those of sampled rows; None if
            the method is exact, or if no sampled row has a near one.
        recall_pairs: Number of pairs that the recall was measured with.
        left_out: Number of rows without a direction: zeros, NaN or infinity. Only the bytes of
            their files are compared.
    """

    def __init__(
        self,
        store: FeatureStore,
        other: FeatureStore | None,
        threshold: float,
        table: GroupTable,
        files: Sequence[Files],
        *,
        left_out: int,
        is_exact: bool,
        recalled: tuple[int, int],
    ) -> None:
        compared, sampled = recalled
        self.store = store
        self.other = other
        self.threshold = threshold
        self.method = "exact" if is_exact else "clusters"
        self.recall = compared / sampled if sampled else None
        self.recall_pairs = sampled
        self.left_out = left_out
        self._table = table
        self._files = files

    def __len__(self) -> int:
        """Return the number of groups."""
        return len(self._table.starts) - 1

    @overload
    def __getitem__(self, index: int) -> DuplicateGroup: ...

    @overload
    def __getitem__(self, index: slice) -> list[DuplicateGroup]: ...

    def __getitem__(self, index: int | slice) -> DuplicateGroup | list[DuplicateGroup]:
        """Return one group, or several."""
        numbers = range(len(self))[index]
        if isinstance(numbers, int):
            return self._groups([numbers])[0]
        return self._groups(numbers)

    def __iter__(self) -> Iterator[DuplicateGroup]:
        """Return an iterator over the groups, of which it reads some at a time."""
        for start in range(0, len(self), GROUPS_AT_ONCE):
            yield from self[start : start + GROUPS_AT_ONCE]

    @property
    def redundant(self) -> int:
        """Number of images beside the first one of each group; those of the store with another."""
        if self.other is not None:
            return len(self)
        return len(self._table.rows) - len(self)

    def to_mapping(self) -> dict[str, Any]:
        """Return everything, for JSON."""
        return {
            "store": str(self.store.path),
            "token": self.store.token,
            "against": None if self.other is None else str(self.other.path),
            "model": self.store.info.model,
            "threshold": self.threshold,
            "rows": len(self.store),
            "left_out": self.left_out,
            "method": self.method,
            "recall": self.recall,
            "recall_pairs": self.recall_pairs,
            "redundant": self.redundant,
            "groups": [asdict(group) for group in self],
        }

    def __repr__(self) -> str:
        return f"Duplicates({len(self)} groups of {self.store!r}, threshold {self.threshold})"

    def _groups(self, numbers: Sequence[int]) -> list[DuplicateGroup]:
        starts = self._table.starts
        places = [np.arange(starts[number], starts[number + 1]) for number in numbers]
        images = iter(self._images(np.concatenate(places) if places else starts[:0]))
        groups = []
        for number, indices in zip(numbers, places, strict=True):
            found = tuple(next(images) for _ in indices)
            omitted = int(self._table.omitted[number])
            is_identical = all(image.same_file for image in found)
            groups.append(DuplicateGroup("identical" if is_identical else "near", found, omitted))
        return groups

    def _images(self, places: Numbers) -> list[DuplicateImage]:
        rows, first = self._table.rows[places], len(self.store)
        found: list[DuplicateImage | None] = [None] * len(rows)
        stores = [self.store] if self.other is None else [self.store, self.other]
        for store, files, is_other in zip(stores, self._files, (False, True), strict=False):
            chosen = np.flatnonzero((rows >= first) == is_other)
            own = rows[chosen] - (first if is_other else 0)
            paths = store._paths_of(own)
            for at, row, path in zip(chosen.tolist(), own.tolist(), paths, strict=True):
                similarity = float(self._table.similarities[places[at]])
                found[at] = DuplicateImage(
                    row,
                    int(store.ids[row]),
                    path,
                    int(files.width[row]),
                    int(files.height[row]),
                    int(files.size[row]),
                    int(files.mtime_ns[row]),
                    similarity if math.isfinite(similarity) else None,
                    bool(self._table.same_file[places[at]]),
                    is_other,
                )
        return [image for image in found if image is not None]
