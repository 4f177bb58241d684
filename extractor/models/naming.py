"""Names of models, and the names and folders of their stores; free of torch."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from urllib.parse import unquote, urlsplit

from extractor.options import DEFAULT_OUT, Options, is_open_layer

__all__ = [
    "HUB",
    "LOCAL",
    "is_repository",
    "join_names",
    "plain_name",
    "planned_stores",
    "split_model",
    "split_names",
    "split_weights",
    "store_folders",
    "store_name",
]


HUB = "hf-hub:"
LOCAL = "local-dir:"

# Other beginnings of hf-hub:ORG/NAME.
_HUB_SCHEMES = ("hf_hub:", "hf://")
_HUB_HOSTS = ("huggingface.co", "hf.co")
# First parts of the hub's addresses that belong to no organization.
_NO_ORGANIZATIONS = frozenset(
    {"api", "blog", "collections", "datasets", "docs", "models", "papers", "spaces"}
)
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@.+)?")


def plain_name(model: str) -> str:
    """Return a model's name without the address of a page, and with ``hf-hub:`` spelled so.

    >>> plain_name("https://huggingface.co/timm/resnet50.a1_in1k/tree/main?x=1")
    'timm/resnet50.a1_in1k'
    >>> plain_name("hf_hub:timm/resnet50.a1_in1k"), plain_name("resnet50")
    ('hf-hub:timm/resnet50.a1_in1k', 'resnet50')
    """
    stripped = model.strip().rstrip("/")
    for scheme in (HUB, *_HUB_SCHEMES):
        if stripped.startswith(scheme):
            rest = stripped.removeprefix(scheme)
            return HUB + (_repository_in(rest) or rest)
    return _repository_in(stripped) or (stripped if is_repository(stripped) else model)


def is_repository(name: str) -> bool:
    """Return whether a name has the form of a hub's repository, ``ORG/NAME`` or with ``@REVISION``.

    >>> is_repository("timm/resnet50.a1_in1k"), is_repository("./resnet50")
    (True, False)
    """
    return _REPOSITORY.fullmatch(name) is not None and not name.endswith(".py")


def _repository_in(address: str) -> str:
    """Return the repository that a page of the hub shows, or an empty string."""
    scheme, colons, rest = address.rpartition("://")
    if colons and scheme not in ("http", "https"):
        return ""
    host, _, path = rest.partition("/")
    mirror = urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc
    if not host or host.removeprefix("www.") not in (*_HUB_HOSTS, mirror):
        return ""
    parts = [unquote(part) for part in re.split(r"[?#]", path)[0].split("/")]
    if len(parts) < 2 or parts[0] in _NO_ORGANIZATIONS:
        return ""
    repository = "/".join(parts[:2])
    is_file_view = len(parts) > 3 and parts[2] in ("blob", "commit", "raw", "resolve", "tree")
    revision = f"@{parts[3]}" if is_file_view and parts[3] != "main" else ""
    return repository + revision if is_repository(repository) else ""


def store_name(model: str, layer: str = "") -> str:
    """Return the folder name of a store, from the model as typed and one of its layers.

    >>> store_name("torchvision:resnet50"), store_name("resnet50", "layer3.1")
    ('torchvision-resnet50', 'resnet50@layer3.1')
    >>> store_name("resnet50=a.pth+vgg16=b.pth")
    'resnet50+vgg16'
    """
    model = plain_name(join_names([split_weights(name)[0] for name in split_model(model)]))
    if model.startswith(LOCAL) or re.search(r"\.py:[^:/]*$", model):
        folders, _, model = model.rstrip("/").rpartition("/")
        model = model if folders else model.removeprefix(LOCAL)
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
    pieces = model.split("+")
    for index, piece in enumerate(pieces):
        if names and _is_cut_path(names[-1], pieces[index:]):
            names[-1] += f"+{piece}"  # the plus sign belongs to the name of a folder
        else:
            names.append(piece)
    return names


def split_weights(model: str) -> tuple[str, str]:
    """Return the name of one model, and the weights that ``NAME=WEIGHTS`` gives it, or "".

    An equals sign in the path of a folder or of a Python file belongs to the path.

    >>> split_weights("resnet50=my/a=1.pth"), split_weights("x=1/net.py:make=w.pth")
    (('resnet50', 'my/a=1.pth'), ('x=1/net.py:make', 'w.pth'))
    >>> split_weights("resnet50"), split_weights("x=1/net.py:make")
    (('resnet50', ''), ('x=1/net.py:make', ''))
    """
    if code := re.fullmatch(r"(.*\.py:\w+)(?:=(.*))?", model, re.DOTALL):
        return code[1], code[2] or ""
    name, _, weights = model.partition("=")
    if "?" in name:  # the query of an address
        return model, ""
    if not model.startswith(LOCAL):
        return name, weights
    pieces = model.split("=")
    for count in range(1, len(pieces) + 1):
        name = "=".join(pieces[:count])
        if os.path.isdir(name.removeprefix(LOCAL)):
            return name, "=".join(pieces[count:])
    return model, ""


def _is_cut_path(name: str, rest: Sequence[str]) -> bool:
    """Return whether a name is the first part of a path that has a plus sign in it.

    Args:
        name: The name up to a plus sign.
        rest: The pieces after it, between plus signs.
    """
    name, weights = split_weights(name)
    if weights:
        paths = ("+".join([weights, *rest[: count + 1]]) for count in range(len(rest)))
        return not os.path.isfile(weights) and any(map(os.path.isfile, paths))
    if name.startswith(LOCAL):
        return not os.path.isdir(name.removeprefix(LOCAL))
    if is_repository(plain_name(name)):  # or a folder, if the whole path exists
        paths = ("+".join([name, *rest[: count + 1]]) for count in range(len(rest)))
        return any(os.path.isfile(path.rpartition(":")[0]) for path in paths)
    is_path = os.sep in name and not plain_name(name).startswith(HUB)
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
