"""Builds networks of timm and loads their weights."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from extractor.errors import ExtractorError, ModelError, UsageError, WeightsError
from extractor.models import libraries, timm_layouts, weight_files
from extractor.models.backbone import Backbone
from extractor.models.checkpoint import MisfitError, State, load_into
from extractor.models.lite_weights import PACKAGES, timm_key
from extractor.models.naming import HUB
from extractor.models.weight_files import CONFIG, WeightsFile
from extractor.network import heads
from extractor.network.taps import HEAD, POOLED_FEATURES, Output
from extractor.options import Options
from extractor.preprocess import Preprocess
from extractor.text import first_line

__all__ = [
    "SCHEMES",
    "build",
    "current_name",
    "deprecated_names",
    "fetch",
    "full_name",
    "has",
    "known_weights",
    "name_of_repository",
    "names",
    "outline",
    "version",
]

log = logging.getLogger(__name__)

# Prefixes of models that are not architectures: a repository of the hub, a folder.
SCHEMES = (HUB, "local-dir:")


def has(name: str) -> bool:
    """Return whether timm has the architecture ``name``, ignoring a weights tag."""
    return bool(_timm().is_model(name.partition(".")[0]))


def names() -> list[str]:
    """Return the names of all architectures of timm, without deprecated ones."""
    return list(_timm().list_models())


def deprecated_names() -> dict[str, str]:
    """Return the names that timm replaced, each with its present ``architecture[.tag]``.

    The present name is empty if timm removed the model.
    """
    return {name: _with_existing_tag(now) for name, now in _deprecations().items()}


def _deprecations() -> dict[str, str]:
    replaced: dict[str, str | None] = _timm().models.get_deprecated_models()
    return {name: now or "" for name, now in replaced.items()}


def _with_existing_tag(name: str) -> str:
    """Return a present name of timm's table, where two of its tags lack their last part."""
    architecture, dot, tag = name.partition(".")
    tags = _tags(architecture) if dot else []
    longer = [each for each in tags if each.startswith(f"{tag}_")]
    return f"{architecture}.{longer[0]}" if tag not in tags and len(longer) == 1 else name


def name_of_repository(repository: str) -> str:
    """Return ``architecture[.tag]`` whose weights a repository of the hub has, or an empty string.

    >>> name_of_repository("timm/resnet50.a1_in1k"), name_of_repository("me/resnet50.a1_in1k")
    ('resnet50.a1_in1k', '')
    """
    organization, _, name = repository.partition("/")
    architecture, dot, tag = name.partition(".")
    if organization == "timm" and has(architecture):
        tags = _tags(_architecture(current_name(architecture)))
        if not dot or tag in tags:
            return name
    timm = _timm()
    published = timm.list_pretrained()
    owned = [full for full in published if timm.get_pretrained_cfg(full).hf_hub_id == repository]
    return owned[0] if len(owned) == 1 else ""


def current_name(name: str) -> str:
    """Return ``architecture[.tag]`` under the present name, if timm replaced the architecture.

    A tag of the caller's wins over the one in timm's table, as in timm.

    >>> current_name("tf_efficientnet_b0_ns"), current_name("resnet50")
    ('tf_efficientnet_b0.ns_jft_in1k', 'resnet50')

    Raises:
        ModelError: timm removed the model.
    """
    architecture, _, tag = name.partition(".")
    now = _deprecations().get(architecture)
    if now is None:
        return name
    now = _with_existing_tag(now)
    if not now:
        raise ModelError(f"timm removed the model {architecture} and names no other in its place")
    return f"{_architecture(now)}.{tag}" if tag else now


def _timm() -> Any:
    return libraries.import_library("timm")


@dataclass(frozen=True)
class _Source:
    """Architecture to build, and the weights for it.

    Attributes:
        name: Name of the model in messages and the manifest.
        full_name: ``architecture[.tag]``.
        found: Weights file; None for random weights.
        own: Whether the weights were published for this model, so that timm knows their layout.
        config: A ``pretrained_cfg`` other than timm's own.
        arguments: Arguments of the architecture.
    """

    name: str
    full_name: str
    found: WeightsFile | None
    own: bool
    config: Any = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


def build(name: str, options: Options, recorded_sha256: str = "") -> Backbone:
    """Build ``name[.tag]``, ``hf-hub:ORG/NAME`` or ``local-dir:PATH`` on the CPU in float32.

    Args:
        name: Name of the model, without ``timm:``.
        options: Weights, seed and pixels.
        recorded_sha256: SHA-256 of the weights that an existing store was made with. Where several
            sources have weights, the one with this file is taken.

    Raises:
        WeightsError: The weights are missing, cannot be read, or do not fit.
        ModelError: The configuration describes no model that timm can build.
    """
    try:
        return _build(_source(name, options.weights, recorded_sha256), options)
    except ExtractorError:
        raise
    except Exception as error:
        if not name.startswith(SCHEMES):
            raise
        raise ModelError(
            f"{name}: config.json describes no model of RGB images that timm can build "
            f"({first_line(error)})"
        ) from error


def _build(source: _Source, options: Options) -> Backbone:
    timm = _timm()
    kept: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    if options.keep_head:
        module, kept = _with_head(source, options)
    elif source.found is not None and source.own:
        module = _with_own_weights(source, options)
        replaced = _remove_heads(module)
    else:
        source, state, label = _fitted(source, options)
        with libraries.seeded(options.seed):
            module = _create(source)
        before = tuple(module.state_dict())
        replaced = _remove_heads(module)
        if state is not None:
            removed = libraries.removed_modules(before, module)
            load_into(module, state, discarded=removed, label=label)
    provenance = libraries.provenance(source.name, timm, module, source.found, options)
    config = timm.data.resolve_model_data_config(module, use_test_size=options.test_size)
    preprocess = _preprocess(config).changed(options.pixel_changes, crop_pct=config["crop_pct"])
    trained, tested = _evaluations(module)
    if options.test_size and trained == tested:
        log.warning("%s has one size only: %s", source.full_name, tested.size_text)
    if preprocess.input_size != trained.input_size:
        _set_input_size(module, preprocess.input_size, source.name)
    return Backbone(
        module,
        (_head_output(module) if kept else _output(module),),
        replaced,
        preprocess,
        provenance,
        kept_heads=kept,
        evaluations=(trained, tested) if trained != tested else (),
    )


def _create(source: _Source, **more: Any) -> nn.Module:
    arguments = {**source.arguments, **more}
    module: nn.Module = _timm().create_model(
        source.full_name, pretrained_cfg=source.config, **arguments
    )
    return module


def _fitted(source: _Source, options: Options) -> tuple[_Source, State | None, str]:
    """Return what to build for a file of weights, its tensors, and the label of both."""
    if source.found is None:
        return source, None, ""
    weight_files.warn_if_renamed(source.found, _published(source.full_name))
    label = f"{source.found.path} into {source.name}"
    arguments, state = timm_layouts.fitted(
        functools.partial(_create, source),
        _remove_heads,
        libraries.read_weights(source.found, options),
        options.pixel_changes.image_size,
        label,
    )
    arguments = {**source.arguments, **arguments}
    return dataclasses.replace(source, arguments=arguments), state, label


def _with_head(source: _Source, options: Options) -> tuple[nn.Module, tuple[str, ...]]:
    """Build a network with its classifier and its weights; return it and the classifier's names.

    Raises:
        ModelError: It has no classifier.
        WeightsError: The weights have none, or do not fit.
    """
    own_state: State | None = None
    label = ""
    if not source.own:
        source, own_state, label = _fitted(source, options)

    def build(classes: int | None) -> nn.Module:
        with libraries.seeded(options.seed):
            return _create(source, **({} if classes is None else {"num_classes": classes}))

    with torch.device("meta"):
        sketch = build(None)
    rows = {name: len(value) for name, value in sketch.named_parameters() if value.ndim}
    classes = sketch.num_classes
    names = _remove_heads(sketch)
    if not names:
        raise ModelError(f"{source.full_name} has no classifier to keep; leave --keep-head out")
    if source.found is None:
        return build(None), names
    if own_state is None:
        return _with_own_weights(source, options), names
    removed = libraries.removed_modules(tuple(rows), sketch)
    classifier = {
        name for name in rows if rows[name] == classes and name.rpartition(".")[0] in removed
    }
    return libraries.load_with_head(build, own_state, classifier, label=label), names


def outline(name: str) -> Backbone:
    """Build ``architecture[.tag]`` on the meta device: shapes without values, which cannot run."""
    timm = _timm()
    with torch.device("meta"):
        module = timm.create_model(name)
    replaced = _remove_heads(module)
    trained, tested = _evaluations(module)
    return Backbone(
        module,
        (_output(module),),
        replaced,
        trained,
        libraries.without_weights(f"timm:{_architecture(name)}", timm),
        evaluations=(trained, tested) if trained != tested else (),
    )


def version() -> str:
    """Return the version of the installed timm."""
    return libraries.public_version(_timm())


def _with_own_weights(source: _Source, options: Options) -> nn.Module:
    """Build the network with the weights that were published for it.

    Given the tensors, timm handles the layouts of its own checkpoints.
    """
    assert source.found is not None
    state = libraries.read_weights(source.found, options)
    if source.found.package:
        depths = PACKAGES[_architecture(source.full_name)].depths
        state.rename(lambda key: timm_key(key, depths))
    overlay = {"state_dict": state}
    try:
        with libraries.seeded(options.seed):  # timm draws values before it loads the weights
            module: nn.Module = _timm().create_model(
                source.full_name,
                pretrained=True,
                pretrained_cfg=source.config,
                pretrained_cfg_overlay=overlay,
                **source.arguments,
            )
    except RuntimeError as error:
        message, signs = str(error), ("Missing key", "Unexpected key", "size mismatch")
        raise MisfitError(
            f"{source.found.path} into {source.name}: the weights do not fit: "
            f"{' '.join(message.split())[:400].rstrip('. ')}",
            state,
            foreign=any(sign in message for sign in signs),
        ) from error
    config: Any = module.pretrained_cfg
    config.pop("state_dict", None)
    return module


def _remove_heads(module: nn.Module) -> tuple[str, ...]:
    if _has_no_classifier(module):
        return ()
    return heads.reset_timm_classifier(module)


def _has_no_classifier(module: nn.Module) -> bool:
    """Return whether a network is an encoder without classifier; all others can reset theirs."""
    return not hasattr(module, "reset_classifier") and getattr(module, "num_classes", None) == 0


def _output(module: nn.Module) -> Output:
    dim = getattr(module, "head_hidden_size", None) or module.num_features
    if not isinstance(dim, int):
        raise ModelError(f"{type(module).__name__} does not declare the length of its embeddings")
    if _has_no_classifier(module):
        return Output((dim,), POOLED_FEATURES, pool="avg")
    return Output((dim,))


def _head_output(module: nn.Module) -> Output:
    classes: Any = module.num_classes
    return Output((int(classes),), HEAD)


# ---------------------------------------------------------------------------------------------
# Names and weights


def _source(name: str, wanted: str, recorded_sha256: str = "") -> _Source:
    if name.startswith(SCHEMES):
        return _described_source(name, wanted)
    own_name = full_name(name, wanted)
    chosen = libraries.chosen_file(wanted)
    found = chosen
    if chosen is None and wanted != "random":
        found = _fetch(own_name, recorded_sha256)
    return _Source(f"timm:{_architecture(own_name)}", own_name, found, own=chosen is None)


def _described_source(name: str, wanted: str) -> _Source:
    """Return the model that a folder or a repository of the hub describes in ``config.json``."""
    scheme, _, location = name.partition(":")
    if not location:
        raise ModelError(f"model {name!r}: expected hf-hub:ORG/NAME or local-dir:PATH")
    if scheme == "local-dir":
        described = Path(location) / CONFIG
        if not described.is_file():
            raise ModelError(f"{name}: there is no {described}, which names the architecture")
    elif "/" not in location:
        hint = f"; for timm's own model write {location}" if has(location) else ""
        raise WeightsError(
            f"{name}: {location!r} is not a repository of the hub, expected ORG/NAME{hint}"
        )
    else:
        described = weight_files.find_hub_file(location, [CONFIG], tag="", label=name).path
    architecture, config, arguments = _read_config(described, name)
    chosen = libraries.chosen_file(wanted)
    found = chosen
    if chosen is None and wanted == "default":
        filenames = weight_files.hub_filenames(config.get("hf_hub_filename"))
        if scheme == "local-dir":
            found = _first_file(Path(location), filenames, name)
        else:
            found = weight_files.find_hub_file(location, filenames, tag="", label=name)
    elif chosen is None and wanted != "random":
        raise WeightsError(libraries.unknown_weights(name, wanted, []))
    known = {field.name for field in dataclasses.fields(_timm().models.PretrainedCfg)}
    own_config = {key: value for key, value in config.items() if key in known}
    return _Source(name, architecture, found, chosen is None, own_config, arguments)


def _read_config(path: Path, name: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Read (architecture, pretrained_cfg, arguments) from a ``config.json`` as timm writes it."""
    try:
        content = json.loads(path.read_bytes())
        architecture = content["architecture"]
        # Before 2023 the configuration was next to the architecture, not below it.
        config = dict(content.get("pretrained_cfg", content))
        arguments = dict(content.get("model_args") or {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{name}: {path} is not a config.json of timm ({first_line(error)})"
        ) from error
    if not isinstance(architecture, str) or not has(architecture):
        raise ModelError(f"{name}: timm has no architecture {architecture!r}; try a newer timm")
    if "num_classes" in content:
        config["num_classes"] = content["num_classes"]
    return _architecture(current_name(architecture)), config, arguments


def _first_file(folder: Path, names: tuple[str, ...], model: str) -> WeightsFile:
    for name in names:
        if (folder / name).is_file():
            return WeightsFile(folder / name)
    raise WeightsError(f"{model}: {folder} has none of {', '.join(names)}; use --weights FILE")


def _architecture(full_name: str) -> str:
    return full_name.partition(".")[0]


def _tags(architecture: str) -> list[str]:
    pretrained = _timm().list_pretrained(f"{architecture}.*")
    return [full.partition(".")[2] for full in pretrained]


def _published(full_name: str) -> list[str]:
    """Return the addresses of an architecture's weights that are not on the hub alone."""
    architecture = _architecture(full_name)
    names = (f"{architecture}.{tag}" if tag else architecture for tag in _tags(architecture))
    configs = map(_timm().get_pretrained_cfg, names)
    return [config.url for config in configs if config and config.url]


def full_name(name: str, wanted: str = "default") -> str:
    """Return ``architecture[.tag]``; a tag in ``wanted`` wins over one in the name.

    Raises:
        WeightsError: timm has no such tag.
    """
    architecture, _, tag = name.partition(".")
    no_tag = wanted in ("default", "random") or wanted.startswith(HUB)
    if not no_tag and libraries.chosen_file(wanted) is None:
        tag = wanted
    tags = _tags(architecture)
    if tag and tag not in tags:
        message = libraries.unknown_weights(f"timm:{architecture}", tag, tags)
        if "IMAGENET1K_" in tag:
            message += "; torchvision's weights need --model torchvision:NAME"
        raise WeightsError(message)
    return f"{architecture}.{tag}" if tag else architecture


def _fetch(full_name: str, recorded_sha256: str = "") -> WeightsFile:
    """Return the published weights: from the cache, else from a package, else from the network."""
    package = PACKAGES.get(_architecture(full_name))
    packaged = None if package is None else weight_files.find_package_file(package)
    if package is None or packaged is None:
        return _fetch_published(full_name)
    cached = _cached(_timm().get_pretrained_cfg(full_name))
    here = [packaged] if cached is None else [cached, packaged]
    found = here[0]
    if recorded_sha256:
        digests = {file.sha256(): file for file in reversed(here)}
        if recorded_sha256 in digests:
            found = digests[recorded_sha256]
        elif cached is None:  # the store's rows may come from the hub's file
            with contextlib.suppress(WeightsError):
                return _fetch_published(full_name)
    if found is packaged:
        package.check(packaged.path)
    return found


def _fetch_published(full_name: str) -> WeightsFile:
    """Return timm's published weights, from the cache or the network."""
    config, label = _timm().get_pretrained_cfg(full_name), f"timm:{full_name}"
    tag = config.tag or ""
    if config.hf_hub_id:
        names = weight_files.hub_filenames(config.hf_hub_filename or "pytorch_model.bin")
        return weight_files.find_hub_file(config.hf_hub_id, names, tag=tag, label=label)
    if config.url:
        return weight_files.find_url_file(config.url, tag=tag, label=label)
    raise WeightsError(
        f"{label}: timm has no pretrained weights for this model; use --weights FILE, or --weights "
        "random to try things out"
    )


def fetch(name: str, tag: str = "default") -> WeightsFile:
    """Return the published weights of ``architecture[.tag]`` or ``hf-hub:ORG/NAME``.

    They come from the cache, from an installed package or from the network.

    Raises:
        WeightsError: The weights are unknown or out of reach.
    """
    found = _source(name, tag).found
    assert found is not None
    return found


def known_weights(name: str) -> list[tuple[str, WeightsFile | None]]:
    """List the tags of an architecture's published weights, the default first.

    Each comes with its file on this machine, from the cache or a package, or with None.
    """
    timm, listed = _timm(), []
    default = (timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()).tag or ""
    for tag in sorted(_tags(name), key=lambda tag: (tag != default, tag)):
        config = timm.get_pretrained_cfg(f"{name}.{tag}" if tag else name)
        file = _cached(config)
        package = PACKAGES.get(name)
        if file is None and package is not None and package.tag == tag:
            file = weight_files.find_package_file(package)
        listed.append((tag, file))
    return listed


def _cached(config: Any) -> WeightsFile | None:
    """Return the file of a ``pretrained_cfg`` in the libraries' caches, or None."""
    tag = config.tag or ""
    if config.hf_hub_id:
        names = weight_files.hub_filenames(config.hf_hub_filename or "pytorch_model.bin")
        return weight_files.cached_hub_file(config.hf_hub_id, names, tag=tag)
    return weight_files.cached_url_file(config.url, tag=tag) if config.url else None


# ---------------------------------------------------------------------------------------------
# Pixels


def _set_input_size(module: nn.Module, size: tuple[int, int], model: str) -> None:
    """Make a network of a fixed image size take another one, if it can resample its weights."""
    resize = getattr(module, "set_input_size", None)
    if resize is None:
        return  # it takes any size, or fails when it is tried
    try:
        resize(img_size=size)
    except Exception as error:  # assertions and whatever else
        raise ModelError(
            f"{model} cannot take images of {size[0]} x {size[1]} pixels ({first_line(error)})"
        ) from error


def _evaluations(module: nn.Module) -> tuple[Preprocess, Preprocess]:
    """Return timm's evaluation transforms of a model at its sizes of training and of tests."""
    resolve = _timm().data.resolve_model_data_config
    return _preprocess(resolve(module)), _preprocess(resolve(module, use_test_size=True))


def _preprocess(config: Mapping[str, Any]) -> Preprocess:
    """Return the evaluation transform of timm (``timm.data.create_transform``) as numbers."""
    _, height, width = config["input_size"]
    fits = {"squash": "squash", "border": "pad"}
    try:
        return Preprocess.standard(
            (height, width),
            crop_pct=config["crop_pct"],
            fit=fits.get(config["crop_mode"], "crop"),
            interpolation=config["interpolation"],
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
        )
    except UsageError as error:  # the configuration is wrong, not the call
        raise ValueError(str(error)) from error
