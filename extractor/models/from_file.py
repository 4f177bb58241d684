"""Runs a function of the user's that builds a network."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from extractor.errors import ExtractorError, ModelError, UsageError
from extractor.models import libraries
from extractor.models.backbone import Backbone
from extractor.models.checkpoint import load_into
from extractor.models.provenance import Provenance
from extractor.models.weight_files import WeightsFile
from extractor.options import Options
from extractor.preprocess import Preprocess

__all__ = ["build", "count_as_imported", "files_of_code", "is_function_name", "path_without_models"]

log = logging.getLogger(__name__)

_FOLDERS: list[str] = []  # folders from which files of models were loaded, as in sys.path
_FILES: dict[str, frozenset[str]] = {}  # files behind each digest of code
_ALSO: set[Path] = set()  # files of another process that count as imported here

# Image size for a function that returns a module without a transform.
IMAGE_SIZE = 224


def is_function_name(model: str) -> bool:
    """Return whether the name of a model is ``FILE.py:FUNCTION``."""
    return re.fullmatch(r".*\.py:\w+", model, re.DOTALL) is not None


def build(model: str, options: Options) -> Backbone:
    """Run ``FILE.py:FUNCTION`` and return its backbone on the CPU in float32.

    The function takes no arguments. It returns a :class:`Backbone`, or a module without classifier,
    which gets the usual ImageNet transform.

    Raises:
        ModelError: The file or function is missing, fails, or returns something else.
        WeightsError: The weights cannot be read or do not fit.
        UsageError: Weights other than a file were asked for, or the head is to be kept, or the
            size of tests.
    """
    file, _, name = model.rpartition(":")
    path = Path(file)
    chosen = None if options.weights == "random" else libraries.chosen_file(options.weights)
    _check(model, path, options, chosen)
    log.warning("%s: running the code in this file", path)
    with libraries.seeded(options.seed):
        torch.manual_seed(options.seed)  # GPUs included, on which the code may make its network
        made = _call(_function(path, name), model)
    label = f"{path.name}:{name}"
    if isinstance(made, Backbone):
        made._accept_weights()  # what the code loaded is part of the code
        backbone = made.to(torch.device("cpu"))
    elif isinstance(made, nn.Module):
        backbone = Backbone.from_module(
            made, head=None, preprocess=Preprocess.standard(IMAGE_SIZE), name=label, device="cpu"
        )
    else:
        raise ModelError(f"{model} returned {made!r:.80}, expected a Backbone or a torch.nn.Module")
    # The seed that the code ran with, even if it set one itself: running it again needs the seed.
    provenance = replace(
        backbone.provenance,
        model=label,
        library="file",
        seed=options.seed,
        code=_digest_of_code(path.resolve()),
        function=f"{path.absolute()}:{name}",
    )
    if chosen is not None:
        provenance = _load_weights(backbone, chosen, options, model, provenance)
    backbone._accept_weights()
    preprocess = backbone.preprocess.changed(options.pixel_changes)
    return replace(backbone, preprocess=preprocess, provenance=provenance)


def _check(model: str, path: Path, options: Options, chosen: WeightsFile | None) -> None:
    """Check what a caller asks for before any code runs; raises as :func:`build`."""
    if options.weights == "random":
        raise UsageError(f"{model} makes its own weights; leave --weights out, or name a file")
    if chosen is None and options.weights != "default":
        raise UsageError(
            f"{model} makes its own weights: got {options.weights!r}, expected a file with a state "
            "dict, or no option"
        )
    if not path.is_file():
        raise ModelError(f"model {model}: there is no file {path}")
    if options.test_size:
        raise UsageError(f"test size: {model} chooses its own; use --image-size for another one")
    if options.keep_head:
        raise UsageError(
            f"keep head: {model} makes its own network; return it with its classifier, as "
            "Backbone.from_module(network, head=None, ...)"
        )
    if chosen is None and options.weights_key is not None:
        raise UsageError(f"weights key: {model} makes its own weights; name a file with --weights")
    if chosen is None and options.weights_prefix is not None:
        raise UsageError(
            f"weights prefix: {model} makes its own weights; name a file with --weights"
        )


def _load_weights(
    backbone: Backbone, file: WeightsFile, options: Options, model: str, provenance: Provenance
) -> Provenance:
    """Load a file into a backbone in place, and return the provenance that names the file."""
    load_into(
        backbone.module,
        libraries.read_weights(file, options),
        discarded=backbone.heads,
        label=f"{file.path} into {model}",
    )
    return replace(
        provenance,
        weights=file.kind,
        sha256=file.sha256(),
        source=file.source,
        revision=file.revision,
        key=options.weights_key or "",
        prefix=options.weights_prefix or "",
        file=str(file.path),
    )


def _function(path: Path, name: str) -> Callable[[], object]:
    spec = importlib.util.spec_from_file_location(f"extractor_model_{path.stem}", path)
    assert spec is not None  # it ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    _import_from(path.resolve().parent)
    loader = spec.loader
    _call(lambda: loader.exec_module(module), str(path))
    function: Callable[[], object] | None = getattr(module, name, None)
    if not callable(function):
        here = sorted(
            key
            for key, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", "") == spec.name
        )
        raise ModelError(
            f"{path} has no function {name!r}; it has {', '.join(here) or 'no functions'}"
        )
    return function


def _call(code: Callable[[], object], label: str) -> object:
    """Run code of the user's and turn whatever it raises into a ModelError."""
    try:
        return code()
    except ExtractorError:
        raise
    except (Exception, SystemExit) as error:  # sys.exit() in the file must not end the run
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f" ({last.filename}, line {last.lineno})"
        if isinstance(error, SyntaxError):  # its message has the line
            where = ""
        raise ModelError(f"{label} failed: {type(error).__name__}: {error}{where}") from error


def _digest_of_code(path: Path) -> str:
    """Return the SHA-256 of a file and its imports from its folder, without installed packages."""
    folder = path.parent
    files = {path, *(file for file in _ALSO if folder in file.parents and file.is_file())}
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        found = Path(os.path.normpath(file)) if file else None
        if found and folder in found.parents and "site-packages" not in found.parts:
            files.add(found)
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(folder)}\0".encode())
        digest.update(file.read_bytes())
    text = digest.hexdigest()
    _FILES[text] = frozenset(map(str, files))
    return text


def files_of_code(digests: Iterable[str]) -> tuple[str, ...]:
    """Return the files behind digests of code that were computed in this process."""
    return tuple(sorted({file for digest in digests for file in _FILES.get(digest, ())}))


def count_as_imported(files: Iterable[str]) -> None:
    """Let files count as code of the models beside them, as in the process that imported them.

    A program may import more from the folder of a model than the model does.
    """
    _ALSO.update(map(Path, files))


def path_without_models() -> list[str]:
    """Return ``sys.path`` without the folders of files of models.

    A file in such a folder may have the name of a module of Python or of this package's
    requirements. A new process must import these first, as this one did.
    """
    path = list(sys.path)
    for folder in _FOLDERS:
        if folder in path:
            path.remove(folder)
    return path


def _import_from(folder: Path) -> None:
    """Make a file import from its own folder, and forget modules from folders of other files."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        home = Path(file).parent if file else None
        if home is not None and str(home) in _FOLDERS and home != folder:
            del sys.modules[name]
    _FOLDERS.append(str(folder))
    sys.path.insert(0, str(folder))
