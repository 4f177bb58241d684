"""What a failed import of a required package means."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.stand_ins import stand_in

import extractor
from extractor.errors import InstallationError
from extractor.system.installation import (
    PACKAGES,
    Package,
    explain_import,
    installation_errors,
    misfit,
    version_problem,
)

ROOT = Path(extractor.__file__).parent.parent


@pytest.mark.parametrize(
    ("torch", "torchvision", "wanted"),
    [
        ("2.4.0", "0.19.0", ""),
        ("2.14.1+cpu", "0.29.1+cpu", ""),
        ("2.6.0+cu124", "0.20.1", "0.21"),
        ("2.4.1", "0.21.0", "0.19"),
        ("2.10.0.dev20260101+cu130", "0.25.0.dev20260101", ""),
        ("2.6.0", "", ""),
        ("", "0.21.0", ""),
        ("3.0.0", "1.0.0", ""),  # nobody knows yet
    ],
)
def test_each_torch_fits_one_torchvision(torch: str, torchvision: str, wanted: str) -> None:
    assert misfit(torch, torchvision) == wanted


def test_minimum_versions_are_those_of_the_distribution() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8").partition("\ndependencies = [")[2]
    declared = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', text.partition("]")[0]))
    assert {name: each.minimum for name, each in PACKAGES.items() if each.minimum} == declared


def test_installed_packages_have_no_problem() -> None:
    assert [version_problem(package) for package in PACKAGES.values()] == [""] * len(PACKAGES)


def test_missing_package_is_told_with_its_command() -> None:
    missing = Package("no-such-package", "no_such_package", "1.0")
    assert version_problem(missing) == (
        "no-such-package is not installed; try: pip install no-such-package"
    )


BROKEN = {
    "missing library": (
        "pyarrow",
        'raise ImportError("libarrow.so.1: cannot open shared object file")',
        r"pyarrow 99 cannot be imported \(libarrow.so.1: cannot open shared object file\); "
        "try: pip install --force-reinstall pyarrow",
    ),
    "any exception": (
        "timm",
        "raise AttributeError(\"module 'torch' has no attribute x\")",
        "timm 99 cannot be imported .*reinstall timm",
    ),
    "needs another": ("timm", "import no_such_module", r"timm 99 .*No module named 'no_such_mod"),
    "torch": (
        "torch",
        'raise OSError("libcudart.so.12: cannot open")',
        r"torch 99 cannot be imported \(libcudart.*--force-reinstall torch torchvision",
    ),
    "too little memory": (
        "torch",
        'raise OSError("libtorch.so: failed to map segment from shared object")',
        r"torch 99 cannot be imported \(libtorch.*; try a higher ulimit -v, or a folder",
    ),
    "inner package": ("timm", "import torchvision", r"torchvision 0.0.1 is installed, expected"),
}


@pytest.mark.parametrize(("name", "code", "match"), BROKEN.values(), ids=BROKEN)
def test_failed_import_names_the_package_to_blame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: str, match: str
) -> None:
    stand_in(tmp_path, name, "99", code)
    stand_in(tmp_path, "torchvision", "0.0.1", "raise RuntimeError('operator does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    for module in {name, "torchvision"}:
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(InstallationError, match=match), installation_errors():
        __import__(name)


def test_other_errors_are_not_blamed_on_a_package() -> None:
    def fail() -> None:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug") as raised, installation_errors():
        fail()
    assert explain_import(raised.value) == ""


@pytest.mark.parametrize("use", ["extractor.FeatureStore", "extractor.extract"])
def test_library_raises_its_own_error_for_a_broken_package(tmp_path: Path, use: str) -> None:
    stand_in(tmp_path, "numpy", "99", "raise ImportError('numpy.core.multiarray failed')")
    code = f"""
import sys
sys.path[:0] = {[str(tmp_path), str(ROOT)]!r}
import extractor
try:
    {use}
except extractor.ExtractorError as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == (
        "InstallationError numpy 99 cannot be imported (numpy.core.multiarray failed); "
        "try: pip install --force-reinstall numpy\n"
    )
