"""Checks of packages and devices. Runs in a child process, for an import may crash."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from typing import Any

from extractor.doctor.finding import Checks, Finding
from extractor.system.installation import (
    PACKAGES,
    Package,
    explain_import,
    import_problem,
    misfit,
    version_problem,
)
from extractor.text import as_size, first_line, plural

__all__ = ["check_extras", "check_libraries", "check_tools", "check_torch"]

TRY = "; try: "
SMI = ("nvidia-smi", "--query-gpu=name,driver_version,memory.free", "--format=csv,noheader")
SMI_SECONDS = 10
CODECS = {  # Pillow's names of its optional decoders
    "jpg": "JPEG",
    "zlib": "PNG",
    "webp": "WebP",
    "libtiff": "TIFF",
    "jpg_2000": "JPEG 2000",
    "avif": "AVIF",
}


TOOLS = {  # by the name of their extra
    "search": Package("faiss-cpu", "faiss", "1.8"),
    "evaluate": Package("scikit-learn", "sklearn", "1.4"),
    "export": Package("h5py", "h5py", "3.10"),
    "map": Package("matplotlib", "matplotlib", "3.8"),
    "ray": Package("ray", "ray", "2.55"),
}


def check_libraries(_: str) -> Checks:
    """Import the packages that torch does not need, and look for decoders of image formats."""
    for name in ("numpy", "pillow", "pyarrow", "safetensors", "huggingface-hub", "tqdm"):
        yield name
        yield _package(name)
    yield "formats"
    yield from _formats()


def check_extras(_: str) -> Checks:
    """Import the decoders of image formats that Pillow lacks; none of them is needed."""
    from extractor.images.containers.kinds import KINDS

    for kind in (kind for kind in KINDS if kind.extra):
        yield kind.name
        package = Package(kind.package, kind.module)
        yield _optional(kind.name, package, kind.extra, "not decoded", f"decoded by {package}")


def check_tools(_: str) -> Checks:
    """Import the packages of search, evaluation, exports, maps and Ray; none is needed."""
    for extra, package in TOOLS.items():
        yield extra
        yield _optional(extra, package, extra, f"no {package.name}", str(package))


def _optional(name: str, package: Package, extra: str, absent: str, present: str) -> Finding:
    """Import a package of an extra, and return whether it is there and works."""
    details = {"version": package.version}
    if importlib.util.find_spec(package.module) is None:
        text = f"{absent}; pip install 'backbone-extractor[{extra}]'"
        return Finding(name, "ok", text, details=details)
    try:
        importlib.import_module(package.module)
    except Exception as error:
        text = f"{package} cannot be imported ({first_line(error)})"
        advice = f"pip install --force-reinstall {package.name}"
        return Finding(name, "warning", text, advice, details)
    if problem := version_problem(package):
        text, _, advice = problem.partition(TRY)
        return Finding(name, "warning", text, advice, details)
    return Finding(name, "ok", present, details=details)


def check_torch(_: str) -> Checks:
    """Import torch and what is built on it, and try every device."""
    warnings.simplefilter("ignore")
    yield "torch"
    torch = _package("torch")
    yield torch
    if torch.state != "broken":
        yield "devices"
        yield from _devices()
    for name in ("torchvision", "timm"):
        yield name
        yield _package(name)
    yield "extractor"
    yield _program()


def _package(name: str) -> Finding:
    """Import a package, and return whether it works."""
    package = PACKAGES[name]
    details = {"version": package.version}
    try:
        module = importlib.import_module(package.module)
    except Exception as error:
        problem = explain_import(error) or import_problem(package, first_line(error))
        return _broken(name, problem, details)
    if (problem := version_problem(package)) != "":
        return _broken(name, problem, details)
    version = package.version or "unknown version"
    if name == "torch":
        return _torch(module, version, details)
    if name == "torchvision":
        return _torchvision(version, details)
    return Finding(name, "ok", version, details=details)


def _broken(name: str, problem: str, details: dict[str, Any], intro: str = "") -> Finding:
    """Return the finding for a sentence about a package, which may be one that ``name`` needs."""
    needed = [str(each) for each in PACKAGES.values() if each.name != name]
    text, _, advice = problem.partition(TRY)
    for package in needed:
        if text.startswith(f"{package} "):
            return Finding(name, "broken", f"{intro}needs {package}, which is broken", "", details)
    return Finding(name, "broken", intro + text, advice, details)


def _torch(torch: Any, version: str, details: dict[str, Any]) -> Finding:
    try:
        torch.ones(1).numpy()
    except Exception as error:
        text = f"{version} does not fit {PACKAGES['numpy']}: {first_line(error)}"
        advice = "pip install --upgrade torch torchvision, or pip install 'numpy<2'"
        return Finding("torch", "broken", text, advice, details)
    built = torch.version.cuda and f"CUDA {torch.version.cuda}"
    built = built or (torch.version.hip and f"ROCm {torch.version.hip}")
    return Finding("torch", "ok", f"{version}, built for {built or 'CPUs'}", details=details)


def _torchvision(version: str, details: dict[str, Any]) -> Finding:
    torch = PACKAGES["torch"]
    if wanted := misfit(torch.version, version):
        text = f"{version} works, but is not the release for {torch}, which is {wanted}"
        return Finding(
            "torchvision", "warning", text, f"pip install 'torchvision=={wanted}.*'", details
        )
    return Finding("torchvision", "ok", f"{version}, fits {torch}", details=details)


def _program() -> Finding:
    """Import all of this program, which fails where a package lacks a name."""
    from extractor.version import __version__

    details = {"version": __version__}
    try:
        importlib.import_module("extractor.api")
    except Exception as error:
        problem = explain_import(error) or f"{type(error).__name__}: {first_line(error)}"
        return _broken("extractor", problem, details, f"{__version__} ")
    return Finding("extractor", "ok", __version__, details=details)


def _formats() -> Iterator[Finding]:
    """Say which image formats the installed Pillow decodes."""
    from PIL import features

    from extractor.images.formats import readable_suffixes

    missing = [name for codec, name in CODECS.items() if not features.check(codec)]
    present = ", ".join(name for name in CODECS.values() if name not in missing)
    details = {"suffixes": sorted(readable_suffixes())}
    text = f"{present} and others, {len(readable_suffixes())} suffixes"
    if missing:
        advice = "pip install --force-reinstall pillow"
        text += f"; this Pillow lacks {', '.join(missing)}"
        yield Finding("formats", "warning", text, advice, details)
    else:
        yield Finding("formats", "ok", text, details=details)


def _devices() -> Iterator[Finding]:
    import torch

    threads = plural(torch.get_num_threads(), "thread")
    yield Finding("devices", "ok", f"cpu ({torch.backends.cpu.get_cpu_capability()}, {threads})")
    count = torch.cuda.device_count()
    for index in range(count):
        yield _cuda(index)
    if torch.backends.mps.is_available():
        yield Finding("mps", "ok", "Apple GPU")
    if not count and (seen := _drivers()):
        from extractor.system.devices import why_no_gpu

        built = torch.version.cuda or torch.version.hip
        cause = "it is too old for this torch, or CUDA_VISIBLE_DEVICES hides the GPU"
        yield Finding(
            "gpu",
            "warning",
            f"the driver shows {seen[0]}, but torch sees no GPU ({why_no_gpu()})",
            f"check the driver: {cause}" if built else "install a CUDA build of torch",
        )


def _cuda(index: int) -> Finding:
    import torch

    from extractor.system.devices import advice_for, is_exclusive

    name = f"cuda:{index}"
    try:
        (torch.ones(8, device=name) + 1).sum().item()
        free, total = torch.cuda.mem_get_info(index)
        model = torch.cuda.get_device_name(index)
    except Exception as error:
        return Finding(name, "warning", f"does not work: {first_line(error)}", advice_for(error))
    drivers = _drivers()
    driver = drivers[index].split(", ")[1] if index < len(drivers) else ""
    text = f"{model}, {as_size(free)} of {as_size(total)} free"
    details = {"model": model, "driver": driver, "free_bytes": free, "total_bytes": total}
    if is_exclusive(torch.device(name)):
        text += ", for one process at a time"
        details["exclusive"] = True
    return Finding(name, "ok", f"{text}, driver {driver}" if driver else text, details=details)


def _drivers() -> list[str]:
    """Return one line per GPU that NVIDIA's driver shows: name, driver version, free memory."""
    if shutil.which(SMI[0]) is None:
        return []
    try:
        done = subprocess.run(SMI, capture_output=True, text=True, timeout=SMI_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []
