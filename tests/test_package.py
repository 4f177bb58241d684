"""The public names of the package, their types, and what importing them loads."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import textwrap
import venv
from pathlib import Path

import pytest

import extractor

ROOT = Path(extractor.__file__).parent.parent


def test_exported_members() -> None:
    assert extractor.__all__ == [
        "Backbone",
        "Changes",
        "Comparison",
        "DecodeError",
        "DeviceError",
        "DuplicateGroup",
        "DuplicateImage",
        "Duplicates",
        "Evaluation",
        "ExportReport",
        "Extractor",
        "ExtractorError",
        "FeatureStore",
        "Hit",
        "Hits",
        "ImageList",
        "InstallationError",
        "InterruptedRunError",
        "LabelError",
        "ModelError",
        "Options",
        "Outlier",
        "Outliers",
        "PageReport",
        "Preprocess",
        "Progress",
        "Report",
        "Searcher",
        "ShardBusyError",
        "ShardsFailedError",
        "SourceError",
        "StoreBusyError",
        "StoreDamagedError",
        "StoreError",
        "StoreInfo",
        "StoreMap",
        "StoreNotFoundError",
        "StoreReplacedError",
        "StoreReport",
        "TransformReport",
        "UnknownTokenError",
        "UsageError",
        "WeightsError",
        "__version__",
        "compare_stores",
        "evaluate_store",
        "export_page",
        "export_store",
        "extract",
        "find_duplicates",
        "find_outliers",
        "list_images",
        "load_backbone",
        "map_store",
        "transform_store",
        "view_app",
    ]
    for name in extractor.__all__:
        assert getattr(extractor, name) is not None
    assert set(extractor.__all__) <= set(dir(extractor))


def test_every_error_class_is_exported() -> None:
    errors = importlib.import_module("extractor.errors")
    assert set(errors.__all__) <= set(extractor.__all__)
    assert all(issubclass(getattr(extractor, n), extractor.ExtractorError) for n in errors.__all__)


def test_type_checkers_see_what_runs() -> None:
    """The imports under TYPE_CHECKING name the modules from which names are resolved."""
    tree = ast.parse(Path(extractor.__file__).read_text("utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == extractor._HOMES
    assert set(seen) == set(extractor.__all__) - {"__version__"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        extractor.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import extractor", {"torch", "numpy", "PIL", "pyarrow", "timm"}),
        ("from extractor import FeatureStore", {"torch", "PIL", "pyarrow", "timm", "torchvision"}),
        ("from extractor import ExtractorError, Options", {"torch", "numpy", "argparse"}),
        ("from extractor import Searcher, Hits", {"torch", "timm", "faiss", "pyarrow"}),
        ("from extractor import Report, Progress, list_images", {"torch", "timm", "torchvision"}),
    ],
)
def test_imports_load_no_more_than_needed(statement: str, absent: set[str]) -> None:
    code = f"import sys; {statement}; print(*({absent!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", ["extract", "Extractor", "load_backbone"])
def test_help_lists_the_options_of_a_function(name: str) -> None:
    parameters = inspect.signature(getattr(extractor, name)).parameters
    assert parameters["precision"].default == "auto"
    assert ("overwrite" in parameters) is (name == "extract")


CONSUMER = """
    from pathlib import Path

    from extractor import Extractor, FeatureStore, Options, Report, extract

    report = extract("images", "resnet50", weights="random", batch_size=8)
    reveal_type(report)
    reveal_type(report.rows)
    reveal_type(Extractor("resnet50", precision="float32").dim)
    extract("images", batchsize=8)
    extract("images", precision="half")
    extract("images", batch_size="8")
    Extractor("resnet50", overwrite=True)
    Options(decode="fast")
    folders: list[Path] = [Path("a"), Path("b")]
    reveal_type(FeatureStore.open(folders))
    reveal_type(FeatureStore.open(["a", Path("b")]))
"""

EXPECTED = [
    r'note: Revealed type is "extractor\.report\.Report"',
    r'note: Revealed type is "(builtins\.)?int"',
    r'note: Revealed type is "(builtins\.)?int"',
    r'error: Unexpected keyword argument "batchsize" for "extract"',
    r'error: Argument "precision" to "extract" has incompatible type',
    r'error: Argument "batch_size" to "extract" has incompatible type',
    r'error: Unexpected keyword argument "overwrite" for "Extractor"',
    r'error: Argument "decode" to "Options" has incompatible type',
    r'note: Revealed type is "extractor\.reading\.groups\.StoreGroup"',
    r'note: Revealed type is "extractor\.reading\.groups\.StoreGroup"',
]


def test_a_consumer_is_type_checked_against_the_installed_package(tmp_path: Path) -> None:
    """mypy believes an installed package only if it has a ``py.typed`` file."""
    pytest.importorskip("mypy")
    venv.create(tmp_path / "venv", with_pip=False)
    (packages,) = tmp_path.glob("venv/lib/python*/site-packages")
    (packages / "extractor").symlink_to(ROOT / "extractor")
    (tmp_path / "consumer.py").write_text(textwrap.dedent(CONSUMER))
    python = ["--python-executable", str(tmp_path / "venv/bin/python")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", *python, "--cache-dir", ".cache", "consumer.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if re.search("error:|Revealed", line)]
    assert len(lines) == len(EXPECTED), done.stdout + done.stderr
    for line, expected in zip(lines, EXPECTED, strict=True):
        assert re.search(expected, line), line
