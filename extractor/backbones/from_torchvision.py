"""Networks and weights of torchvision."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from extractor import heads, weights
from extractor.backbones import shared
from extractor.backbones.backbone import Backbone
from extractor.errors import ModelError, WeightsError
from extractor.preprocess import Preprocess

__all__ = ["build", "names"]

# Arguments that torchvision adds by itself when it loads its own weights, and that change what
# these networks compute.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "googlenet": {"transform_input": True, "aux_logits": False, "init_weights": False},
    "inception_v3": {"transform_input": True, "aux_logits": False, "init_weights": False},
}
# Heads that only training runs, and that the checkpoints of those networks hold.
_AUXILIARY = ("aux1", "aux2", "AuxLogits")

# The published DenseNet files are older than the names of its layers: norm.1 is norm1 now.
_DENSENET_KEY = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)")

# Classes that a network is built for, to find its classifier by them: a prime, so that it is the
# width of no other layer.
_CLASSES = 1009


def names() -> list[str]:
    """Every classification model of torchvision."""
    models = _models()
    return list(models.list_models(module=models))


def _models() -> Any:
    return shared.import_library("torchvision").models


def build(name: str, wanted: str, seed: int) -> Backbone:
    """The backbone ``name`` with the weights ``wanted``, on the CPU in float32.

    Raises:
        WeightsError, ModelError: as :func:`extractor.load_backbone`.
    """
    entry = _entry(name, wanted)
    found = _find_weights(name, wanted, entry)
    with weights.seeded(seed):
        module = _network(name, entry)
    classifiers = heads.modules_with_outputs(module, _CLASSES)
    dim = _input_width(module, classifiers, name)
    before = tuple(module.state_dict())
    replaced = heads.replace_with_identity(module, classifiers)
    if found is not None:
        state = weights.read_checkpoint(found.path)
        if name.startswith("densenet"):
            state.rename(lambda key: _DENSENET_KEY.sub(r"\1\2", key))
        weights.load_into(
            module,
            state,
            discarded=(*shared.gone(before, module), *_AUXILIARY),
            how=f"{found.path} into torchvision:{name}",
        )
    library = shared.import_library("torchvision")
    return Backbone(
        module,
        dim,
        replaced,
        _preprocess(entry.transforms()),
        shared.provenance(f"torchvision:{name}", library, module, found, seed),
    )


def _entry(name: str, wanted: str) -> Any:
    """The member of the model's ``WeightsEnum`` whose transform belongs to the weights."""
    entries = _models().get_model_weights(name)
    local = shared.local_file(wanted)
    if local is not None:
        # A file under the library's own name is that entry, with its own transform.
        named = [entry for entry in entries if entry.url.rpartition("/")[2] == local.name]
        return named[0] if named else entries.DEFAULT
    if wanted in ("default", "random"):
        return entries.DEFAULT
    if wanted not in entries.__members__:
        raise WeightsError(
            shared.unknown_weights(f"torchvision:{name}", wanted, list(entries.__members__))
        )
    return entries[wanted]


def _find_weights(name: str, wanted: str, entry: Any) -> weights.WeightsFile | None:
    if wanted == "random":
        return None
    local = shared.local_file(wanted)
    if local is not None:
        return weights.WeightsFile(local)
    label = f"torchvision:{name} ({entry.name})"
    return weights.find_url_file(entry.url, tag=entry.name, how=label)


def _network(name: str, entry: Any) -> nn.Module:
    """An untrained network, built as torchvision builds it for its own weights."""
    arguments = dict(_ARGUMENTS.get(name, {}))
    if name.startswith("vit_"):
        arguments["image_size"] = entry.meta["min_size"][0]
    network: nn.Module = _models().get_model_builder(name)(
        weights=None, num_classes=_CLASSES, **arguments
    )
    return network


def _input_width(module: nn.Module, names: Sequence[str], model: str) -> int:
    """How many numbers a model's one classifier takes."""
    if len(names) != 1:
        raise ModelError(f"torchvision:{model} has classifiers {list(names)}, expected one")
    head = module.get_submodule(names[0])
    width = getattr(head, "in_features", None) or getattr(head, "in_channels", None)
    if not isinstance(width, int):
        raise ModelError(
            f"torchvision:{model}: {names[0]} is a {type(head).__name__}, no classifier"
        )
    return width


def _preprocess(preset: Any) -> Preprocess:
    """torchvision's ``ImageClassification`` preset as numbers."""
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
