"""What every request has to pass: a known host and the token. And what every answer carries."""

from __future__ import annotations

import hmac
from collections.abc import Collection, MutableMapping
from typing import Any

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from extractor.view.server import ANY_ADDRESS, is_address

__all__ = ["Guard"]

NO_TOKEN = "The address lacks the token of this page. Open the address that extract view printed."
MAX_PATH = 2000  # characters; Python refuses to read longer numbers
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",  # the address holds the token
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class Guard:
    """Passes requests on that name a known host and begin with the token.

    Args:
        app: What answers them. The token belongs to its root path.
        token: First part of the path; empty for none.
        hosts: Names in the header ``Host``, without port; empty for any.
    """

    def __init__(self, app: ASGIApp, token: str, hosts: Collection[str]) -> None:
        self._app = app
        self._token = token.encode()
        self._hosts = frozenset(host.lower().rstrip(".") for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", ()), *added]
            await send(message)

        if self._hosts and not self._knows(_host_of(scope)):
            refusal = PlainTextResponse("unknown host", 403)
            await refusal(scope, receive, with_headers)
            return
        if len(scope["path"]) > MAX_PATH:
            refusal = PlainTextResponse("the address is too long", 414)
            await refusal(scope, receive, with_headers)
            return
        inner = self._inside(scope)
        if inner is None:
            refusal = PlainTextResponse(NO_TOKEN, 403)
            await refusal(scope, receive, with_headers)
            return
        await self._app(inner, receive, with_headers)

    def _knows(self, host: str) -> bool:
        return host in self._hosts or (ANY_ADDRESS in self._hosts and is_address(host))

    def _inside(self, scope: Scope) -> MutableMapping[str, Any] | None:
        """Return the scope below the token; None if the path does not begin with it."""
        if not self._token:
            return scope
        root = scope.get("root_path", "")
        path = scope["path"]
        path = path[len(root) :] if path.startswith(root) else path
        word, _, _ = path.removeprefix("/").partition("/")
        if not hmac.compare_digest(word.encode("utf-8", "surrogateescape"), self._token):
            return None
        return {**scope, "root_path": f"{root}/{word}"}


def _host_of(scope: Scope) -> str:
    """Return the host that a request names, without its port; empty if it names none or several."""
    values = [value for name, value in scope["headers"] if name == b"host"]
    if len(values) != 1:
        return ""
    text = str(values[0].decode("latin-1")).lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0].rstrip(".")
