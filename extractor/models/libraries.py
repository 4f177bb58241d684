"""Helpers that the builders for timm and torchvision share."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from extractor.errors import UsageError, WeightsError
from extractor.models import weight_files
from extractor.models.checkpoint import (
    MisfitError,
    State,
    load_into,
    read_checkpoint,
    under_prefix,
    without_counters,
)
from extractor.models.digests import sha256_of_state
from extractor.models.naming import HUB, is_repository, plain_name
from extractor.models.provenance import Provenance
from extractor.models.weight_files import WeightsFile
from extractor.options import Options
from extractor.system.installation import installation_errors

__all__ = [
    "chosen_file",
    "import_library",
    "load_with_head",
    "provenance",
    "public_version",
    "read_weights",
    "removed_modules",
    "seeded",
    "unknown_weights",
    "without_weights",
]

SUFFIXES = (".pth", ".pt", ".safetensors", ".bin", ".tar", ".ckpt")


def import_library(name: str) -> Any:
    """Import a library by name.

    Raises:
        InstallationError: It cannot be imported.
    """
    with installation_errors():
        return importlib.import_module(name)


def chosen_file(wanted: str) -> WeightsFile | None:
    """Return the file that ``--weights`` names by path or as ``hf-hub:ORG/NAME``, else None.

    Raises:
        WeightsError: There is no such file, or the hub does not have it.
    """
    if wanted in ("default", "random"):
        return None
    plain = plain_name(wanted)
    is_page = is_repository(plain) and not is_repository(wanted.rstrip("/"))
    wanted = HUB + plain if is_page else plain
    if "://" in wanted:
        raise WeightsError(
            f"weights {wanted}: an address; download the file, and give its path, or give "
            "hf-hub:ORG/NAME"
        )
    is_named = is_repository(wanted) and not wanted.endswith(SUFFIXES)
    if is_named and not os.path.exists(wanted):
        raise WeightsError(
            f"weights {wanted}: no such file; write hf-hub:{wanted} for a repository of the hub"
        )
    if wanted.startswith(HUB):
        repository = wanted.removeprefix(HUB)
        return weight_files.find_hub_file(
            repository, weight_files.hub_filenames(), tag="", label=wanted
        )
    path = Path(wanted)
    looks_like_file = path.suffix in SUFFIXES or os.sep in wanted
    # A folder may well have the name of a tag; a pipe or a device is meant as a file.
    if not (looks_like_file or (path.exists() and not path.is_dir())):
        return None
    if not path.is_file():
        problem = "no such file"
        if path.is_dir():
            problem = "is a folder, expected a file"
        elif path.exists():
            problem = "not a regular file; copy its content into one"
        raise WeightsError(f"weights {wanted}: {problem}")
    return WeightsFile(path)


def read_weights(file: WeightsFile, options: Options) -> State:
    """Return the tensors of a weights file; a cached file must be what its name says.

    Raises:
        WeightsError: A cached file has another content than its name says, or the file cannot be
            read.
    """
    file.check()
    state = without_counters(read_checkpoint(file.path, options.weights_key), file.path.name)
    if options.weights_prefix is None:
        return state
    return under_prefix(state, options.weights_prefix, str(file.path))


def unknown_weights(model: str, tag: str, known: Sequence[str]) -> str:
    """Return the message for a tag that a library does not know."""
    tags = ", ".join(sorted(filter(None, known))) or "none"
    return (
        f"{model}: unknown weights {tag!r}; expected default, random, a file, hf-hub:ORG/NAME, or "
        f"one of its tags ({tags})"
    )


def removed_modules(before: Sequence[str], module: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules whose tensors are no longer in the state dict.

    Args:
        before: Keys of the state dict before heads were removed.
        module: The network now.
    """
    left = module.state_dict().keys()
    return tuple(dict.fromkeys(key.rpartition(".")[0] for key in before if key not in left))


def load_with_head(
    build: Callable[[int | None], nn.Module],
    state: Mapping[str, torch.Tensor],
    classifier: Collection[str],
    *,
    discarded: Sequence[str] = (),
    label: str,
) -> nn.Module:
    """Build a network that keeps its classifier, and load a checkpoint into all of it.

    The classifier gets as many classes as it has in the checkpoint.

    Args:
        build: Builds the network for a number of classes; None stands for the published number.
        state: Tensors of the checkpoint.
        classifier: Names of the tensors that have one row for each class.
        discarded: Names of modules that the network lacks. Their tensors are optional.
        label: The file and the model, for the error message.

    Raises:
        WeightsError: The checkpoint has no classifier.
        MisfitError: Other tensors do not fit.
    """
    module = build(None)
    try:
        load_into(module, state, discarded=discarded, label=label)
        return module
    except MisfitError as error:
        expected = module.state_dict()
        if not error.state.keys() & classifier:
            if expected.keys() - error.state.keys() <= set(classifier):
                raise WeightsError(
                    f"{label}: the file has no classifier ({', '.join(sorted(classifier))}); leave "
                    "--keep-head out"
                ) from error
            raise
        counts = {len(error.state[name]) for name in classifier if name in error.state}
        if len(counts) > 1 or counts == {len(expected[name]) for name in classifier}:
            raise
    module = build(counts.pop())
    load_into(module, state, discarded=discarded, label=label)
    return module


def provenance(
    model: str,
    library: Any,
    module: nn.Module,
    found: WeightsFile | None,
    options: Options,
) -> Provenance:
    """Return the origin of a loaded network.

    Args:
        model: Full name of the model.
        library: The module ``timm`` or ``torchvision``.
        module: The network.
        found: Its weights file; None for random weights.
        options: Seed, weights key and weights prefix.

    Raises:
        UsageError: A weights key or prefix for random weights.
    """
    name, version = library.__name__, library.__version__
    if found is None and options.weights_key is not None:
        raise UsageError("weights key: random weights have none; name a file with --weights")
    if found is None and options.weights_prefix is not None:
        raise UsageError("weights prefix: random weights have none; name a file with --weights")
    if found is None:
        digest = sha256_of_state(module.state_dict())
        return Provenance(model, name, version, "random", "", digest, seed=options.seed)
    return Provenance(
        model,
        name,
        version,
        found.kind,
        found.tag,
        found.sha256(),
        found.source,
        found.revision,
        options.weights_key or "",
        prefix=options.weights_prefix or "",
        file=str(found.path),
    )


def public_version(library: Any) -> str:
    """Return a library's version without its build tag, such as ``+cu130``."""
    return str(library.__version__).partition("+")[0]


def without_weights(model: str, library: Any) -> Provenance:
    """Return the origin of a network that has shapes but no values."""
    return Provenance(model, library.__name__, public_version(library), "none", "", "")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Make networks that are built in the block float32, and their random numbers follow a seed.

    The program's generators and its default type are as before afterwards.
    """
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU, too
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
