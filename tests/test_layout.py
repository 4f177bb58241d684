"""Imports of the package point one way: each folder imports only what lies below it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import extractor

PACKAGE = Path(extractor.__file__).parent

# A room imports rooms to the right of it, and itself; rooms of one group do not know each other.
ORDER: list[set[str]] = [
    {"__init__", "__main__"},
    {"cli"},
    {"terminal", "doctor", "view"},
    {"analysis"},
    {"evaluation"},
    {"search"},
    {"api"},
    {"parts"},
    {"run", "serving"},
    {"workers"},
    {"lease"},
    {"compute"},
    {"loading", "models"},
    {"network.fusion"},
    {"images", "network"},
    {"images.containers"},
    {"report"},
    {"upkeep", "export"},
    {"reading"},
    {"store"},
    {"option_arguments"},
    {"options"},
    {"preprocess"},
    {"system"},
    {"flags"},
    {"errors"},
    {"paths", "text", "version"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
MAX_FILES = 16
TORCH_FREE = (
    "models.naming",
    "images",
    "reading",
    "search",
    "store",
    "upkeep",
    "export",
    "evaluation",
    "analysis",
    "options",
    "flags",
    "preprocess",
    "report",
    "errors",
    "paths",
    "text",
    "version",
)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def room_of(module: str) -> str:
    parts = module.removeprefix("extractor.").split(".")
    return next(
        (room for n in (2, 1) if (room := ".".join(parts[:n])) in LEVEL), parts[0] or "__init__"
    )


def imports_of(path: Path) -> Iterator[tuple[str, bool]]:
    """Names of the modules that a file imports, and whether it does so as it is loaded."""
    tree = ast.parse(path.read_text("utf-8"))
    deferred = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            for alias in node.names:
                name = f"{module}.{alias.name}"
                yield (name if is_module(name) else module), id(node) not in deferred
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) not in deferred


def is_module(name: str) -> bool:
    relative = PACKAGE.parent / name.replace(".", "/")
    return relative.is_dir() or relative.with_suffix(".py").is_file()


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@pytest.mark.parametrize("module", FILES)
def test_a_room_imports_only_rooms_below(module: str) -> None:
    room = room_of(module)
    for imported, _ in imports_of(FILES[module]):
        if not imported.startswith("extractor.") or room == "__init__":
            continue
        other = room_of(imported)
        assert other == room or LEVEL[other] > LEVEL[room], f"{module} imports {imported}"


def test_imports_form_no_cycle() -> None:
    graph = {
        module: {
            name.removeprefix("extractor.")
            for name, at_once in imports_of(path)
            if name.startswith("extractor.") and at_once
        }
        for module, path in FILES.items()
    }
    finished: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in finished:
            for imported in graph.get(module, ()):
                visit(imported, (*trail, module))
            finished.add(module)

    for module in graph:
        visit(module, ())


def test_no_folder_has_more_than_sixteen_files() -> None:
    for folder in {path.parent for path in FILES.values()}:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= MAX_FILES, folder


def test_inner_packages_hold_a_docstring_and_nothing_else() -> None:
    for path in PACKAGE.rglob("*/__init__.py"):
        body = ast.parse(path.read_text("utf-8")).body
        assert len(body) == 1, path
        assert isinstance(body[0], ast.Expr), path


@pytest.mark.parametrize(
    "module", [name for name in FILES if {name, room_of(name)} & set(TORCH_FREE)]
)
def test_a_torch_free_room_loads_no_torch(module: str) -> None:
    loaded = {name.partition(".")[0] for name, at_once in imports_of(FILES[module]) if at_once}
    assert not loaded & {"torch", "torchvision", "timm"}
