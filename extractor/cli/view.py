"""``extract view``: a page in the browser."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence

from extractor.errors import UsageError
from extractor.options import Options
from extractor.terminal.console import logging_to, print_lines, say, warn
from extractor.terminal.parser import Parser
from extractor.terminal.signals import EndedError
from extractor.text import plural

__all__ = ["view", "view_parser"]

DESCRIPTION = """\
Show a store in the browser: its images, their neighbors, a map, duplicates, outliers and failures.
The page is served on this machine only, and its address holds a token. Ctrl-C ends it. Needs
Starlette and uvicorn: pip install 'backbone-extractor[view]'.

  extract view features/resnet50
  extract view features/resnet50 features/vit_base_patch16_224    two models side by side
  extract view features/resnet50 --export site/                   files to send to a colleague
"""


def view_parser() -> argparse.ArgumentParser:
    """Return the parser of ``extract view``."""
    parser = Parser(
        prog="extract view",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("store", metavar="STORE", help="folder of the store")
    parser.add_argument("other", metavar="OTHER", nargs="?", help="another store, to compare")
    parser.add_argument(
        "--port",
        type=int,
        metavar="N",
        help="port to listen to (default: 8765, or the next free one)",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen to; 0.0.0.0 lets other machines in that have the token "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--no-browser", action="store_true", help="print the address, and open no browser"
    )
    parser.add_argument("--root", metavar="FOLDER", help="where the images are now")
    parser.add_argument(
        "--metric",
        choices=("cosine", "ip", "l2"),
        default="cosine",
        help="how rows are compared (default: %(default)s)",
    )
    parser.add_argument("--weights", metavar="FILE", help="the store's weights, if they moved")
    parser.add_argument(
        "--device",
        default=Options().device,
        help="device for images that are searched for (default: %(default)s)",
    )
    parser.add_argument(
        "--export",
        metavar="FOLDER",
        help="write the page as files, which any browser opens, instead of serving it",
    )
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="largest number of images of --export; larger stores are sampled (default: 2000)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the page of --export")
    return parser


def view(arguments: Sequence[str]) -> int:
    """Serve the page until a signal ends it, or export it; return the exit code."""
    parsed = view_parser().parse_args(arguments)
    if parsed.export is not None:
        return _export(parsed)
    if parsed.limit is not None or parsed.overwrite:
        raise UsageError("--limit and --overwrite go with --export; leave them out")
    from extractor.view.app import view_app
    from extractor.view.server import (
        address_of,
        hosts_for,
        listen,
        new_token,
        open_browser,
        serve,
    )

    token = new_token()
    listener = listen(parsed.host, parsed.port)
    address = address_of(listener, parsed.host, token)
    with listener, logging_to(warn):
        app = view_app(
            parsed.store,
            parsed.other,
            token=token,
            hosts=hosts_for(parsed.host),
            root=parsed.root,
            metric=parsed.metric,
            device=parsed.device,
            weights=parsed.weights,
        )

        def started() -> None:
            print_lines([address])
            say("Ctrl-C ends the page.")
            if not parsed.no_browser:
                open_browser(address)

        with contextlib.suppress(EndedError, KeyboardInterrupt):
            serve(app, listener, started)
    return 0


def _export(parsed: argparse.Namespace) -> int:
    from extractor.view.site import DEFAULT_LIMIT, export_page

    with logging_to(warn):
        report = export_page(
            parsed.store,
            parsed.export,
            parsed.other,
            limit=DEFAULT_LIMIT if parsed.limit is None else parsed.limit,
            root=parsed.root,
            metric=parsed.metric,
            overwrite=parsed.overwrite,
        )
    shown = plural(report.images, "image")
    of = f" of {report.of:,}" if report.of > report.images else ""
    print_lines([f"{report.path / 'index.html'}: {shown}{of}"])
    if report.missing:
        say(f"{plural(report.missing, 'image')} moved or changed, and have a placeholder")
    return 0
