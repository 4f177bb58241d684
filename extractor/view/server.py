"""Serves the page on this machine: a free port, a token, a browser."""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import secrets
import socket
import sys
import webbrowser
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from extractor.errors import InstallationError, UsageError

if TYPE_CHECKING:
    from starlette.applications import Starlette

__all__ = [
    "ANY_ADDRESS",
    "DEFAULT_PORT",
    "LOOPBACK_HOSTS",
    "address_of",
    "hosts_for",
    "is_address",
    "listen",
    "new_token",
    "open_browser",
    "serve",
]

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
ANY_ADDRESS = "any address"  # any IP address, but no other name
DEFAULT_PORT = 8765
PORTS_TRIED = 20
MAX_PORT = 65535
PATIENCE_SECONDS = 2  # for answers that are under way when the server ends
BACKLOG = 128


def new_token() -> str:
    """Return a token that nobody guesses."""
    return secrets.token_urlsafe(24)


def hosts_for(host: str) -> tuple[str, ...]:
    """Return the names under which a server may be asked that listens to an address.

    A page of another site can make its own name stand for this machine. A request from there has
    that name as its host, and is refused.
    """
    if _is_loopback(host):
        return (*LOOPBACK_HOSTS, host)
    return (*LOOPBACK_HOSTS, host, socket.gethostname(), socket.getfqdn(), ANY_ADDRESS)


def listen(host: str, port: int | None) -> socket.socket:
    """Return a socket that listens.

    Args:
        host: Name or address to listen to.
        port: Port, 0 for any free one; None for the default port, or the next free one.

    Raises:
        UsageError: The port is taken, or this machine does not have the address.
    """
    if port is not None and not 0 <= port <= MAX_PORT:
        raise UsageError(f"port: got {port}, expected 0 to {MAX_PORT}")
    ports = range(DEFAULT_PORT, DEFAULT_PORT + PORTS_TRIED) if port is None else (port,)
    for number in ports:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, number, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            # With the protocol named, asyncio turns off Nagle's algorithm: 45 ms a request.
            found = socket.socket(family, kind, protocol)
        except (OSError, UnicodeError) as error:
            raise UsageError(f"host: {host!r} is no address of this machine ({error})") from error
        try:
            # A port counts as taken for minutes after a server ended, but for this.
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
            found.listen(BACKLOG)
        except OSError as error:
            found.close()
            if error.errno == errno.EADDRINUSE and port is None:
                continue
            raise UsageError(_why_not(host, number, error)) from error
        return found
    last = DEFAULT_PORT + PORTS_TRIED - 1
    raise UsageError(f"port: {DEFAULT_PORT} to {last} are taken; name a free one with --port")


def _why_not(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port: {port} is taken by another program; name another one, or leave --port out"
    if error.errno == errno.EACCES:
        return f"port: {port} needs more rights; try one above 1023"
    return f"cannot listen to {host}, port {port}: {error.strerror}"


def address_of(listener: socket.socket, host: str, token: str) -> str:
    """Return the address of the page."""
    port = listener.getsockname()[1]
    name = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(host, host)
    return f"http://{f'[{name}]' if ':' in name else name}:{port}/{token}/"


def serve(app: Starlette, listener: socket.socket, started: Callable[[], None]) -> None:
    """Serve an application until a signal ends the process.

    Args:
        app: The application.
        listener: A socket that listens.
        started: Called once before the first request is answered.

    Raises:
        InstallationError: uvicorn is not installed.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise InstallationError(
            "the page needs uvicorn; try pip install 'backbone-extractor[view]'"
        ) from error

    class Server(uvicorn.Server):
        async def startup(self, *arguments: Any, **keywords: Any) -> None:
            await super().startup(*arguments, **keywords)
            started()

        async def shutdown(self, *arguments: Any, **keywords: Any) -> None:
            # Requests that are cut off are no errors, and need no traceback.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            await super().shutdown(*arguments, **keywords)

    config = uvicorn.Config(
        app,
        log_level="error",
        access_log=False,  # addresses hold the token
        server_header=False,
        ws="none",
        lifespan="off",
        timeout_graceful_shutdown=PATIENCE_SECONDS,
    )
    Server(config).run(sockets=[listener])


def open_browser(address: str) -> None:
    """Open an address in the browser of a desktop; do nothing where there is none.

    A browser in the terminal would cover the address.
    """
    has_desktop = sys.platform == "darwin" or any(
        map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY"))
    )
    if has_desktop:
        webbrowser.open(address)


def is_address(host: str) -> bool:
    """Return whether a host is an IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    return is_address(host) and ipaddress.ip_address(host).is_loopback
