"""The map in CONTRIBUTING.md follows the code."""

from __future__ import annotations

import re
from pathlib import Path

import extractor

ROOT = Path(__file__).parents[2]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PACKAGE = Path(extractor.__file__).parent


def modules() -> list[str]:
    """Return the path of every module with code, relative to the package."""
    paths = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    return sorted(path.relative_to(PACKAGE).as_posix() for path in paths)


def test_map_of_the_code_names_every_module_once() -> None:
    section = CONTRIBUTING.read_text("utf-8").partition("## Map of the code")[2]
    section = section.partition("\n## ")[0]
    listed: list[str] = []
    folder = ""
    for line in section.splitlines():
        if heading := re.match(r"### `extractor/([\w/]*)`", line):
            folder = heading[1]
        elif row := re.match(r"\| `(\w+)` \|", line):
            listed.append(f"{folder}{row[1]}.py")
    assert sorted(listed) == modules()


def test_every_file_that_contributing_names_exists() -> None:
    text = CONTRIBUTING.read_text("utf-8").replace("tests/<folder>/test_<module>.py", "")
    for name in re.findall(r"`((?:[\w.-]+/)+[\w.*-]*)`", text):
        homes = (ROOT / name, PACKAGE / name, PACKAGE / f"{name}.py")
        assert any(home.exists() for home in homes), name
