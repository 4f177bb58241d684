"""The page as files, for a small store or a sample: :func:`export_page`."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from extractor.analysis.duplicates import find_duplicates
from extractor.analysis.mapping import map_store
from extractor.errors import DecodeError, StoreError, UsageError
from extractor.export.target import Target
from extractor.reading.reader import FeatureStore
from extractor.search.knn import Metric, check_metric, nearest
from extractor.search.sheet import lies_in
from extractor.system.cpu import available_cores
from extractor.version import __version__
from extractor.view.analyses import (
    duplicates_content,
    map_parts,
    outliers_content,
    outliers_of,
)
from extractor.view.collection import Collection, Numbers, image_row
from extractor.view.page_files import bundle, page_files
from extractor.view.thumbnails import MIDDLE_EDGE, Thumbnails
from extractor.view.viewer import opened_stores, store_names

__all__ = ["DEFAULT_LIMIT", "PageReport", "export_page"]

log = logging.getLogger(__name__)

DEFAULT_LIMIT = 2000  # images: some 40 MB
MAX_LIMIT = 50_000
NEIGHBORS = 24
THRESHOLD = 0.95  # of duplicates
MAX_ANALYZED = 200_000  # rows; in larger stores, duplicates and outliers are left out
LISTED = 1000  # groups, outliers and failures on the page
PRELOAD = re.compile(r'^ *<link rel="modulepreload".*\n', re.MULTILINE)
SCRIPT = '<script type="module" src="app.js"></script>'


@dataclass(frozen=True)
class PageReport:
    """What an exported page holds.

    >>> report = export_page("features/resnet50", "site")  # doctest: +SKIP
    >>> report.images, report.of, report.missing  # doctest: +SKIP
    (25, 25, 0)

    Attributes:
        path: Folder of the page.
        images: Number of images on it.
        of: Number of images in the store.
        missing: Number of images that moved or changed, or cannot be decoded.
    """

    path: Path
    images: int
    of: int
    missing: int


def export_page(
    store: FeatureStore | str | os.PathLike[str],
    to: str | os.PathLike[str],
    other: FeatureStore | str | os.PathLike[str] | None = None,
    *,
    limit: int = DEFAULT_LIMIT,
    root: str | os.PathLike[str] | None = None,
    metric: Metric = "cosine",
    overwrite: bool = False,
) -> PageReport:
    """Write the page of ``extract view`` as files, which any browser opens without a server.

    A store with more images than ``limit`` is sampled. Neighbors are those among the images on the
    page. The folder holds thumbnails and relative paths, but neither embeddings nor the folder of
    the images.

    >>> report = export_page("features/resnet50", "sample", limit=10)  # doctest: +SKIP
    >>> report.images, (report.path / "index.html").is_file()  # doctest: +SKIP
    (10, True)

    Args:
        store: A store or its folder.
        to: Folder to write; it appears complete or not at all.
        other: Another store, of which the same images are shown.
        limit: Largest number of images.
        root: Folder where the images are now, if it is not the one that the store names.
        metric: ``cosine``, ``ip`` or ``l2``.
        overwrite: Whether to replace a page that is there.

    Raises:
        UsageError: The folder exists, or an argument makes no sense, such as another store without
            any of the images.
        StoreError: There is no store, it has no rows, or the folder cannot be written.
    """
    check_metric(metric)
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= MAX_LIMIT:
        raise UsageError(f"limit: got {limit!r}, expected an integer from 1 to {MAX_LIMIT:,}")
    if root is not None and not os.path.isdir(root):
        raise UsageError(f"root: there is no folder {os.fspath(root)}")
    target = Target(Path(to), is_folder=True, overwrite=overwrite)
    stores = opened_stores(store, other)
    folder = None if root is None else os.fspath(root)
    collections = [Collection(opened, root=folder, metric=metric) for opened in stores]
    if not len(collections[0]):
        raise StoreError(f"{stores[0].path} holds no rows, so there is nothing to show")
    parts = [_Part(collections[0], _sampled(len(collections[0]), limit))]
    parts += [_Part(each, _same_images(parts[0], each)) for each in collections[1:]]
    if other is not None and not len(parts[1].rows):
        raise UsageError(
            f"{stores[1].path} holds none of the images on the page, judged by their paths; "
            "export it apart"
        )
    if any(lies_in(target.path, each.root) for each in collections):
        log.warning(
            "%s lies in the folder of the images, so the next run takes its thumbnails for images; "
            "better export to a folder beside it",
            target.path,
        )
    with target.writing() as partial:
        missing = [
            part.write_thumbnails(partial / "thumbnails" / str(n)) for n, part in enumerate(parts)
        ]
        named = zip(store_names(stores), parts, strict=True)
        shown = [{"name": name, **part.data()} for name, part in named]
        data = json.dumps({"stores": shown}, separators=(",", ":"))
        _write_page(partial, data)
        target.publish({"format": "page", "token": stores[0].token, "extractor": __version__})
    return PageReport(target.path, len(parts[0].rows), len(collections[0]), missing[0])


def _sampled(total: int, limit: int) -> Numbers:
    """Return rows in ascending order, the same for the same store."""
    if total <= limit:
        return np.arange(total, dtype=np.int64)
    return np.sort(np.random.default_rng(0).choice(total, limit, replace=False)).astype(np.int64)


def _same_images(part: _Part, collection: Collection) -> Numbers:
    wanted = {image.path for image in part.collection.images(part.rows)}
    paths = (os.fsdecode(path) for path in collection.column("path"))
    return np.array([row for row, path in enumerate(paths) if path in wanted], np.int64)


def _write_page(folder: Path, data: str) -> None:
    """Write the files of the page, with one classic script; a browser loads no module of a file."""
    files = page_files()
    page = PRELOAD.sub("", files["index.html"].decode())
    scripts = '<script defer src="data.js"></script>\n    <script defer src="page.js"></script>'
    if SCRIPT not in page:
        raise AssertionError(SCRIPT)
    (folder / "index.html").write_text(page.replace(SCRIPT, scripts), "utf-8")
    (folder / "page.js").write_text(bundle("app.js"), "utf-8")
    (folder / "data.js").write_text(f"globalThis.EXTRACT_VIEW = {data};\n", "ascii")
    for name in files:
        if not name.endswith((".js", ".html")):
            (folder / name).write_bytes(files[name])


class _Part:
    """Images of one store on the page.

    Args:
        collection: The store.
        rows: Their rows, ascending.
    """

    def __init__(self, collection: Collection, rows: Numbers) -> None:
        self.collection = collection
        self.rows = rows
        self._ids = frozenset(collection.ids[rows].tolist())

    def write_thumbnails(self, folder: Path) -> int:
        """Write a thumbnail of each image; return how many have none."""
        folder.mkdir(parents=True)
        thumbnails = Thumbnails(self.collection.store.path)

        def write(image: Any) -> bool:
            try:
                content = thumbnails.make(self.collection, image, MIDDLE_EDGE)
            except DecodeError:
                return False
            (folder / f"{image.id}.jpg").write_bytes(content)
            return True

        with ThreadPoolExecutor(available_cores()) as pool:
            return len(self.rows) - sum(pool.map(write, self.collection.images(self.rows)))

    def data(self) -> dict[str, Any]:
        """Return what the page knows about the store, for JSON."""
        store, info = self.collection.store, self.collection.store.info
        is_small = len(store) <= MAX_ANALYZED
        failures = self.collection.failures
        return {
            "model": info.model,
            "dim": info.dim,
            "rows": len(self.rows),
            "of": len(store),
            "failed": len(failures),
            "metric": self.collection.metric,
            "images": [image_row(image) for image in self.collection.images(self.rows)],
            "neighbors": self._neighbors(),
            "map": self._map(),
            "duplicates": self._shown(self._duplicates) if is_small else None,
            "outliers": self._shown(self._outliers) if is_small else None,
            "failures": [[f["path"], f["error"], f["message"]] for f in failures[:LISTED]],
            "reasons": _counts([failure["error"] for failure in failures]),
        }

    def _shown(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """Return one view; None if the store has too few rows for it."""
        try:
            return make()
        except (StoreError, UsageError):
            return None

    def _neighbors(self) -> list[list[float]]:
        """Return the neighbors of each image on the page: number, score, number, score ..."""
        features = self.collection.store.select(self.rows).features
        vectors = np.asarray(features[:]).reshape(len(self.rows), -1)
        usable = np.flatnonzero(np.isfinite(vectors).all(axis=1))
        found: list[list[float]] = [[] for _ in self.rows]
        count = min(NEIGHBORS, len(usable))
        if not count:
            return found
        hits = nearest(
            vectors[usable],
            vectors[usable],
            count,
            metric=self.collection.metric,
            own_rows=range(len(usable)),
        )
        for at, rows, scores in zip(usable.tolist(), hits.rows, hits.scores, strict=True):
            for row, score in zip(rows.tolist(), scores.tolist(), strict=True):
                if row >= 0:
                    found[at] += [int(usable[row]), round(score, 4)]
        return found

    def _map(self) -> dict[str, Any] | None:
        try:
            parts = map_parts(self.collection, map_store(self.collection.store))
        except StoreError:
            return None
        kept = np.array([i in self._ids for i in parts.ids.tolist()], bool)
        return {
            **parts.head,
            "count": int(kept.sum()),
            "ids": parts.ids[kept].tolist(),
            "points": np.round(parts.points[kept], 5).ravel().tolist(),
            "colors": parts.colors[kept].tolist(),
        }

    def _duplicates(self) -> dict[str, Any]:
        found = find_duplicates(self.collection.store, threshold=THRESHOLD)
        content = duplicates_content(found, 0, len(found))
        for group in content["groups"]:
            group["images"] = [image for image in group["images"] if image[0] in self._ids]
        groups = [group for group in content["groups"] if len(group["images"]) > 1]
        redundant = sum(len(group["images"]) - 1 for group in groups)
        shown = groups[:LISTED]
        return {**content, "total": len(shown), "redundant": redundant, "groups": shown}

    def _outliers(self) -> dict[str, Any]:
        found = outliers_of(self.collection)
        content = outliers_content(self.collection, found, 0, len(found))
        for name in ("outliers", "label_errors"):
            content[name] = [image for image in content[name] if image[0] in self._ids][:LISTED]
        return {
            **content,
            "total": len(content["outliers"]),
            "errors_total": len(content["label_errors"]),
        }


def _counts(words: list[str]) -> dict[str, int]:
    return {word: words.count(word) for word in sorted(set(words))}
