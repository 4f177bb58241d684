"""Packages that must be installed: versions, whether they fit, and what a failed import means."""

from __future__ import annotations

import importlib.util
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from extractor.errors import InstallationError
from extractor.text import first_line

__all__ = [
    "PACKAGES",
    "Package",
    "explain_import",
    "import_problem",
    "installation_errors",
    "misfit",
    "version_problem",
]

# torch 2.0 was released with torchvision 0.15, and each minor version since with the next one. See
# the table in https://github.com/pytorch/vision#installation.
TORCHVISION_OF_TORCH_2 = 15


@dataclass(frozen=True)
class Package:
    """A package that the program needs.

    Attributes:
        name: Name that pip knows.
        module: Name that Python imports.
        minimum: Oldest version that works; empty for any.
    """

    name: str
    module: str
    minimum: str = ""

    @property
    def version(self) -> str:
        """Installed version, as its metadata has it; empty if it has none."""
        import importlib.metadata  # here, since it slows down a start

        try:
            return str(importlib.metadata.version(self.name) or "")
        except Exception:  # no metadata, or damaged ones
            return ""

    def __str__(self) -> str:
        return f"{self.name} {self.version}".rstrip()


# In the order in which they import each other.
PACKAGES = {
    package.name: package
    for package in (
        Package("numpy", "numpy", "1.26"),
        Package("pillow", "PIL", "11.3"),
        Package("pyarrow", "pyarrow", "16"),
        Package("torch", "torch", "2.4"),
        Package("torchvision", "torchvision", "0.19"),
        Package("safetensors", "safetensors"),
        Package("huggingface-hub", "huggingface_hub"),
        Package("timm", "timm", "1.0.12"),
        Package("tqdm", "tqdm", "4.66"),
    )
}


def misfit(torch: str, torchvision: str) -> str:
    """Return the torchvision version that a torch version needs, if the given one is another.

    >>> misfit("2.6.0+cu124", "0.19.0"), misfit("2.6.0+cu124", "0.21.0+cu124")
    ('0.21', '')
    """
    major, minor, *_ = *_numbers(torch), 0, 0
    wanted = (0, TORCHVISION_OF_TORCH_2 + minor)
    if major != 2 or not torchvision or _numbers(torchvision)[:2] == wanted:
        return ""
    return ".".join(map(str, wanted))


def version_problem(package: Package) -> str:
    """Return what is wrong with the installed version, and what to try; empty if nothing is."""
    version = package.version
    if not version and importlib.util.find_spec(package.module) is None:
        names = "torch torchvision" if package.name == "torch" else package.name
        return f"{package.name} is not installed; try: pip install {names}"
    if version and _numbers(version) < _numbers(package.minimum):
        return (
            f"{package} is installed, expected {package.minimum} or newer; "
            f"try: pip install '{package.name}>={package.minimum}'"
        )
    return ""


def import_problem(package: Package, reason: str) -> str:
    """Return why a package cannot be imported, and what to try.

    Args:
        package: The package.
        reason: What Python said, in one line.
    """
    if (problem := version_problem(package)) != "":
        return problem
    torch = PACKAGES["torch"]
    failed = f"{package} cannot be imported ({reason})"
    if "failed to map segment" in reason:  # the loader's words for ENOMEM and EPERM
        return f"{failed}; try a higher ulimit -v, or a folder that is not mounted noexec"
    if package.name not in ("torch", "torchvision"):
        return f"{failed}; try: pip install --force-reinstall {package.name}"
    if package.name == "torchvision" and (wanted := misfit(torch.version, package.version)):
        return (
            f"{failed}: it does not fit {torch}, which needs torchvision {wanted}; "
            f"try: pip install 'torchvision=={wanted}.*'"
        )
    return f"{failed}; try: pip install --force-reinstall torch torchvision"


def explain_import(error: BaseException) -> str:
    """Return what is wrong with the installation if an error comes from importing a package.

    Anything may be raised while a package is imported. Such an error has passed through the body of
    one of its modules. Of several packages that import each other, the innermost is to blame.

    Returns:
        One sentence with what to try, or an empty string for any other error.
    """
    frames = [
        (frame.f_globals.get("__name__") or "", frame.f_code.co_name)
        for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    modules = [name for name, code in frames if code == "<module>"]
    if isinstance(error, ModuleNotFoundError):
        modules.append(error.name or "")
    elif isinstance(error, ImportError) and frames and frames[-1][0].startswith("extractor"):
        modules.append(error.name or "")  # a name that another version has
    by_module = {package.module: package for package in PACKAGES.values()}
    for module in reversed(modules):
        if (package := by_module.get(module.partition(".")[0])) is not None:
            return import_problem(package, first_line(error))
    return ""


@contextmanager
def installation_errors(
    is_foreign: Callable[[BaseException], bool] = lambda _: False,
) -> Iterator[None]:
    """Raise :class:`InstallationError` where a package cannot be imported.

    Args:
        is_foreign: Returns whether an error comes from code of the caller, and stays as it is.
    """
    try:
        yield
    except Exception as error:
        explained = "" if is_foreign(error) else explain_import(error)
        if not explained:
            raise
        raise InstallationError(explained) from error


def _numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, without its build."""
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])[:3]))
