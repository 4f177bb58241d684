"""Packages that stand in for installed ones, and are broken."""

from __future__ import annotations

import shutil
from pathlib import Path

__all__ = ["stand_in"]


def stand_in(folder: Path, name: str, version: str, code: str, distribution: str = "") -> Path:
    """Make a package that runs ``code`` when it is imported; return the folder for Python's path.

    A later version replaces an earlier one.
    """
    distribution = distribution or name
    file_name = distribution.replace("-", "_")
    for old in folder.glob(f"{file_name}-*.dist-info"):
        shutil.rmtree(old)
    metadata = folder / f"{file_name}-{version}.dist-info"
    metadata.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
    (metadata / "METADATA").write_text(text)
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "__init__.py").write_text(code)
    return folder
