"""Several stores as one: one after the other, or joined image by image."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from extractor.errors import StoreError, UsageError
from extractor.reading.array import ConcatenatedRows, LazyArray, ShardedArray
from extractor.reading.rows import Rows
from extractor.text import plural

if TYPE_CHECKING:
    from extractor.reading.reader import FeatureStore

__all__ = ["JoinedRows", "StoreGroup", "check_comparable", "join_stores"]

DIFFERENCES_SHOWN = 5
APART = "open them apart, or join them image by image with FeatureStore.join"

# Rows of stores that differ in one of these cannot be compared.
SAME = ("backbone.", "embedding.", "preprocess.")


class StoreGroup(Rows):
    """Rows of several stores of one backbone, one store after the other.

    Paths are relative where all stores have the same root, and absolute otherwise.

    Attributes:
        stores: The stores, in order.

    Raises:
        StoreError: The stores were made differently, so that their rows cannot be compared.
        UsageError: No store, or one of them twice.
    """

    def __init__(self, stores: Sequence[FeatureStore]) -> None:
        if not stores:
            raise UsageError("stores: got an empty list, expected at least one folder")
        _check_distinct(stores)
        for store in stores[1:]:
            check_comparable(stores[0], store)
        self.stores = tuple(stores)
        first = stores[0].features
        self._features = ShardedArray(
            [part for store in stores for part in store.features.parts],
            row_shape=first.shape[1:],
            dtype=first.dtype,
        )
        self._starts = np.cumsum([0, *map(len, stores)])

    @property
    def features(self) -> LazyArray:
        """``(N, dim)``, memory-mapped; indexed like a numpy array."""
        return self._features

    @property
    def has_ids(self) -> bool:
        """Whether the rows have ids; no, since ids may repeat in another store."""
        return False

    def column(self, name: str) -> list[Any]:
        """Return one column of the index, one value per row; see :meth:`Rows.column`.

        Raises:
            StoreError: ``id``: ids belong to one store.
        """
        if name == "id":
            raise StoreError("ids belong to one store; see those of each of .stores")
        return [value for store in self.stores for value in store.column(name)]

    @functools.cached_property
    def paths(self) -> list[str]:
        """Path of each row's image: relative if all stores have one root, otherwise absolute."""
        if len({store.root for store in self.stores}) == 1:
            return [path for store in self.stores for path in store.paths]
        return [os.path.join(store.root, path) for store in self.stores for path in store.paths]

    def origin(self, row: int) -> tuple[FeatureStore, int]:
        """Return the store of a row, and its row there.

        Raises:
            IndexError: There is no such row.
        """
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} is out of range for {plural(len(self), 'row')}")
        row %= len(self)
        at = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.stores[at], row - int(self._starts[at])

    def full_path(self, row: int) -> str:
        """Return the absolute path of a row's image, as it was when the store was made."""
        store, row = self.origin(row)
        return store.full_path(row)

    @property
    def _source(self) -> str:
        return ", ".join(store._source for store in self.stores)

    def _row_of_full_path(self, path: str) -> int | None:
        for start, store in zip(self._starts.tolist(), self.stores, strict=False):
            row = store._row_of_full_path(path)
            if row is not None:
                return int(start) + row
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return StoreGroup, (self.stores,)

    def __repr__(self) -> str:
        return f"StoreGroup({len(self)} rows of {', '.join(map(repr, self.stores))})"


class JoinedRows(Rows):
    """Images that several stores have in common; their embeddings joined to one vector.

    Attributes:
        sources: Rows of each store, in the same order of images.
        left_out: For each store the number of its rows without a counterpart.
    """

    def __init__(
        self, sources: Sequence[Rows], left_out: tuple[int, ...], *, unit_parts: bool
    ) -> None:
        self.sources = tuple(sources)
        self.left_out = left_out
        self._unit_parts = unit_parts
        self._features = ConcatenatedRows(
            [source.features for source in sources], unit_parts=unit_parts
        )

    @property
    def features(self) -> LazyArray:
        """``(N, sum of dims)``; indexed like a numpy array, and joined as it is read."""
        return self._features

    def column(self, name: str) -> list[Any]:
        """Return one column of the index of the first store; see :meth:`Rows.column`."""
        return self.sources[0].column(name)

    def full_path(self, row: int) -> str:
        """Return the absolute path of a row's image in the first store."""
        return self.sources[0].full_path(row)

    @property
    def _source(self) -> str:
        return f"a join of {' and '.join(source._source for source in self.sources)}"

    def _row_of_full_path(self, path: str) -> int | None:
        return self.sources[0]._row_of_full_path(path)

    def __reduce__(self) -> tuple[Any, ...]:
        make = functools.partial(JoinedRows, unit_parts=self._unit_parts)
        return make, (self.sources, self.left_out)

    def __repr__(self) -> str:
        return f"JoinedRows({len(self)} rows of {', '.join(map(repr, self.sources))})"


def join_stores(stores: Sequence[FeatureStore], *, unit_parts: bool) -> JoinedRows:
    """Return the images that all stores hold under the same path and with the same content.

    Args:
        stores: At least two stores; their order is that of the parts, and the first one has the
            order of the rows.
        unit_parts: Scale the part of each store to unit length.

    Raises:
        UsageError: Fewer than two stores, or two are the same folder.
        StoreError: No image is in all stores, or their embeddings are no vectors.
    """
    if len(stores) < 2:
        raise UsageError(f"join: got {plural(len(stores), 'store')}, expected at least two")
    _check_distinct(stores)
    for store in stores:
        if len(store.features.shape) != 2:
            raise StoreError(
                f"{store.path} holds embeddings of shape {store.features.shape[1:]}, expected "
                "vectors; extract them with --pool avg"
            )
    keys = [_contents(store) for store in stores]
    common = set.intersection(*(set(rows) for rows in keys))
    if not common:
        raise StoreError(
            f"no image is in {' and in '.join(str(store.path) for store in stores)} under the same "
            "path with the same content; were they made from the same folder?"
        )
    order = [key for key in keys[0] if key in common]
    selections = [
        store.select(np.array([rows[key] for key in order], np.int64))
        for store, rows in zip(stores, keys, strict=True)
    ]
    left_out = tuple(len(store) - len(order) for store in stores)
    return JoinedRows(selections, left_out, unit_parts=unit_parts)


def _contents(store: FeatureStore) -> dict[tuple[str, bytes], int]:
    """Return the row of each path and content."""
    digests = store.column("sha256")
    return {
        (path, digest): row
        for row, (path, digest) in enumerate(zip(store.paths, digests, strict=True))
    }


def _check_distinct(stores: Sequence[FeatureStore]) -> None:
    """Check that no row would be in a group twice.

    Raises:
        UsageError: Two stores are the same folder.
    """
    seen: dict[str, FeatureStore] = {}
    for store in stores:
        first = seen.setdefault(os.path.realpath(store.path), store)
        if first is not store:
            names = " and ".join(dict.fromkeys((str(first.path), str(store.path))))
            raise UsageError(f"stores: got {names} twice, expected each folder once")


def check_comparable(first: FeatureStore, other: FeatureStore, *, advice: str = APART) -> None:
    """Check that two stores hold embeddings of one space.

    Args:
        first: A store.
        other: Another one.
        advice: What to try if they do not.

    Raises:
        StoreError: They do not; names what differs.
    """
    described, compared = first.manifest.description, other.manifest.description
    differences = [
        str(difference)
        for difference in described.differences(compared)
        if difference.key.startswith(SAME)
    ]
    if differences:
        raise StoreError(
            f"{first.path} and {other.path} were made differently "
            f"({'; '.join(differences[:DIFFERENCES_SHOWN])}), so their rows cannot be compared; "
            f"{advice}"
        )
