"""From the name of a model to a :class:`Backbone`."""

from __future__ import annotations

import copy
import difflib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from extractor.errors import ModelError, UsageError
from extractor.models import from_file, from_timm, from_torchvision
from extractor.models.backbone import Backbone
from extractor.models.catalog import Catalog
from extractor.models.checkpoint import MisfitError
from extractor.models.weight_files import WeightsFile
from extractor.network.precision import resolve_precision
from extractor.network.probe import probe
from extractor.network.taps import Output
from extractor.options import DEFAULT_MODEL, Options, Precision
from extractor.preprocess import Fit, Interpolation
from extractor.system.devices import device_errors, resolve_device

__all__ = ["adapt", "fetch", "load", "load_backbone", "resolve_name", "with_changes"]

log = logging.getLogger(__name__)

_DEFAULT = Options()


def load_backbone(
    model: str = DEFAULT_MODEL,
    *,
    weights: str | os.PathLike[str] = _DEFAULT.weights,
    weights_key: str | None = _DEFAULT.weights_key,
    layers: Sequence[str] = _DEFAULT.layers,
    pool: str = _DEFAULT.pool,
    bypass: Sequence[str] = _DEFAULT.bypass,
    image_size: int | tuple[int, int] | None = _DEFAULT.image_size,
    crop_pct: float | None = _DEFAULT.crop_pct,
    interpolation: Interpolation | None = _DEFAULT.interpolation,
    mean: tuple[float, float, float] | None = _DEFAULT.mean,
    std: tuple[float, float, float] | None = _DEFAULT.std,
    resize: Fit | None = _DEFAULT.resize,
    seed: int = _DEFAULT.seed,
    device: str = _DEFAULT.device,
    precision: Precision = _DEFAULT.precision,
) -> Backbone:
    """Build a network, load its weights, take off its classifier, and choose what it embeds with.

    >>> load_backbone("resnet50", layers=["layer3"], pool="gem").dim  # doctest: +SKIP
    1024

    Args:
        model: ``timm:NAME``, ``torchvision:NAME``, or NAME alone, which means timm where timm has
            it; a timm name may carry its weights tag (``resnet50.a1_in1k``). Or a place that holds
            a model of timm, ``hf-hub:ORG/NAME`` or ``local-dir:PATH``, or ``FILE.py:FUNCTION``,
            which runs that code.
        weights: ``default``, ``random``, a tag of the library (``a1_in1k``, ``IMAGENET1K_V1``),
            ``hf-hub:ORG/NAME``, or a file with a state dict.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        precision: ``auto`` (float32), ``float32``, ``bfloat16``, ``float16`` or ``mixed``.

    The other arguments are the fields of :class:`extractor.options.Options`.

    Raises:
        ModelError: unknown model or layer, a head that cannot be removed, or an image size that
            the model cannot take.
        UsageError: an option out of its range.
        WeightsError: weights that are not here, cannot be read, or do not fit.
        DeviceError: a device that this machine does not have.
    """
    options = Options(
        weights=os.fspath(weights),
        weights_key=weights_key,
        layers=layers,
        pool=pool,
        bypass=bypass,
        image_size=image_size,
        crop_pct=crop_pct,
        interpolation=interpolation,
        mean=mean,
        std=std,
        resize=resize,
        seed=seed,
        device=device,
        precision=precision,
    )
    return load(model, options)


def load(
    model: str, options: Options, recorded_sha256: Mapping[str, str] | None = None
) -> Backbone:
    """Load a model as :func:`load_backbone` does, with its arguments in one value.

    Args:
        model: Name of the model as it was typed.
        options: Everything else.
        recorded_sha256: SHA-256 of the weights in existing stores, by full name of the model. It
            decides where several sources on this machine have weights.
    """
    target = resolve_device(options.device)  # first: it is the cheapest to be wrong
    library, name = resolve_name(model)
    if options.weights == "random" and library != "file":
        seed = options.seed
        log.warning("%s: RANDOM weights (seed %d): the embeddings mean nothing", model, seed)
    try:
        backbone = _build(library, name, options, recorded_sha256 or {})
    except MisfitError as error:
        if not error.foreign:
            advice = "Names and shapes are right: check how these values were made"
            raise MisfitError(f"{error}. {advice}", error.state, foreign=False) from error
        asked = f"{library}:{name.partition('.')[0]}"
        likely = [one for one in Catalog.read().models_with(error.state) if one != asked]
        advice = (
            f"They are those of {' or '.join(likely[:3])}: use --model with that name"
            if likely
            else "Check that they were made for this model"
        )
        raise MisfitError(f"{error}. {advice}", error.state) from error
    backbone = adapt(backbone.to(target), options)
    return backbone.to(target, resolve_precision(options.precision))


def _build(library: str, name: str, options: Options, recorded: Mapping[str, str]) -> Backbone:
    if library == "file":
        return from_file.build(name, options)
    if library == "torchvision":
        return from_torchvision.build(name, options)
    recorded_sha256 = recorded.get(f"timm:{name.partition('.')[0]}", "")
    return from_timm.build(name, options, recorded_sha256)


def adapt(backbone: Backbone, options: Options) -> Backbone:
    """A loaded backbone with the bypasses and layers of ``options``, tried with its image size."""
    if options.image_size is not None:
        if backbone.taps is not None:
            raise UsageError("image size: choose it before the layers of a backbone, not after")
        with device_errors(backbone.device):
            shape = probe(
                backbone.module,
                backbone.preprocess.input_size,
                name=backbone.provenance.model,
                advice="leave --image-size out, or try a multiple of 32",
            )
        if backbone.outputs[0] == Output(backbone.outputs[0].shape) and len(shape) == 1:
            backbone = replace(backbone, outputs=(Output(shape),))  # it may hang on the size
    if options.bypass:
        backbone = backbone.bypass(options.bypass)
    if options.layers:
        backbone = backbone.at_layers(options.layers, options.pooling)
    return backbone


def with_changes(backbone: Backbone, options: Options) -> Backbone:
    """A backbone of the user's own with what ``options`` ask for otherwise.

    Raises:
        UsageError: weights for it, which it brings itself.
    """
    if options.weights != _DEFAULT.weights or options.weights_key is not None:
        raise UsageError("a backbone brings its own weights; leave the option weights out")
    if options.pixel_changes:
        changed = backbone.preprocess.changed(options.pixel_changes)
        backbone = replace(backbone, preprocess=changed)
    device = backbone.device if options.device == "auto" else resolve_device(options.device)
    auto = options.precision == "auto"
    precision = backbone.precision if auto else options.precision
    moved = (device, precision) != (backbone.device, backbone.precision)
    if moved or options.bypass:  # what is the user's stays as it is
        backbone = replace(backbone, module=copy.deepcopy(backbone.module))
    if moved:
        backbone = backbone.to(device, precision)
    return adapt(backbone, options)


def resolve_name(model: str) -> tuple[str, str]:
    """(``timm``, ``torchvision`` or ``file``; name there) for a name as it was typed.

    Raises:
        ModelError: unknown; shows the nearest names.
    """
    if from_file.is_place(model):
        return "file", model
    if model.startswith(from_timm.SCHEMES):
        return "timm", model
    library, colon, name = model.rpartition(":")
    if colon and library not in ("timm", "torchvision"):
        raise ModelError(
            f"model {model!r}: unknown library {library!r}; expected timm:NAME, torchvision:NAME, "
            "hf-hub:ORG/NAME, local-dir:PATH, FILE.py:FUNCTION or NAME alone"
        )
    if library in ("", "timm") and from_timm.has(name):
        return "timm", name
    if library in ("", "torchvision") and name in from_torchvision.names():
        return "torchvision", name
    known = ([] if library == "torchvision" else from_timm.names()) + (
        [] if library == "timm" else from_torchvision.names()
    )
    near = difflib.get_close_matches(name.partition(".")[0], sorted(set(known)), n=5, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "expected a name such as resnet50"
    raise ModelError(f"unknown model {model!r}; {hint}")


def fetch(model: str, weights: str = _DEFAULT.weights) -> WeightsFile:
    """The published weights of a model, from the cache or the network.

    Args:
        model: as for :func:`load_backbone`, but no function of the user's.
        weights: ``default`` or a tag of the library.

    Raises:
        ModelError: unknown.
        WeightsError: unknown, or neither in the cache nor within reach.
    """
    library, name = resolve_name(model)
    if library == "file" or name.startswith("local-dir:"):
        raise ModelError(f"model {model!r} is on this machine; there is nothing to fetch")
    if weights == "random":
        raise UsageError("random weights are drawn and not fetched; name a tag of the library")
    if library == "timm":
        return from_timm.fetch(name, weights)
    return from_torchvision.fetch(name, weights)
