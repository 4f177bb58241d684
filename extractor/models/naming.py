"""Names of models, and the names and folders of their stores; free of torch."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from extractor.options import DEFAULT_OUT, Options, is_open_layer

__all__ = [
    "join_names",
    "planned_stores",
    "split_model",
    "split_names",
    "store_folders",
    "store_name",
]


def store_name(model: str, layer: str = "") -> str:
    """Return the folder name of a store, from the model as typed and one of its layers.

    >>> store_name("torchvision:resnet50"), store_name("resnet50", "layer3.1")
    ('torchvision-resnet50', 'resnet50@layer3.1')
    """
    if model.startswith("local-dir:") or re.search(r"\.py:[^:/]*$", model):
        folders, _, model = model.rstrip("/").rpartition("/")
        model = model if folders else model.removeprefix("local-dir:")
    name = re.sub("[:/]", "-", model)
    return f"{name}@{layer}" if layer else name


def join_names(names: Sequence[str]) -> str:
    """Return one name for several joined models or layers."""
    return "+".join(names)


def split_names(joined: str) -> list[str]:
    """Return the names that :func:`join_names` joined, provided that none holds a plus sign."""
    return joined.split("+")


def split_model(model: str) -> list[str]:
    """Return the names of the models that ``A+B`` joins; for any other model, its own name.

    >>> split_model("resnet50+torchvision:vgg16")
    ['resnet50', 'torchvision:vgg16']
    """
    names: list[str] = []
    for piece in model.split("+"):
        if names and _is_cut_path(names[-1]):
            names[-1] += f"+{piece}"  # the plus sign belongs to the name of a folder
        else:
            names.append(piece)
    return names


def _is_cut_path(name: str) -> bool:
    """Return whether a name is the first part of a path that has a plus sign in it."""
    if name.startswith("local-dir:"):
        return not os.path.isdir(name.removeprefix("local-dir:"))
    is_path = os.sep in name and not name.startswith("hf-hub:")
    return is_path and re.search(r"\.py:\w+$", name) is None


def planned_stores(models: Sequence[str], options: Options) -> list[str] | None:
    """Return the names of the stores a run will fill; None if that depends on loaded models."""
    if any(map(is_open_layer, options.layers)):
        return None
    layers = [join_names(options.layers)] if options.concat else list(options.layers)
    return [store_name(model, layer) for model in models for layer in layers or [""]]


def store_folders(out: str | None, names: Sequence[str]) -> list[str]:
    """Return the folders of a run's stores: OUT itself for one store, subfolders for several.

    >>> store_folders(None, ["resnet50"]), store_folders("a", ["x"]), store_folders("a", ["x", "y"])
    (['features/resnet50'], ['a'], ['a/x', 'a/y'])
    """
    if out is not None and len(names) == 1:
        return [out]
    return [f"{DEFAULT_OUT if out is None else out.rstrip('/') or '/'}/{name}" for name in names]
