"""The embedding that a store holds, built again from its manifest."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from extractor.compute.tune import compiled
from extractor.errors import StoreError, UsageError, WeightsError
from extractor.lease.describe import describe
from extractor.models.backbone import Backbone
from extractor.models.digests import sha256_of_file
from extractor.models.embedding import EmbeddingPart, EmbeddingSpec, fuse_as_chosen, load_specs
from extractor.models.from_file import is_function_name
from extractor.models.load import load, with_views
from extractor.models.naming import HUB, LOCAL, split_model, split_names, split_weights
from extractor.network.taps import PRE_LOGITS
from extractor.network.views import Views
from extractor.options import Options
from extractor.preprocess import Preprocess
from extractor.reading.reader import FeatureStore
from extractor.reading.transform import Transform, read_transform
from extractor.run.run_json import read_run_json
from extractor.store.format import Description
from extractor.text import plural

__all__ = ["Encoder", "Weights", "encoder_of", "spec_of"]

Weights: TypeAlias = (
    "str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | Backbone | None"
)
"""Weights of a store: a file or a tag, one for each of several backbones, or a loaded backbone."""

log = logging.getLogger(__name__)

TRY_WEIGHTS = "try weights=FILE (extract verify: --weights FILE)"
MAX_DIFFERENCES = 3  # in one message


@dataclass(frozen=True)
class Encoder:
    """How to embed images as the rows of a store.

    Attributes:
        spec: Embedding to compute.
        options: Options of an extractor.
        pad_to: Number of images in every forward pass; None for as many as there are.
        dtype: Type that rows are rounded to.
        transform: What the store was made with from these rows; None for nothing.
        result_dtype: Type that transformed rows are rounded to.
    """

    spec: EmbeddingSpec
    options: Options
    pad_to: int | None
    dtype: str
    transform: Transform | None
    result_dtype: str


def encoder_of(
    store: FeatureStore,
    serving: Mapping[str, Any],
    *,
    weights: Weights,
    device: str,
    exact: bool,
) -> Encoder:
    """Load the models of a store, and return how it embeds.

    Args:
        store: Store whose rows are to be compared with the result.
        serving: Options that change no rows, such as ``workers``.
        weights: Files of weights that are no longer where they were; or the backbone itself.
        device: Device to compute on.
        exact: Compute in batches, with threads and compiled as the store was.

    Raises:
        WeightsError: The weights are missing, or others.
        StoreDamagedError: A file of its transform is missing or changed.
        StoreError: The store cannot be repeated.
        UsageError: The store was not computed on this kind of device, or ``serving`` contradicts
            ``exact``.
    """
    transform = read_transform(store.path, store.manifest.description)
    description = store.manifest.description.before_transform
    computation = description.computation
    made = dict(serving)
    if exact:
        device = _exact_device(computation, device)
        if clashing := sorted({"batch_size", "threads"} & made.keys()):
            raise UsageError(
                f"{', '.join(clashing)}: exact=True takes what the store was made with"
            )
        made["threads"] = _computed(store)["threads"]
    decode = str(computation["decode"])
    if decode == "gpu":
        log.warning(
            "a GPU decoded the images of this store, and the CPU decodes now; embeddings of the "
            "same image are alike and not equal"
        )
    options = Options(
        **made,
        normalize=bool(description.embedding["normalized"]),
        decode="exact" if decode == "gpu" else decode,  # type: ignore[arg-type]
    )
    spec = spec_of(store, weights, device)
    if exact and computation.get("compiled"):
        spec = _compiled(spec)
    size = int(computation["batch_size"])
    before, result = (
        each.dtype if exact else "float32" for each in (description, store.manifest.description)
    )
    return Encoder(spec, options, size if exact else None, before, transform, result)


def _exact_device(computation: Mapping[str, Any], device: str) -> str:
    """Return the device that can repeat the rows of a store bit by bit.

    Raises:
        UsageError: The device is of another kind, or a GPU decoded the images.
    """
    kind = str(computation["device"])
    if computation["decode"] == "gpu":
        raise UsageError("exact: the GPU decoded the images of this store; leave exact out")
    if device != "auto" and device.partition(":")[0] != kind:
        raise UsageError(
            f"exact: got device {device}, expected {kind} as in the store; leave exact out"
        )
    return kind if device == "auto" else device


def _computed(store: FeatureStore) -> dict[str, Any]:
    """Return threads and fusion of the run that computed rows of a store last."""
    run = read_run_json(store.path)
    options = run.get("options")
    computed = run.get("computed") or (options if isinstance(options, dict) else {})
    threads, fuse = computed.get("threads"), computed.get("fuse")
    return {
        "threads": threads if isinstance(threads, int) else None,
        "fuse": fuse if isinstance(fuse, str) else Options().fuse,
    }


def _compiled(spec: EmbeddingSpec) -> EmbeddingSpec:
    """Compile the backbones of a spec, except those that a run does not compile either."""
    fast = {id(b): b if b.taps is not None else compiled(b) for b in spec.backbones}
    return spec.with_backbones(fast)


def spec_of(store: FeatureStore, weights: Weights, device: str) -> EmbeddingSpec:
    """Load the models of a store and return its embedding, without what a transform changed.

    Args:
        store: A store.
        weights: As for :func:`encoder_of`.
        device: Device to compute on.

    Raises:
        WeightsError: The weights are missing, or others than those of the store.
        StoreError: The embedding would be another one.
        ExtractorError: A model cannot be loaded.
    """
    description = store.manifest.description.before_transform
    made_by, embedding = description.backbone, description.embedding
    precisions = split_names(str(description.computation["precision"]))
    fuse = _computed(store)["fuse"]
    if isinstance(weights, Backbone):
        spec = _spec_of_module(weights, description, precisions[0], device, fuse)
    else:
        parts: Sequence[Mapping[str, Any]] = made_by.get("parts", [made_by])
        files = _files_by_part(weights, parts)
        loader = _Loader(read_run_json(store.path), device)
        pixels = description.preprocess.get("parts", [description.preprocess])
        outputs = embedding["parts"] if "parts" in made_by else [embedding]
        precisions *= len(parts) if len(precisions) == 1 else 1
        backbones = []
        for part, numbers, output, precision, file in zip(
            parts, pixels, outputs, precisions, files, strict=True
        ):
            backbone = _with_outputs(loader.load(part, numbers, file), output)
            views = Views.from_mapping(embedding)
            if views != backbone.views:
                backbone = with_views(backbone, views, Options())
            backbone = fuse_as_chosen(backbone, fuse)
            backbones.append(backbone.to(backbone.device, precision))
        unit_parts = bool(embedding.get("unit_parts"))
        spec = EmbeddingSpec("again", _parts(backbones), unit_parts=unit_parts)
    _check_same(spec, description)
    return spec


def _parts(backbones: Sequence[Backbone]) -> tuple[EmbeddingPart, ...]:
    return tuple(EmbeddingPart(b, index) for b in backbones for index in range(len(b.outputs)))


def _check_same(spec: EmbeddingSpec, description: Description) -> None:
    """Check that an embedding is the one of a store.

    Raises:
        StoreError: It is not.
    """
    embedding = description.embedding
    options = Options(dtype=embedding["dtype"], normalize=bool(embedding["normalized"]))
    now = describe(spec, options, os.fsencode(description.root), 0)
    precision = now.computation["precision"]
    now = replace(
        now,
        computation={**description.computation, "precision": precision},
        shard_images=description.shard_images,
    )
    different = description.differences(now)
    if different:
        shown = "; ".join(map(str, different[:MAX_DIFFERENCES]))
        raise StoreError(
            f"{description.model} is not what the store was made with ({shown}); use the versions "
            "of the libraries that the manifest names, or compute the store again"
        )


def _spec_of_module(
    backbone: Backbone, description: Description, precision: str, device: str, fuse: str
) -> EmbeddingSpec:
    """Return the embedding of a backbone of the caller's, as a run computes it.

    Raises:
        WeightsError: The backbone has other weights than the store.
        UsageError: The store has several backbones.
    """
    made_by = description.backbone
    if "parts" in made_by:
        raise UsageError("backbone: got one, and the store was made with several; leave it out")
    _check_weights(backbone, made_by)
    layers, pool = _layers(description.embedding)
    has_layers = backbone.taps is not None
    options = Options(
        layers=() if has_layers else layers,
        pool="avg" if has_layers else pool,
        bypass=[name for name in made_by["bypassed"] if name not in backbone.bypassed],
        device=device,
        precision=precision,  # type: ignore[arg-type]
        fuse=fuse,  # type: ignore[arg-type]
    )
    backbone = replace(
        backbone,
        preprocess=_preprocess(description.preprocess),
        views=Views.from_mapping(description.embedding),
    )
    specs = load_specs([backbone], options)
    return EmbeddingSpec("again", _parts(specs[0].backbones))


# ---------------------------------------------------------------------------------------------
# Weights


def _files_by_part(
    weights: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None,
    parts: Sequence[Mapping[str, Any]],
) -> list[str | None]:
    """Return the weights that the caller names for each backbone, or None.

    Raises:
        UsageError: They belong to no backbone, or do not say to which.
    """
    if weights is None:
        return [None] * len(parts)
    if isinstance(weights, (str, os.PathLike)):
        if len(parts) == 1:
            return [os.fspath(weights)]
        named = dict(map(split_weights, split_model(os.fspath(weights))))
        if not all(named.values()):
            example = {part["model"]: "FILE" for part in parts}
            raise UsageError(
                f"weights: the store has {plural(len(parts), 'backbone')}; try a mapping such as "
                f"{example} (extract verify: --weights NAME=FILE+NAME=FILE)"
            )
        weights = named
    if not isinstance(weights, Mapping):
        raise UsageError(
            f"weights: got {weights!r:.80}, expected a file, a mapping from models to files, or a "
            "Backbone"
        )
    left = {str(name): os.fspath(file) for name, file in weights.items()}
    files: list[str | None] = []
    used = set()
    for part in parts:
        names = (part["model"], part["model"].partition(":")[2], part.get("source") or "")
        matching = [name for name in names if name in left]
        used.update(matching)
        files.append(left[matching[0]] if matching else None)
    if unused := sorted(left.keys() - used):
        models = ", ".join(str(part["model"]) for part in parts)
        raise UsageError(f"weights: got {', '.join(unused)}, expected names of {models}")
    return files


def _check_weights(backbone: Backbone, made_by: Mapping[str, Any]) -> None:
    """Check that a backbone has the weights and the code of a store.

    Raises:
        WeightsError: It has others.
        StoreError: The code that made it changed.
    """
    backbone._refresh_provenance()
    origin, model = backbone.provenance, made_by["model"]
    if origin.code != made_by.get("code", ""):
        raise StoreError(
            f"the code of {model} changed since the store was made: got SHA-256 {origin.code}, "
            f"expected {made_by.get('code', '')}; try the old version of that file"
        )
    if origin.sha256 != made_by["sha256"]:
        found = f" ({origin.file or origin.source})" if origin.file or origin.source else ""
        source = made_by["source"] or made_by["weights"]
        at = f"@{made_by['revision']}" if made_by["revision"] else ""
        raise WeightsError(
            f"the weights of {model} changed: got SHA-256 {origin.sha256}{found}, expected "
            f"{made_by['sha256']} as in the store ({source}{at}); {TRY_WEIGHTS}"
        )


class _Loader:
    """Loads backbones of a store.

    Args:
        run: Content of ``run.json``, which says where files were.
        device: Device to compute on.
    """

    def __init__(self, run: Mapping[str, Any], device: str) -> None:
        self._device = device
        request = run.get("request")
        self._folder = str(request.get("folder", "")) if isinstance(request, dict) else ""
        recorded = run.get("backbones")
        self._backbones: list[dict[str, Any]] = recorded if isinstance(recorded, list) else []
        stamps = run.get("files")
        files = [str(stamp[0]) for stamp in stamps] if isinstance(stamps, list) else []
        self._files = [file for file in files if not file.endswith(".json")]

    def load(
        self, made_by: Mapping[str, Any], pixels: Mapping[str, Any], weights: str | None
    ) -> Backbone:
        """Load a backbone in float32, with the weights and the preprocessing of a store.

        Args:
            made_by: Entry of the manifest for the backbone.
            pixels: Entry of the manifest for its preprocessing.
            weights: Weights that the caller names.
        """
        model, weights = self._requested(made_by, weights)
        preprocess = _preprocess(pixels)
        options = Options(
            weights=weights,
            weights_key=made_by["key"] or None,
            weights_prefix=made_by.get("prefix") or None,
            seed=made_by["seed"] or 0,
            device=self._device,
            precision="float32",
        )
        sized = replace(options, image_size=preprocess.input_size)
        recorded = {made_by["model"]: made_by["sha256"]}
        if made_by["library"] == "file":  # it may choose a size, layers and bypasses itself
            backbone = load(model, options, recorded)
            if backbone.preprocess.input_size != preprocess.input_size:
                backbone = load(model, sized, recorded)
        else:
            backbone = load(
                model,
                replace(
                    sized, bypass=made_by["bypassed"], keep_head=bool(made_by.get("kept_heads"))
                ),
                recorded,
            )
        _check_weights(backbone, made_by)
        if missing := [n for n in made_by["bypassed"] if n not in backbone.bypassed]:
            backbone = backbone.bypass(missing)
        return replace(backbone, preprocess=preprocess)

    def _requested(self, made_by: Mapping[str, Any], weights: str | None) -> tuple[str, str]:
        """Return the model and the weights to load.

        Raises:
            WeightsError: They are files of the user that moved, or an object of a program.
            StoreError: They are made by code that the caller does not name.
        """
        model, kind = str(made_by["model"]), str(made_by["weights"])
        if made_by["library"] == "file":
            return self._requested_function(made_by, weights)
        if kind == "given" or made_by["library"] == "module":
            raise WeightsError(
                f"the rows were made by {model}, a network of your own program; pass it: "
                "Extractor.for_store(store, backbone=backbone)"
            )
        if weights is not None:
            return (weights, "default") if weights.startswith(LOCAL) else (model, weights)
        if kind == "random":
            return model, "random"
        if kind == "file":
            return self._requested_file(made_by)
        source = str(made_by["source"])
        if not made_by["tag"] and source.startswith(HUB):
            repository = source.rpartition("/")[0]
            if repository.partition("@")[0] != model.partition("@")[0]:
                at = f"@{made_by['revision']}" if made_by["revision"] else ""
                return model, f"{repository}{at}"  # a file of the hub, for another model
        return model, made_by["tag"] or "default"

    def _requested_file(self, made_by: Mapping[str, Any]) -> tuple[str, str]:
        """Return the model and its file of weights."""
        model = str(made_by["model"])
        if model.startswith(LOCAL):
            folder = Path(self._folder, model.removeprefix(LOCAL))
            own = folder / str(made_by["source"])
            model = f"{LOCAL}{folder}"
            if own.is_file() and sha256_of_file(own) == made_by["sha256"]:
                return model, "default"
        return model, self._location(made_by)

    def _requested_function(
        self, made_by: Mapping[str, Any], weights: str | None
    ) -> tuple[str, str]:
        """Return ``FILE.py:FUNCTION``, and the weights that it is to load.

        Raises:
            StoreError: The caller does not name it. No file beside a store makes code run.
        """
        function, file = split_weights(weights or "")
        if not is_function_name(function):
            label = str(made_by["model"])
            known = [str(b.get("function")) for b in self._backbones if b.get("model") == label]
            was = f", such as {known[0]}" if known and known[0] else ""
            raise StoreError(
                f"the rows were made by {label}, which is code of your own; name it with --weights "
                f"PATH/FILE.py:FUNCTION (in the library: weights=){was}"
            )
        if made_by["weights"] == "file":
            return function, file or self._location(made_by)
        return function, file or "default"

    def _location(self, made_by: Mapping[str, Any]) -> str:
        """Return the file of weights where a run found it, if it is still there.

        Raises:
            WeightsError: It is not, or it is another file now.
        """
        model, expected = made_by["model"], made_by["sha256"]
        known = [str(b.get("file", "")) for b in self._backbones if b.get("sha256") == expected]
        candidates = list(dict.fromkeys(filter(None, [*known, *self._files])))
        existing = {file: sha256_of_file(Path(file)) for file in candidates if os.path.isfile(file)}
        for file, digest in existing.items():
            if digest == expected:
                return file
        name = made_by["source"] or "a file of your own"
        named = {file: digest for file, digest in existing.items() if Path(file).name == name}
        if named:
            file, digest = named.popitem()
            raise WeightsError(
                f"the weights of {model} changed: got SHA-256 {digest} ({file}), expected "
                f"{expected} as in the store; {TRY_WEIGHTS}"
            )
        folder = ", or the folder with weights=local-dir:PATH" if model.startswith(LOCAL) else ""
        looked = f"; it is no longer {known[0]}" if known else ""
        raise WeightsError(
            f"the rows of {model} were made with {name} (SHA-256 {expected}){looked}; name that "
            f"file with weights=FILE (extract verify: --weights FILE){folder}"
        )


# ---------------------------------------------------------------------------------------------
# Layers and pixels


def _preprocess(pixels: Mapping[str, Any]) -> Preprocess:
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in pixels.items()
    }
    return Preprocess(**values)


def _layers(embedding: Mapping[str, Any]) -> tuple[list[str], str]:
    """Return the layers of an embedding, and how they are pooled."""
    outputs: Sequence[Mapping[str, Any]] = embedding.get("parts", [embedding])
    layers = [str(output["layer"]) for output in outputs if output.get("layer")]
    pools = {str(output["pool"]) for output in outputs if output.get("pool")}
    return layers, pools.pop() if layers and pools else "avg"


def _with_outputs(backbone: Backbone, embedding: Mapping[str, Any]) -> Backbone:
    layers, pool = _layers(embedding)
    if layers and backbone.taps is None:
        return backbone.at_layers(layers, pool)
    definition = embedding.get("definition", PRE_LOGITS)
    if not layers and backbone.outputs[0].definition != definition:
        raise StoreError(
            f"{backbone.provenance.model} gives {backbone.outputs[0].definition} now; the store "
            f"holds {definition}"
        )
    return backbone
