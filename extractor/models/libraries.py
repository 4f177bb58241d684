"""What the builders of both libraries need."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from extractor.errors import ExtractorError, ModelError, UsageError, WeightsError
from extractor.models import weight_files as weights
from extractor.models.backbone import Provenance
from extractor.options import Options

__all__ = [
    "chosen_file",
    "gone",
    "import_library",
    "provenance",
    "public_version",
    "unknown_weights",
    "without_weights",
]

HUB = "hf-hub:"
SUFFIXES = (".pth", ".pt", ".safetensors", ".bin", ".tar", ".ckpt")


def import_library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModelError(f"{name} cannot be imported ({error}); try: pip install {name}") from error
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        raise ExtractorError(
            f"torch {torch.__version__} and the installed torchvision were not built for each "
            "other; install a matching pair, for example: pip install --force-reinstall torch "
            "torchvision"
        ) from error


def chosen_file(wanted: str) -> weights.WeightsFile | None:
    """The file, where weights are given as a path or as ``hf-hub:ORG/NAME``."""
    if wanted in ("default", "random"):
        return None
    if wanted.startswith(HUB):
        repository = wanted.removeprefix(HUB)
        return weights.find_hub_file(repository, weights.hub_filenames(), tag="", how=wanted)
    path = Path(wanted)
    looks_like_one = path.suffix in SUFFIXES
    # A folder may well have the name of a tag; a pipe or a device is meant as a file.
    if not (looks_like_one or os.sep in wanted or (path.exists() and not path.is_dir())):
        return None
    if not path.is_file():
        what = "no such file"
        if path.is_dir():
            what = "is a folder, expected a file"
        elif path.exists():
            what = "is no regular file; copy what it gives into one"
        raise WeightsError(f"weights {wanted}: {what}")
    return weights.WeightsFile(path)


def unknown_weights(model: str, tag: str, known: Sequence[str]) -> str:
    some = ", ".join(sorted(filter(None, known))) or "none"
    return (
        f"{model}: unknown weights {tag!r}; expected default, random, a file, hf-hub:ORG/NAME, or "
        f"one of its tags ({some})"
    )


def gone(before: Sequence[str], module: nn.Module) -> tuple[str, ...]:
    """Names of the modules whose parameters were in a state dict and no longer are."""
    left = module.state_dict().keys()
    return tuple(dict.fromkeys(key.rpartition(".")[0] for key in before if key not in left))


def provenance(
    model: str,
    library: Any,
    module: nn.Module,
    found: weights.WeightsFile | None,
    options: Options,
) -> Provenance:
    """Where a loaded network comes from; ``found`` is None for random weights."""
    name, version = library.__name__, library.__version__
    if found is None and options.weights_key is not None:
        raise UsageError("weights key: it chooses in a file, and random weights have none")
    if found is None:
        digest = weights.sha256_of_state(module.state_dict())
        return Provenance(model, name, version, "random", "", digest, seed=options.seed)
    return Provenance(
        model,
        name,
        version,
        found.kind,
        found.tag,
        weights.sha256_of_weights(found),
        found.source,
        found.revision,
        options.weights_key or "",
        file=str(found.path),
    )


def public_version(library: Any) -> str:
    """A library's version without the mark of its build, such as ``+cu130``."""
    return str(library.__version__).partition("+")[0]


def without_weights(model: str, library: Any) -> Provenance:
    """Of a network that has no values."""
    return Provenance(model, library.__name__, public_version(library), "none", "", "")
