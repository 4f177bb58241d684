"""Builds networks of torchvision and loads their weights."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from extractor.errors import ModelError, WeightsError
from extractor.models import libraries, weight_files
from extractor.models.backbone import Backbone
from extractor.models.checkpoint import MisfitError, State, load_into
from extractor.models.weight_files import WeightsFile
from extractor.network import heads
from extractor.network.taps import HEAD, Output
from extractor.options import Options
from extractor.preprocess import Preprocess

__all__ = [
    "AUXILIARY",
    "build",
    "fetch",
    "known_weights",
    "names",
    "outline",
    "spelled_rightly",
    "version",
]

log = logging.getLogger(__name__)

# Arguments that torchvision adds when it loads its own weights. They change the computation.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "googlenet": {"transform_input": True, "aux_logits": False, "init_weights": False},
    "inception_v3": {"transform_input": True, "aux_logits": False, "init_weights": False},
}
# Heads that run only in training but are part of the checkpoints.
AUXILIARY = ("aux1", "aux2", "AuxLogits")

# The published DenseNet files use old names of layers: norm.1 is norm1 now.
_DENSENET_KEY = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)")

# Number of classes a network is built for, to find its classifier. A prime, so that no other layer
# has this width.
_CLASSES = 1009


def names() -> list[str]:
    """Return the names of all classification models of torchvision."""
    models = _models()
    return list(models.list_models(module=models))


def spelled_rightly(name: str) -> str:
    """Return the options for a model that is named as in torchvision's code, or an empty string.

    >>> spelled_rightly("ResNet50_Weights.IMAGENET1K_V2")
    'torchvision:resnet50 --weights IMAGENET1K_V2'
    """
    base, _, tag = name.removeprefix("torchvision.").removeprefix("models.").partition(".")
    matching = [
        model for model in names() if base in (model, _models().get_model_weights(model).__name__)
    ]
    if not matching:
        return ""
    known = _models().get_model_weights(matching[0]).__members__
    return f"torchvision:{matching[0]}" + (f" --weights {tag}" if tag in known else "")


def _models() -> Any:
    return libraries.import_library("torchvision").models


def build(name: str, options: Options) -> Backbone:
    """Build the backbone ``name`` on the CPU in float32.

    Raises:
        WeightsError: The weights are missing, cannot be read, or do not fit.
        ModelError: The network does not have exactly one classifier.
    """
    library = libraries.import_library("torchvision")
    wanted = options.weights
    chosen = libraries.chosen_file(wanted)
    entry = _entry(name, wanted, chosen)
    found = _fetch(name, entry) if chosen is None and wanted != "random" else chosen
    if options.test_size:
        size = _preprocess(entry.transforms()).size_text
        log.warning("torchvision:%s has one size only: %s", name, size)
    if options.keep_head:
        return _with_head(name, options, entry, found)
    with libraries.seeded(options.seed):
        module = _network(name, entry, edge=_edge(name, entry, options))
    classifiers = heads.modules_with_outputs(module, _CLASSES)
    dim = _input_width(module, classifiers, name)
    before = tuple(module.state_dict())
    replaced = heads.replace_with_identity(module, classifiers)
    if found is not None:
        load_into(
            module,
            _read(found, name, entry, options),
            discarded=(*libraries.removed_modules(before, module), *AUXILIARY),
            label=f"{found.path} into torchvision:{name}",
        )
    return Backbone(
        module,
        (Output((dim,)),),
        replaced,
        _preprocess(entry.transforms()).changed(options.pixel_changes),
        libraries.provenance(f"torchvision:{name}", library, module, found, options),
    )


def _with_head(name: str, options: Options, entry: Any, found: WeightsFile | None) -> Backbone:
    """Build a model that keeps its classifier, on the CPU in float32."""
    published = len(entry.meta["categories"])

    def build(classes: int | None) -> nn.Module:
        with libraries.seeded(options.seed):
            return _network(name, entry, classes or published, _edge(name, entry, options))

    sketch = _sketch(name, entry)
    classifiers = heads.modules_with_outputs(sketch, _CLASSES)
    _input_width(sketch, classifiers, name)  # exactly one
    if found is None:
        module = build(None)
    else:
        parameters = sketch.get_submodule(classifiers[0]).named_parameters()
        module = libraries.load_with_head(
            build,
            _read(found, name, entry, options),
            {f"{classifiers[0]}.{key}" for key, _ in parameters},
            discarded=AUXILIARY,
            label=f"{found.path} into torchvision:{name}",
        )
    dim = len(next(module.get_submodule(classifiers[0]).parameters()))
    library = libraries.import_library("torchvision")
    return Backbone(
        module,
        (Output((dim,), HEAD),),
        (),
        _preprocess(entry.transforms()).changed(options.pixel_changes),
        libraries.provenance(f"torchvision:{name}", library, module, found, options),
        kept_heads=classifiers,
    )


def _read(found: WeightsFile, name: str, entry: Any, options: Options) -> State:
    weight_files.warn_if_renamed(found, [entry.url])
    state = libraries.read_weights(found, options)
    if name.startswith("densenet"):
        state.rename(lambda key: _DENSENET_KEY.sub(r"\1\2", key))
    if name.startswith("vit_"):
        _resample(state, name, _edge(name, entry, options), options)
    return state


def _edge(name: str, entry: Any, options: Options) -> int:
    """Return the edge in pixels of the images for which a vision transformer is built.

    Without a square of whole patches it keeps its own, and is refused when it is tried.
    """
    own: int = entry.meta["min_size"][0]
    height, width = options.pixel_changes.image_size or (own, own)
    if not name.startswith("vit_") or height != width or height % _patch(name):
        return own
    return height


def _patch(name: str) -> int:
    """Return the edge in pixels of a vision transformer's patches, such as 16 for ``vit_b_16``."""
    return int(name.rpartition("_")[2])


def _resample(state: State, name: str, edge: int, options: Options) -> None:
    """Resample the position embeddings of a file for another image size, as torchvision does.

    Raises:
        MisfitError: The file is of another size than the network, and none was asked for.
    """
    patch = _patch(name)
    for key in (key for key in state if key.endswith("encoder.pos_embedding")):
        positions = state[key]
        grid = math.isqrt(max(0, positions.shape[1] - 1)) if positions.ndim == 3 else 0
        if grid * patch == edge or not grid or grid**2 + 1 != positions.shape[1]:
            continue
        if options.pixel_changes.image_size is None:
            raise MisfitError(
                f"torchvision:{name}: the weights are of another image size ({grid * patch} pixels "
                f"instead of {edge})",
                state,
                advice=f"Use the size that they were trained at: --image-size {grid * patch}",
            )
        resample = _models().vision_transformer.interpolate_embeddings
        named = {"encoder.pos_embedding": positions.float()}
        state[key] = resample(edge, patch, named)["encoder.pos_embedding"]


def _sketch(name: str, entry: Any) -> nn.Module:
    """Build a network of :data:`_CLASSES` classes, on the meta device if possible."""
    try:
        with torch.device("meta"):
            return _network(name, entry)
    except RuntimeError:  # RegNet computes its widths with tensors, which need values
        return _network(name, entry)


def outline(name: str) -> Backbone:
    """Build a model that cannot run, on the meta device if possible."""
    library, entry = libraries.import_library("torchvision"), _entry(name, "default", None)
    module = _sketch(name, entry)
    classifiers = heads.modules_with_outputs(module, _CLASSES)
    dim = _input_width(module, classifiers, name)
    replaced = heads.replace_with_identity(module, classifiers)
    provenance = libraries.without_weights(f"torchvision:{name}", library)
    preprocess = _preprocess(entry.transforms())
    return Backbone(module, (Output((dim,)),), replaced, preprocess, provenance)


def version() -> str:
    """Return the version of the installed torchvision."""
    return libraries.public_version(libraries.import_library("torchvision"))


def fetch(name: str, tag: str = "default") -> WeightsFile:
    """Return the published weights of a model, from the cache or the network.

    Raises:
        WeightsError: The weights are unknown or out of reach.
    """
    return _fetch(name, _entry(name, tag, None))


def known_weights(name: str) -> list[tuple[str, WeightsFile | None]]:
    """List the tags of a model's published weights, the default first, with their cached files."""
    entries = _models().get_model_weights(name)
    default = entries.DEFAULT
    return [
        (entry.name, weight_files.cached_url_file(entry.url, tag=entry.name))
        for entry in sorted(entries, key=lambda entry: entry != default)
    ]


def _entry(name: str, wanted: str, chosen: WeightsFile | None) -> Any:
    """Return the member of the model's ``WeightsEnum`` whose transform belongs to the weights."""
    entries = _models().get_model_weights(name)
    if chosen is not None:
        # A file with the library's own name is that entry and brings its transform.
        own_name = chosen.path.name
        named = [entry for entry in entries if entry.url.rpartition("/")[2] == own_name]
        return named[0] if named else entries.DEFAULT
    if wanted in ("default", "random"):
        return entries.DEFAULT
    wanted = wanted.removeprefix(f"{entries.__name__}.")
    if wanted not in entries.__members__:
        raise WeightsError(
            libraries.unknown_weights(f"torchvision:{name}", wanted, list(entries.__members__))
        )
    return entries[wanted]


def _fetch(name: str, entry: Any) -> WeightsFile:
    label = f"torchvision:{name} ({entry.name})"
    return weight_files.find_url_file(entry.url, tag=entry.name, label=label)


def _network(name: str, entry: Any, classes: int = _CLASSES, edge: int | None = None) -> nn.Module:
    """Build an untrained network as torchvision does for its own weights.

    Args:
        name: Name of the model.
        entry: Its weights.
        classes: Number of classes.
        edge: Edge of its images in pixels, for a vision transformer; None stands for the entry's.
    """
    arguments = dict(_ARGUMENTS.get(name, {}))
    if name.startswith("vit_"):
        arguments["image_size"] = edge or entry.meta["min_size"][0]
    network: nn.Module = _models().get_model_builder(name)(
        weights=None, num_classes=classes, **arguments
    )
    return network


def _input_width(module: nn.Module, names: Sequence[str], model: str) -> int:
    """Return the input width of a model's only classifier."""
    if len(names) != 1:
        raise ModelError(f"torchvision:{model} has classifiers {list(names)}, expected one")
    head = module.get_submodule(names[0])
    width = getattr(head, "in_features", None) or getattr(head, "in_channels", None)
    if not isinstance(width, int):
        raise ModelError(
            f"torchvision:{model}: {names[0]} is a {type(head).__name__}, expected a classifier"
        )
    return width


def _preprocess(preset: Any) -> Preprocess:
    """Return the ``ImageClassification`` preset of torchvision as numbers."""
    height, width = (preset.crop_size * 2)[:2]
    (edge,) = preset.resize_size
    return Preprocess(
        (height, width),
        "shortest",
        (edge, edge),
        preset.interpolation.value,
        tuple(preset.mean),
        tuple(preset.std),
    )
