"""Versions of the software that makes the rows. Needs no torch."""

from __future__ import annotations

import contextlib
import platform
from importlib import metadata

from extractor.images.containers.kinds import KINDS
from extractor.version import __version__

__all__ = ["software_versions"]

LIBRARIES = ("torch", "torchvision", "timm", "pillow", "numpy", "pyarrow")


def software_versions() -> dict[str, str]:
    """Return the versions of Python, this package and its libraries, without importing them."""
    libraries = {name: metadata.version(name) for name in LIBRARIES}
    for kind in KINDS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            if kind.package:
                libraries[kind.package] = metadata.version(kind.package)
    return {"python": platform.python_version(), "extractor": __version__, **libraries}
