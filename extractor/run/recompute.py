"""Draws rows of a store again, to see that they are what its manifest says."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from extractor.compute.embed import embed, pictures_of
from extractor.errors import StoreError
from extractor.images.types import Failure
from extractor.loading.loader import BatchLoader
from extractor.loading.options import LoaderOptions
from extractor.models.backbone import Backbone
from extractor.models.embedding import EmbeddingPart, EmbeddingSpec, fuse_as_chosen
from extractor.models.load import load
from extractor.models.naming import split_names
from extractor.network.taps import PRE_LOGITS
from extractor.options import Options
from extractor.preprocess import Preprocess
from extractor.store.reader import FeatureStore
from extractor.system.cpu import compute_threads

__all__ = ["recompute"]

# Of the length of a row: other hardware sums in another order, float16 keeps 11 bits. In half
# precision another order, or a network that was compiled, rounds otherwise at every step; so does a
# GPU that decodes.
TOLERANCE = {"float32": 1e-3, "float16": 5e-3}
HALF_TOLERANCE = 0.05


def recompute(
    store: FeatureStore, count: int, *, weights: str | None = None, device: str = "auto"
) -> Iterator[str]:
    """Which of ``count`` rows, spread over a store, come out otherwise now; a sentence each.

    Args:
        weights: the file that the store was made with, where it was one of the user's.
        device: that computes.

    Raises:
        StoreError: the manifest does not say enough to load the same model.
        ExtractorError: it cannot be loaded.
    """
    spec = _spec(store, weights, device)
    dtype = store.manifest.description.dtype
    precision = str(store.manifest.description.computation["precision"])
    how = str(store.manifest.description.computation["decode"])
    same = precision == "float32" and how != "gpu"
    tolerance = TOLERANCE[dtype] if same else HALF_TOLERANCE
    normalize = bool(store.manifest.description.embedding["normalized"])
    rows = np.unique(np.linspace(0, len(store) - 1, min(count, len(store))).astype(int))
    paths = [os.path.join(store.root, store.paths[row]) for row in rows]
    plan = iter([[path] for path in paths])
    with (
        compute_threads(),
        BatchLoader(
            plan,
            pictures_of([spec]),
            LoaderOptions(batch_size=1, workers=1, decode_mode="exact" if how == "gpu" else how),
        ) as loader,
    ):
        computed = embed([spec], loader, normalize=normalize)
        for row, path, embedded in zip(rows, paths, computed, strict=True):
            (outcome,) = embedded.outcomes
            if isinstance(outcome, Failure):
                yield f"row {row}: {path!a} cannot be decoded any more: {outcome.message}"
                continue
            now = embedded.rows[0][0].astype(dtype).astype(np.float64)
            there = np.asarray(store[int(row)], np.float64)
            apart = np.linalg.norm(now - there) / max(float(np.linalg.norm(there)), 1e-12)
            if not apart <= tolerance:
                yield f"row {row}: {path!a} comes out otherwise now, by {apart:.2g} of its length"


def _spec(store: FeatureStore, weights: str | None, device: str) -> EmbeddingSpec:
    described = store.manifest.description
    made, embedding = described.backbone, described.embedding
    precisions = split_names(str(described.computation["precision"]))
    if "parts" in made:
        if len(precisions) == 1:
            precisions *= len(made["parts"])
        parted = zip(made["parts"], described.preprocess["parts"], precisions, strict=True)
        backbones = [_backbone(one, pixels, {}, None, device, how) for one, pixels, how in parted]
        parts = tuple(EmbeddingPart(backbone) for backbone in backbones)
        return EmbeddingSpec("again", parts, unit_parts=bool(embedding["unit_parts"]))
    (precision,) = precisions
    backbone = _backbone(made, described.preprocess, embedding, weights, device, precision)
    count = len(backbone.outputs)
    return EmbeddingSpec("again", tuple(EmbeddingPart(backbone, index) for index in range(count)))


def _backbone(
    made: Mapping[str, Any],
    pixels: Mapping[str, Any],
    embedding: Mapping[str, Any],
    weights: str | None,
    device: str,
    precision: str,
) -> Backbone:
    model = made["model"]
    own_code = made["library"] == "file"
    if own_code and (weights is None or ".py:" not in weights):
        raise StoreError(
            f"the rows were made by {model}, which is code of your own; name it with "
            "--weights PATH/FILE.py:FUNCTION"
        )
    if own_code:
        model, weights = weights or "", None
    elif made["weights"] in ("file", "given") and weights is None:
        raise StoreError(
            f"the rows were made with {made['source'] or 'a module of your own'}; name that file "
            "with --weights"
        )
    known = {"random": "random"}.get(made["weights"], made["tag"] or "default")
    wanted = weights or ("default" if own_code else known)
    size = tuple(pixels["input_size"])
    options = Options(
        weights=wanted,
        weights_key=made["key"] or None,
        seed=made["seed"] or 0,
        image_size=(size[0], size[1]),
        bypass=made["bypassed"],
        device=device,
    )
    backbone = load(model, options, {made["model"]: made["sha256"]})
    if backbone.provenance.code != made.get("code", ""):
        raise StoreError(f"the code of {model} is not what it was when the store was made")
    if backbone.provenance.sha256 != made["sha256"]:
        raise StoreError(
            f"the weights of {model} are others now: SHA-256 {backbone.provenance.sha256}, "
            f"{made['sha256']} when the store was made"
        )
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in pixels.items()
    }
    backbone = replace(backbone, preprocess=Preprocess(**values))
    layers = [one["layer"] for one in embedding.get("parts", [embedding]) if one.get("layer")]
    if layers:
        pools = {one["pool"] for one in embedding.get("parts", [embedding])} - {""}
        backbone = backbone.at_layers(layers, pools.pop() if pools else "avg")
    elif backbone.outputs[0].definition not in (embedding.get("definition", PRE_LOGITS),):
        raise StoreError(f"{model} gives {backbone.outputs[0].definition} now")
    return fuse_as_chosen(backbone, Options().fuse).to(backbone.device, precision)
