"""The server of the page, as an ASGI application: :func:`view_app`."""

from __future__ import annotations

import functools
import json
import logging
import os
import struct
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extractor.errors import DecodeError, ExtractorError, InstallationError, UsageError
from extractor.reading.reader import FeatureStore
from extractor.search.knn import Metric, check_metric
from extractor.system.cpu import available_cores
from extractor.view.analyses import Analyses
from extractor.view.collection import Collection, Image, image_row, path_list
from extractor.view.page_files import KINDS, page_files
from extractor.view.thumbnails import LARGE_EDGE, SMALL_EDGE, Thumbnails
from extractor.view.viewer import Viewer, opened_stores

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

    from extractor.api import Extractor

__all__ = ["view_app"]

log = logging.getLogger(__name__)

MAX_UPLOAD_BYTES = 64 * 2**20  # as for images that a run reads whole
MAX_JSON_BYTES = 32 * 2**20  # a selection of a million ids
WORKING, TOO_LARGE = 202, 413  # statuses of an answer
MAX_ROWS = 1000  # in one answer
MAX_NEIGHBORS = 100
HANGING = 64  # threads that may wait for files and decoders

Endpoint = Callable[["Request"], Awaitable["Response"]]


def view_app(
    store: FeatureStore | str | os.PathLike[str],
    other: FeatureStore | str | os.PathLike[str] | None = None,
    *,
    token: str = "",
    hosts: Sequence[str] = (),
    root: str | os.PathLike[str] | None = None,
    metric: Metric = "cosine",
    extractor: Extractor | None = None,
    device: str = "auto",
    weights: str | os.PathLike[str] | None = None,
) -> Starlette:
    """Return the page of ``extract view`` as an ASGI application.

    It reads the stores and the images. Thumbnails, maps and near pairs are kept in ``derived``. Run
    it with any ASGI server, or mount it into another application, behind your own login:

    >>> app = view_app("features/resnet50")  # doctest: +SKIP
    >>> [route.path for route in app.routes][:3]  # doctest: +SKIP
    ['/', '/state', '/rows/{store:int}']

    Args:
        store: A store or its folder.
        other: Another store, to compare.
        token: First part of every path, without which nothing is answered; empty for none.
        hosts: Names that the header ``Host`` may have; empty for any.
        root: Folder where the images are now, if it is not the one that the store names.
        metric: ``cosine``, ``ip`` or ``l2``.
        extractor: Embeds images that are searched for, if there is one store. None makes
            ``Extractor.for_store`` for each store, once an image has to be embedded.
        device: Device for these.
        weights: Weights of ``store``, if they are no longer where they were.

    Raises:
        UsageError: An unknown metric, or no such folder.
        StoreError: There is no store.
        InstallationError: Starlette is not installed.
    """
    check_metric(metric)
    if root is not None and not os.path.isdir(root):
        raise UsageError(f"root: there is no folder {os.fspath(root)}")
    try:
        from starlette.applications import Starlette
        from starlette.routing import Route

        from extractor.view.guard import Guard
    except ImportError as error:
        raise InstallationError(
            "the page needs Starlette; try pip install 'backbone-extractor[view]'"
        ) from error
    stores = opened_stores(store, other)
    folder = None if root is None else os.fspath(root)
    embedders = _Embedders(stores, extractor, device, weights)

    def make(opened: FeatureStore) -> Collection:
        embedder = functools.partial(embedders.of, opened)
        return Collection(opened, root=folder, metric=metric, extractor=embedder)

    page = _Page(Viewer(stores, make))
    app = Starlette(routes=[Route(path, each, methods=verbs) for path, each, verbs in page.routes])
    app.state.viewer = page.viewer
    app.add_middleware(Guard, token=token, hosts=tuple(hosts))
    return app


class _Embedders:
    """Makes what embeds images for a store, once.

    Args:
        stores: The stores on the page.
        extractor: Embeds images for the only store.
        device: Device of those that are made.
        weights: Weights of the first store, if they moved.
    """

    def __init__(
        self,
        stores: Sequence[FeatureStore],
        extractor: Extractor | None,
        device: str,
        weights: str | os.PathLike[str] | None,
    ) -> None:
        self._first = stores[0].path
        self._extractor = extractor if len(stores) == 1 else None
        self._device = device
        self._weights = weights
        self._made: dict[tuple[str, str], Extractor] = {}

    def of(self, store: FeatureStore) -> Extractor:
        """Return what embeds images for a store; a store that was replaced has another one.

        Raises:
            ExtractorError: The model of the store cannot be loaded.
        """
        if self._extractor is not None:
            return self._extractor
        key = (str(store.path), repr(store.manifest.description))
        if key not in self._made:
            from extractor.api import Extractor  # here, because it loads torch

            weights = self._weights if store.path == self._first else None
            self._made[key] = Extractor.for_store(store, device=self._device, weights=weights)
        return self._made[key]


class _RefusedError(Exception):
    """A request that is not answered.

    Attributes:
        status: Status of the answer.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def _endpoint(
    method: Callable[[_Page, Request], Awaitable[Response]],
) -> Callable[[_Page, Request], Awaitable[Response]]:
    """Turn errors of an endpoint into answers."""

    @functools.wraps(method)
    async def guarded(page: _Page, request: Request) -> Response:
        try:
            return await method(page, request)
        except _RefusedError as error:
            answer = _json({"error": str(error)}, error.status)
            if error.status == TOO_LARGE:
                answer.headers["connection"] = "close"  # or else the rest would be read
            return answer
        except ExtractorError as error:
            return _json({"error": str(error)}, 422)
        except Exception:
            log.exception("a request failed; this is a bug, please report it")
            return _json({"error": "The server has a problem. Its terminal says which."}, 500)

    return guarded


class _Page:
    """The endpoints.

    Args:
        viewer: What the page shows.
    """

    def __init__(self, viewer: Viewer) -> None:
        import anyio

        self.viewer = viewer
        self._decoding = anyio.Semaphore(available_cores())
        self._threads = anyio.CapacityLimiter(HANGING)

    @property
    def routes(self) -> list[tuple[str, Endpoint, list[str]]]:
        """Path, endpoint and methods of each route."""
        asked: list[tuple[str, Endpoint]] = [
            ("/", self.file),
            ("/state", self.state),
            ("/rows/{store:int}", self.rows),
            ("/thumbnail/{store:int}/{id:int}", self.thumbnail),
            ("/picture/{store:int}/{id:int}", self.picture),
            ("/neighbors/{store:int}/{id:int}", self.neighbors),
            ("/map/{store:int}", self.map),
            ("/duplicates/{store:int}", self.duplicates),
            ("/outliers/{store:int}", self.outliers),
            ("/failures/{store:int}", self.failures),
        ]
        sent: list[tuple[str, Endpoint]] = [
            ("/reload", self.reload),
            ("/images/{store:int}", self.images),
            ("/thumbnails/{store:int}", self.thumbnails),
            ("/search", self.search),
            ("/list/{store:int}", self.list),
        ]
        return [
            *((path, endpoint, ["GET"]) for path, endpoint in asked),
            *((path, endpoint, ["POST"]) for path, endpoint in sent),
            ("/{name}", self.file, ["GET"]),
        ]

    @_endpoint
    async def file(self, request: Request) -> Response:
        """Answer with a file of the page."""
        from starlette.responses import RedirectResponse, Response

        name = request.path_params.get("name", "index.html")
        if name == "index.html" and not request.scope["path"].endswith(("/", name)):
            return RedirectResponse(f"{request.scope['path']}/", 307)
        content = page_files().get(name)
        if content is None:
            raise _RefusedError(404, "there is no such page")
        kind = KINDS[Path(name).suffix]
        return Response(content, media_type=kind, headers={"cache-control": "no-cache"})

    @_endpoint
    async def state(self, request: Request) -> Response:
        """Answer with what is shown, and whether a store has more rows by now."""
        return _json(await self._in_thread(self.viewer.state))

    @_endpoint
    async def reload(self, request: Request) -> Response:
        """Take the newest state of the stores."""
        await self._in_thread(self.viewer.reload)
        return _json(await self._in_thread(self.viewer.state))

    @_endpoint
    async def rows(self, request: Request) -> Response:
        """Answer with some of the rows that match a filter."""
        collection = self._collection(request)
        start = _number(request, "start", 0, 0, 2**53)
        count = _number(request, "count", MAX_ROWS, 1, MAX_ROWS)
        text = request.query_params.get("filter", "")

        def found() -> dict[str, Any]:
            matching = collection.matching(text)
            total = len(collection) if matching is None else len(matching)
            stop = min(start + count, total)
            rows = range(start, max(stop, start)) if matching is None else matching[start:stop]
            images = [image_row(image) for image in collection.images(rows)]
            return {"total": total, "start": start, "images": images}

        return _json(await self._in_thread(found))

    @_endpoint
    async def images(self, request: Request) -> Response:
        """Answer with the images of some ids; ids that are gone are left out."""
        collection = self._collection(request)
        ids = _ids(await _body(request, MAX_JSON_BYTES))[:MAX_ROWS]

        def found() -> dict[str, Any]:
            images = collection.images(collection.rows_of(ids))
            return {"images": [image_row(image) for image in images]}

        return _json(await self._in_thread(found))

    @_endpoint
    async def thumbnail(self, request: Request) -> Response:
        """Answer with the small thumbnail of an image."""
        return await self._picture(request, SMALL_EDGE)

    @_endpoint
    async def picture(self, request: Request) -> Response:
        """Answer with a larger thumbnail."""
        return await self._picture(request, LARGE_EDGE)

    @_endpoint
    async def thumbnails(self, request: Request) -> Response:
        """Answer with those small thumbnails of some ids that are at hand.

        For each id the number of bytes as uint32, little endian, and the JPEG; zero for none.
        """
        from starlette.responses import Response

        shown = self.viewer.shown[self._store(request)]
        collection = shown.collection
        ids = _ids(await _body(request, MAX_JSON_BYTES))[:MAX_ROWS]

        def found() -> bytes:
            images = collection.images(collection.rows_of(ids))
            kept = {image.id: shown.thumbnails.kept(collection, image) for image in images}
            files = [kept.get(each) or b"" for each in ids]
            return b"".join(struct.pack("<I", len(file)) + file for file in files)

        content = await self._in_thread(found)
        headers = {"cache-control": "no-store"}
        return Response(content, media_type="application/octet-stream", headers=headers)

    async def _picture(self, request: Request, edge: int) -> Response:
        from starlette.responses import Response

        number = self._store(request)
        shown = self.viewer.shown[number]
        collection, thumbnails = shown.collection, shown.thumbnails

        def known() -> tuple[Image | None, bytes | None, bool]:
            image = collection.image(request.path_params["id"])
            if image is None:
                return None, None, False
            kept = thumbnails.kept(collection, image) if edge == SMALL_EDGE else None
            return image, kept, kept is not None or thumbnails.is_unchanged(collection, image)

        image, content, is_unchanged = await self._in_thread(known)
        if image is None:
            raise _RefusedError(404, "there is no such image")
        # In a store that was deleted and made anew, an id stands for another image.
        tag = f'"{image.content}"'
        caching = {"cache-control": "private, no-cache", "etag": tag}
        if is_unchanged and request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=caching)
        if content is None:
            content = await self._made(request, collection, thumbnails, image, edge)
        return Response(content, media_type="image/jpeg", headers=caching)

    async def _made(
        self,
        request: Request,
        collection: Collection,
        thumbnails: Thumbnails,
        image: Image,
        edge: int,
    ) -> bytes:
        async with self._decoding:
            if await request.is_disconnected():  # scrolled past
                raise _RefusedError(404, "nobody waits for it")
            try:
                made: bytes = await self._in_thread(thumbnails.make, collection, image, edge)
            except DecodeError as error:
                raise _RefusedError(404, f"{error.reason}: {error}") from error
        return made

    @_endpoint
    async def neighbors(self, request: Request) -> Response:
        """Answer with the nearest images of one, in every store."""
        number = self._store(request)
        k = _number(request, "k", 24, 1, MAX_NEIGHBORS)
        image_id = request.path_params["id"]
        found = await self._in_thread(self.viewer.neighbors, number, image_id, k)
        if found is None:
            raise _RefusedError(404, "there is no such image")
        return _json(found)

    @_endpoint
    async def search(self, request: Request) -> Response:
        """Answer with the images nearest to the one in the body."""
        k = _number(request, "k", 24, 1, MAX_NEIGHBORS)
        content = await _body(request, MAX_UPLOAD_BYTES)
        if not content:
            raise _RefusedError(400, "expected an image")
        return _json(await self._in_thread(self.viewer.search, content, k))

    @_endpoint
    async def map(self, request: Request) -> Response:
        """Answer with the map of a store, or that it is being computed."""
        from starlette.responses import Response

        method = request.query_params.get("method", "")
        found = await self._in_thread(self._analyses(request).map, method)
        if found is None:
            return _json({"status": "working"}, WORKING)
        return Response(found, media_type="application/octet-stream")

    @_endpoint
    async def duplicates(self, request: Request) -> Response:
        """Answer with groups of duplicates, or that they are being computed."""
        start = _number(request, "start", 0, 0, 2**53)
        percent = _number(request, "percent", 95, 1, 100)
        number, shown = self._store(request), self.viewer.shown
        other = None
        if _number(request, "against", 0, 0, 1):
            if len(shown) < 2:
                raise _RefusedError(404, "there is no other store")
            other = shown[1 - number].store
        analyses = shown[number].analyses
        found = await self._in_thread(analyses.duplicates, percent / 100, start, other)
        return _json({"status": "working"}, WORKING) if found is None else _json(found)

    @_endpoint
    async def outliers(self, request: Request) -> Response:
        """Answer with images by their distance to the others, or that it is being computed."""
        start = _number(request, "start", 0, 0, 2**53)
        found = await self._in_thread(self._analyses(request).outliers, start)
        return _json({"status": "working"}, WORKING) if found is None else _json(found)

    @_endpoint
    async def failures(self, request: Request) -> Response:
        """Answer with images without a row, and with those that moved or changed since."""
        shown = self.viewer.shown[self._store(request)]
        start = _number(request, "start", 0, 0, 2**53)
        failures = shown.collection.failures

        def found() -> dict[str, Any]:
            reasons: dict[str, int] = {}
            for failure in failures:
                reasons[failure["error"]] = reasons.get(failure["error"], 0) + 1
            keys = ("path", "error", "message")
            listed = failures[start : start + MAX_ROWS]
            problems = sorted(shown.thumbnails.problems.items())[:MAX_ROWS]
            paths = {i: shown.collection.image(i) for i, _ in problems}
            return {
                "total": len(failures),
                "start": start,
                "reasons": reasons,
                "failures": [[failure[key] for key in keys] for failure in listed],
                "problems": [
                    [image.path, *problem] for i, problem in problems if (image := paths[i])
                ],
            }

        return _json(await self._in_thread(found))

    @_endpoint
    async def list(self, request: Request) -> Response:
        """Answer with the paths of images as ``extract --list`` takes them."""
        from starlette.responses import Response

        collection = self._collection(request)
        ids = _ids(await _body(request, MAX_JSON_BYTES))
        content = await self._in_thread(path_list, collection, ids)
        headers = {"content-disposition": 'attachment; filename="selection.txt"'}
        return Response(content, media_type="application/octet-stream", headers=headers)

    def _store(self, request: Request) -> int:
        number = int(request.path_params["store"])
        if number >= len(self.viewer.shown):
            raise _RefusedError(404, "there is no such store")
        return number

    def _analyses(self, request: Request) -> Analyses:
        return self.viewer.shown[self._store(request)].analyses

    def _collection(self, request: Request) -> Collection:
        return self.viewer.shown[self._store(request)].collection

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in a thread, which is left to itself if it hangs."""
        import anyio

        return await anyio.to_thread.run_sync(
            functools.partial(function, *arguments),
            abandon_on_cancel=True,
            limiter=self._threads,
        )


async def _body(request: Request, limit: int) -> bytes:
    """Return the body of a request; refuse one beyond the limit before it has arrived."""
    too_large = _RefusedError(TOO_LARGE, f"got more than {limit >> 20} MiB, which is the limit")
    declared = request.headers.get("content-length", "0")
    if not declared.isdigit() or int(declared) > limit:
        raise too_large
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_large
        parts.append(part)
    return b"".join(parts)


def _ids(body: bytes) -> list[int]:
    try:
        ids = json.loads(body)
    except (ValueError, RecursionError):
        ids = None
    is_list = isinstance(ids, list)
    if not is_list or not all(type(each) is int and 0 <= each < 2**63 for each in ids):
        raise _RefusedError(400, "expected a list of ids")
    return [int(each) for each in ids]


def _number(request: Request, name: str, default: int, least: int, most: int) -> int:
    """Return a number of the query, within bounds."""
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 16 and least <= int(text) <= most):
        raise _RefusedError(400, f"{name}: expected an integer from {least} to {most}")
    return int(text)


def _json(content: Any, status: int = 200) -> Response:
    from starlette.responses import Response

    # ASCII: a name that is not UTF-8 holds half characters.
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    headers = {"cache-control": "no-store"}
    return Response(text, status, media_type="application/json", headers=headers)
