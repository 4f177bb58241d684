"""What a page shows: one store or two, their thumbnails, and whether they grew."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from extractor.errors import DecodeError, ExtractorError, StoreError
from extractor.images.time_limit import decode_within
from extractor.images.types import EncodedImage
from extractor.reading.groups import check_comparable
from extractor.reading.reader import FeatureStore
from extractor.search.sheet import SQUARE
from extractor.view.analyses import Analyses
from extractor.view.collection import Collection, Match, image_row
from extractor.view.thumbnails import Thumbnails

__all__ = ["Shown", "Viewer", "hit_rows", "opened_stores", "store_names"]

LOOK_SECONDS = 3.0  # between looks whether a store grew


@dataclass(frozen=True)
class Shown:
    """A store on the page.

    Attributes:
        collection: Its snapshot.
        thumbnails: Its thumbnails.
        analyses: What is computed about the snapshot.
    """

    collection: Collection
    thumbnails: Thumbnails
    analyses: Analyses

    @classmethod
    def of(cls, collection: Collection) -> Shown:
        """Return what shows a snapshot."""
        thumbnails = Thumbnails(collection.store.path)
        return cls(collection, thumbnails, Analyses(collection))

    @property
    def store(self) -> FeatureStore:
        """The store."""
        return self.collection.store


class Viewer:
    """Stores on a page. Many threads may ask it.

    Args:
        stores: One store or two.
        make: Makes the snapshot of a store.
    """

    def __init__(
        self, stores: Sequence[FeatureStore], make: Callable[[FeatureStore], Collection]
    ) -> None:
        self._make = make
        self.shown = [Shown.of(make(store)) for store in stores]
        self._newer: list[int | None] = [None] * len(stores)
        self._anew = [0] * len(stores)  # how often ids began to stand for other images
        self._looked = -LOOK_SECONDS
        self._lock = threading.Lock()

    def state(self) -> dict[str, Any]:
        """Return what the head of the page says."""
        newer = self._look()
        names = store_names([shown.store for shown in self.shown])
        stores = [self._store(number, newer[number]) for number in range(len(newer))]
        return {
            "stores": [{"name": name, **each} for name, each in zip(names, stores, strict=True)]
        }

    def _store(self, number: int, newer: int | None) -> dict[str, Any]:
        shown = self.shown[number]
        info = shown.store.info
        return {
            "folder": str(shown.store.path),
            "model": info.model,
            "dim": info.dim,
            "rows": len(shown.collection),
            "failed": len(shown.collection.failures),
            "token": shown.store.token,
            "newer": newer,
            "anew": self._anew[number],
            "comparable": _are_comparable(self.shown),
            "problems": len(shown.thumbnails.problems),
        }

    def _look(self) -> list[int | None]:
        """Return how many rows each store has now; None for one that is as it was."""
        with self._lock:
            if time.monotonic() - self._looked >= LOOK_SECONDS:
                self._newer = [_rows_now(shown.store) for shown in self.shown]
                self._looked = time.monotonic()
            return self._newer

    def reload(self) -> None:
        """Take the newest state of each store.

        Raises:
            StoreError: A store cannot be opened; the page keeps what it shows.
        """
        fresh = [Shown.of(self._make(shown.store.reopen())) for shown in self.shown]
        with self._lock:
            pairs = zip(self.shown, fresh, strict=True)
            self._anew = [n + _is_anew(*pair) for n, pair in zip(self._anew, pairs, strict=True)]
            self.shown = fresh
            self._newer = [None] * len(fresh)

    def neighbors(self, number: int, image_id: int, k: int) -> dict[str, Any] | None:
        """Return the nearest images in every store; None if there is no such image.

        Other stores know the image by its path.
        """
        image = self.shown[number].collection.image(image_id)
        if image is None:
            return None
        results = []
        for other, shown in enumerate(self.shown):
            row = image.row if other == number else shown.collection.row_of_path(image.path)
            results.append(self._answer(other, row, functools.partial(_neighbors, row, k)))
        return {"image": image_row(image), "store": number, "results": results}

    def search(self, content: bytes, k: int) -> dict[str, Any]:
        """Return the images nearest to an encoded one, in every store."""
        problem = _problem_of(content)

        def find(collection: Collection) -> Match:
            if problem is not None:
                raise problem
            return collection.search(content, k)

        numbers = range(len(self.shown))
        return {"results": [self._answer(number, 0, find) for number in numbers]}

    def _answer(self, number: int, row: int, find: Callable[[Collection], Match]) -> dict[str, Any]:
        collection = self.shown[number].collection
        if row < 0:
            return {"store": number, "error": "This store does not hold the image.", "hits": []}
        try:
            match = find(collection)
        except ExtractorError as error:
            return {"store": number, "error": str(error), "hits": []}
        return {"store": number, "method": match.method, "hits": hit_rows(collection, match)}


def opened_stores(
    store: FeatureStore | str | os.PathLike[str],
    other: FeatureStore | str | os.PathLike[str] | None,
) -> list[FeatureStore]:
    """Return one store or two, opened.

    Raises:
        StoreError: There is no store.
    """
    both = (store,) if other is None else (store, other)
    return [each if isinstance(each, FeatureStore) else FeatureStore.open(each) for each in both]


def store_names(stores: Sequence[FeatureStore]) -> list[str]:
    """Return names of the folders of stores, with as many parents as tell them apart."""
    parts = [store.path.absolute().parts for store in stores]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [each[-1] for each in parts]  # one store, shown twice


def _neighbors(row: int, k: int, collection: Collection) -> Match:
    return collection.neighbors(row, k)


def _are_comparable(shown: Sequence[Shown]) -> bool:
    """Return whether there are two stores of one backbone."""
    stores = [each.store for each in shown]
    if len({os.path.realpath(store.path) for store in stores}) < 2:
        return False
    try:
        check_comparable(*stores)
    except StoreError:
        return False
    return True


def _problem_of(content: bytes) -> DecodeError | None:
    """Return why an encoded image cannot be decoded.

    What embeds a single image has no time limit, so a decoder that hangs would end all searches.
    """
    pixels = np.empty((*SQUARE.input_size, 3), np.uint8)
    try:
        decode_within(EncodedImage(content), [SQUARE], [pixels])
    except DecodeError as error:
        return error
    return None


def _is_anew(before: Shown, after: Shown) -> bool:
    """Return whether ids may stand for other images, as in a store that was deleted and made again.

    A store that does not remember the earlier state counts, too.
    """
    try:
        after.store.changes_since(before.store.token)
    except StoreError:
        return True
    return False


def _rows_now(store: FeatureStore) -> int | None:
    try:
        return None if store.is_current() else len(store.reopen())
    except StoreError:
        return None


def hit_rows(collection: Collection, match: Match) -> list[list[Any]]:
    """Return what a search found as the page takes it, with scores."""
    images = collection.images(match.rows)
    return [
        [*image_row(image), float(score)] for image, score in zip(images, match.scores, strict=True)
    ]
