"""Files of the page, and all of its modules as one script."""

from __future__ import annotations

import functools
import re
from pathlib import Path

__all__ = ["KINDS", "bundle", "page_files"]

PAGE = Path(__file__).parent / "page"
KINDS = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
IMPORT = re.compile(r'^import \{[^}]*\} from "\./([\w.]+)";\n', re.MULTILINE)
EXPORT = re.compile(r"^export (?=async |class |const |function )", re.MULTILINE)


@functools.cache
def page_files() -> dict[str, bytes]:
    """Return the files of the page by name. There are no others to be had."""
    return {path.name: path.read_bytes() for path in PAGE.iterdir() if path.suffix in KINDS}


def bundle(entry: str) -> str:
    """Return a module and all that it imports as one classic script.

    Browsers load modules from a server only. The modules of the page have different names at their
    top, and import nothing but each other.

    Args:
        entry: Name of the module.
    """
    parts: dict[str, str] = {}

    def add(name: str) -> None:
        if name in parts:
            return
        parts[name] = ""  # modules may import each other
        text = page_files()[name].decode()
        for imported in IMPORT.findall(text):
            add(imported)
        del parts[name]
        parts[name] = EXPORT.sub("", IMPORT.sub("", text))

    add(entry)
    body = "\n".join(f"// {name}\n{text}" for name, text in parts.items())
    return f'(() => {{\n"use strict";\n{body}}})();\n'
