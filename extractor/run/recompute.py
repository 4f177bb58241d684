"""Compute rows of a store again and compare, to verify that its manifest describes them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from extractor.compute.embed import embed
from extractor.compute.inputs import pictures_of
from extractor.errors import StoreError
from extractor.images.types import Failure
from extractor.loading.loader import BatchLoader
from extractor.loading.options import LoaderOptions
from extractor.models.backbone import Backbone
from extractor.models.embedding import EmbeddingPart, EmbeddingSpec, fuse_as_chosen
from extractor.models.load import load
from extractor.models.naming import split_names
from extractor.network.taps import PRE_LOGITS
from extractor.options import MAX_PIXELS, Options
from extractor.preprocess import Preprocess
from extractor.reading.reader import FeatureStore
from extractor.system.cpu import compute_threads

__all__ = ["recompute"]

# Allowed difference, relative to the length of a row. Other hardware sums in another order, and
# float16 keeps 11 bits.
TOLERANCE = {"float32": 1e-3, "float16": 5e-3}
# In half precision, another order of sums or a compiled network rounds differently at every step.
# A GPU that decodes changes the pixels.
HALF_TOLERANCE = 0.05


def recompute(
    store: FeatureStore, count: int, *, weights: str | None = None, device: str = "auto"
) -> Iterator[str]:
    """Compute rows of a store again and yield a sentence for each one that differs.

    Args:
        store: Store to verify.
        count: Number of rows to compute, spread evenly over the store.
        weights: File that the store was made with, if it was a file of the user.
        device: Device to compute on.

    Raises:
        StoreError: The manifest does not identify the model, or the model is a different one now.
        ExtractorError: The model cannot be loaded.
    """
    spec = _spec_of(store, weights, device)
    description = store.manifest.description
    decode = str(description.computation["decode"])
    is_exact = description.computation["precision"] == "float32" and decode != "gpu"
    tolerance = TOLERANCE[description.dtype] if is_exact else HALF_TOLERANCE
    rows = np.unique(np.linspace(0, len(store) - 1, min(count, len(store))).astype(int))
    paths = [os.path.join(store.root, store.paths[row]) for row in rows]
    with (
        compute_threads(),
        BatchLoader(
            iter([[path] for path in paths]),
            pictures_of([spec]),
            LoaderOptions(
                batch_size=1,
                workers=1,
                max_pixels=_max_pixels(store, rows),
                decode_mode="exact" if decode == "gpu" else decode,
            ),
        ) as loader,
    ):
        computed = embed([spec], loader, normalize=bool(description.embedding["normalized"]))
        for row, path, embedded in zip(rows, paths, computed, strict=True):
            (outcome,) = embedded.outcomes
            if isinstance(outcome, Failure):
                yield f"row {row}: {path!a} cannot be decoded any more: {outcome.message}"
                continue
            now = embedded.rows[0][0].astype(description.dtype).astype(np.float64)
            stored = np.asarray(store[int(row)], np.float64)
            difference = np.linalg.norm(now - stored) / max(float(np.linalg.norm(stored)), 1e-12)
            if not difference <= tolerance:
                yield f"row {row}: {path!a} gives another row now, off by {difference:.2g}"


def _max_pixels(store: FeatureStore, rows: npt.NDArray[np.int64]) -> int:
    """Return a limit that the images of some rows do not exceed, whatever limit they had then."""
    widths, heights = (np.array(store.column(name), np.int64)[rows] for name in ("width", "height"))
    return max(MAX_PIXELS, int((widths * heights).max(initial=0)))


def _spec_of(store: FeatureStore, weights: str | None, device: str) -> EmbeddingSpec:
    """Load the models of a store and return the embedding that it holds."""
    description = store.manifest.description
    made_by, embedding = description.backbone, description.embedding
    precisions = split_names(str(description.computation["precision"]))
    if "parts" in made_by:
        if len(precisions) == 1:
            precisions *= len(made_by["parts"])
        backbones = [
            _prepare(_backbone(part, pixels, None, device), output, precision)
            for part, pixels, output, precision in zip(
                made_by["parts"],
                description.preprocess["parts"],
                embedding["parts"],
                precisions,
                strict=True,
            )
        ]
        parts = tuple(EmbeddingPart(backbone) for backbone in backbones)
        return EmbeddingSpec("again", parts, unit_parts=bool(embedding["unit_parts"]))
    (precision,) = precisions
    backbone = _backbone(made_by, description.preprocess, weights, device)
    backbone = _prepare(backbone, embedding, precision)
    count = len(backbone.outputs)
    return EmbeddingSpec("again", tuple(EmbeddingPart(backbone, index) for index in range(count)))


def _backbone(
    made_by: Mapping[str, Any], pixels: Mapping[str, Any], weights: str | None, device: str
) -> Backbone:
    """Load a backbone in float32, with the weights and the preprocessing of a store.

    Args:
        made_by: Entry of the manifest for the backbone.
        pixels: Entry of the manifest for its preprocessing.
        weights: File of the user, if any.
        device: Device to compute on.
    """
    model, weights = _requested_model(made_by, weights)
    height, width = pixels["input_size"]
    options = Options(
        weights=weights,
        weights_key=made_by["key"] or None,
        weights_prefix=made_by.get("prefix") or None,
        seed=made_by["seed"] or 0,
        image_size=(height, width),
        bypass=made_by["bypassed"],
        keep_head=bool(made_by.get("kept_heads")),
        device=device,
    )
    backbone = load(model, options, {made_by["model"]: made_by["sha256"]})
    if backbone.provenance.code != made_by.get("code", ""):
        raise StoreError(f"the code of {model} changed since the store was made")
    if backbone.provenance.sha256 != made_by["sha256"]:
        raise StoreError(
            f"the weights of {model} changed: got SHA-256 {backbone.provenance.sha256}, expected "
            f"{made_by['sha256']} as in the store"
        )
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in pixels.items()
    }
    return replace(backbone, preprocess=Preprocess(**values))


def _requested_model(made_by: Mapping[str, Any], weights: str | None) -> tuple[str, str]:
    """Return the model and the weights to load.

    Raises:
        StoreError: They are files of the user, which ``weights`` does not name.
    """
    model: str = made_by["model"]
    if made_by["library"] == "file":
        if weights is None or ".py:" not in weights:
            raise StoreError(
                f"the rows were made by {model}, which is code of your own; name it with "
                "--weights PATH/FILE.py:FUNCTION"
            )
        return weights, "default"
    if made_by["weights"] in ("file", "given") and weights is None:
        raise StoreError(
            f"the rows were made with {made_by['source'] or 'a module of your own'}; name that "
            "file with --weights"
        )
    if weights is None:
        weights = "random" if made_by["weights"] == "random" else made_by["tag"] or "default"
    return model, weights


def _prepare(backbone: Backbone, embedding: Mapping[str, Any], precision: str) -> Backbone:
    """Return the backbone as the run computed it, with the outputs that a store holds."""
    backbone = fuse_as_chosen(_with_outputs(backbone, embedding), Options().fuse)
    return backbone.to(backbone.device, precision)


def _with_outputs(backbone: Backbone, embedding: Mapping[str, Any]) -> Backbone:
    outputs: Sequence[Mapping[str, Any]] = embedding.get("parts", [embedding])
    layers = [output["layer"] for output in outputs if output.get("layer")]
    if layers:
        pools = {output["pool"] for output in outputs} - {""}
        return backbone.at_layers(layers, pools.pop() if pools else "avg")
    if backbone.outputs[0].definition != embedding.get("definition", PRE_LOGITS):
        raise StoreError(
            f"{backbone.provenance.model} gives {backbone.outputs[0].definition} now; the "
            f"store holds {embedding.get('definition', PRE_LOGITS)}"
        )
    return backbone
