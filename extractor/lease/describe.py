"""Description of the embeddings of a store, for its manifest."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict
from typing import Any

from extractor.lease.software import software_versions
from extractor.models.backbone import Backbone
from extractor.models.embedding import EmbeddingSpec
from extractor.models.naming import join_names
from extractor.network.taps import Output
from extractor.options import Options
from extractor.store.format import Description
from extractor.system.devices import device_name

__all__ = ["describe", "precision_of"]


def describe(spec: EmbeddingSpec, options: Options, root: bytes, batch_size: int) -> Description:
    """Return everything that the manifest records about how a store is made.

    Its ``shard_images`` is 0 if the options leave that open.
    """
    first = spec.backbones[0]
    several = len(spec.backbones) > 1
    cosines = [b.least_cosine for b in spec.backbones if b.least_cosine is not None]
    gpu = device_name(first.device)
    return Description(
        backbone=_joined_backbones(spec) if several else _backbone(first),
        embedding={
            **_embedding(spec),
            "dim": spec.dim,
            "shape": list(spec.shape),
            "dtype": options.dtype,
            "normalized": options.normalize,
            **first.views.as_dict(),
        },
        preprocess=(
            {"parts": [backbone.preprocess.as_dict() for backbone in spec.backbones]}
            if several
            else first.preprocess.as_dict()
        ),
        computation={
            "precision": precision_of(spec),
            "least_cosine": min(cosines, default=None),
            "compiled": any(backbone.is_compiled for backbone in spec.backbones),
            "device": first.device.type,
            **({"device_name": gpu} if gpu else {}),
            "batch_size": batch_size,
            "decode": options.decode,
        },
        root=os.fsdecode(root),
        shard_images=options.shard_images or 0,
        software=software_versions(),
    )


def precision_of(spec: EmbeddingSpec) -> str:
    """Return the precision of the backbones, such as ``bfloat16``, joined where they differ."""
    names = [backbone.precision for backbone in spec.backbones]
    return names[0] if len(set(names)) == 1 else join_names(names)


def _backbone(backbone: Backbone) -> dict[str, Any]:
    described = {
        **backbone.provenance.as_dict(),
        "heads": list(backbone.heads),
        "bypassed": list(backbone.bypassed),
    }
    if backbone.kept_heads:
        described["kept_heads"] = list(backbone.kept_heads)
    return described


def _joined_backbones(spec: EmbeddingSpec) -> dict[str, Any]:
    parts = [_backbone(backbone) for backbone in spec.backbones]
    digests = "".join(part["sha256"] for part in parts)
    return {
        "model": join_names([part["model"] for part in parts]),
        "weights": join_names([part["tag"] or part["weights"] for part in parts]),
        "sha256": hashlib.sha256(digests.encode()).hexdigest(),
        "parts": parts,
    }


def _embedding(spec: EmbeddingSpec) -> dict[str, Any]:
    outputs = [_output(part.output) for part in spec.parts]
    if len(outputs) == 1:
        return outputs[0]
    models = [part.backbone.provenance.model for part in spec.parts]
    return {
        "definition": "concatenation",
        "unit_parts": spec.unit_parts,
        "parts": [
            {"model": model, **output, "dim": part.output.dim}
            for model, output, part in zip(models, outputs, spec.parts, strict=True)
        ],
    }


def _output(output: Output) -> dict[str, Any]:
    """Return the definition of an embedding without its shape, which is an entry of its own."""
    definition = asdict(output)
    del definition["shape"]
    return definition
