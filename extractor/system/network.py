"""Asks whether a server can be reached."""

from __future__ import annotations

import threading
from urllib.parse import urlsplit

__all__ = ["answers"]


def answers(url: str, seconds: float) -> bool:
    """Return whether the server of an address answers at all, through the proxies in use.

    Args:
        url: Address on the server; only the server itself is asked.
        seconds: A server that says nothing for this long counts as unreachable.
    """
    import urllib.error
    import urllib.request
    from http.client import HTTPException

    parts = urlsplit(url)
    outcome: list[bool] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(f"{parts.scheme}://{parts.netloc}/", method="HEAD")
            urllib.request.urlopen(request, timeout=seconds).close()
            outcome.append(True)
        except urllib.error.HTTPError:  # it refuses the request, but it is there
            outcome.append(True)
        except (OSError, ValueError, HTTPException):
            outcome.append(False)

    # In a thread of its own: no time limit can be set on the look-up of a name.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return outcome == [True]
