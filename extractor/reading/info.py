"""What a manifest says about the rows of a store, as one typed value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from extractor.store.format import Manifest

__all__ = ["StoreInfo"]


@dataclass(frozen=True)
class StoreInfo:
    """How the rows of a store were made, and how many there are.

    >>> info = FeatureStore.open("features/resnet50").info  # doctest: +SKIP
    >>> info.model, info.shape, info.normalized, info.rows  # doctest: +SKIP
    ('timm:resnet50', (2048,), False, 25)

    Attributes:
        model: Full name, such as ``timm:resnet50``; joined names for several backbones.
        library: Library that built the model; joined for several.
        weights: ``hub``, ``package``, ``file``, ``random`` or ``given``; joined for several.
        weights_tag: Name that the library has for the weights, such as ``a1_in1k``, or empty.
        weights_source: Address or file of the weights, or empty.
        weights_sha256: SHA-256 of the weights; for several backbones that of their digests.
        heads: Modules that were replaced by ``nn.Identity`` because they classify.
        bypassed: Further modules that were replaced by ``nn.Identity``.
        definition: ``pre-logits``, ``layer``, ``concatenation`` or another word of the manifest.
        layers: Layers of the embedding; empty for the output of the model.
        pool: Pooling of the layers, or empty.
        dim: Number of values in one embedding.
        shape: Shape of one embedding.
        dtype: Type of the stored values, ``float32`` or ``float16``.
        augment: ``flip`` for the mean with the mirror image, or empty.
        scales: Factors of the image size whose embeddings were averaged; ``(1.0,)`` for one.
        normalized: Whether embeddings have unit length.
        preprocess: Evaluation transform as the manifest has it.
        precision: Precision of the model.
        device: Kind of device, such as ``cuda``.
        batch_size: Number of images in one forward pass.
        root: Folder that paths are relative to.
        rows: Number of rows that count.
        failed: Number of images without a row.
        retired: Number of rows in the files that no longer count.
        created: End of the last run that changed the store, ISO 8601 in UTC.
        software: Versions of Python, this program and its libraries.
        transform: What ``extract transform`` did, as the manifest has it; None for rows of images.
    """

    model: str
    library: str
    weights: str
    weights_tag: str
    weights_source: str
    weights_sha256: str
    heads: tuple[str, ...]
    bypassed: tuple[str, ...]
    definition: str
    layers: tuple[str, ...]
    pool: str
    dim: int
    shape: tuple[int, ...]
    dtype: str
    augment: str
    scales: tuple[float, ...]
    normalized: bool
    preprocess: Mapping[str, Any] = field(repr=False)
    precision: str
    device: str
    batch_size: int
    root: str
    rows: int
    failed: int
    retired: int
    created: str
    software: Mapping[str, str] = field(repr=False)
    transform: Mapping[str, Any] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, manifest: Manifest) -> StoreInfo:
        """Return what a manifest says."""
        made = manifest.description
        backbones = made.backbone.get("parts", [made.backbone])
        outputs = made.embedding.get("parts", [made.embedding])

        def joined(key: str) -> str:
            return "+".join(dict.fromkeys(str(part.get(key) or "") for part in backbones))

        def names(key: str) -> tuple[str, ...]:
            return tuple(name for part in backbones for name in part.get(key, ()))

        return cls(
            model=made.model,
            library=joined("library"),
            weights=joined("weights"),
            weights_tag=joined("tag"),
            weights_source=joined("source"),
            weights_sha256=str(made.backbone.get("sha256", "")),
            heads=names("heads"),
            bypassed=names("bypassed"),
            definition=str(made.embedding.get("definition", "")),
            layers=tuple(str(output["layer"]) for output in outputs if output.get("layer")),
            pool="+".join(dict.fromkeys(str(o["pool"]) for o in outputs if o.get("pool"))),
            dim=made.dim,
            shape=made.shape,
            dtype=made.dtype,
            augment=str(made.embedding.get("augment", "")),
            scales=tuple(made.embedding.get("scales", (1.0,))),
            normalized=bool(made.embedding.get("normalized", False)),
            preprocess=made.preprocess,
            precision=str(made.computation.get("precision", "")),
            device=str(made.computation.get("device", "")),
            batch_size=int(made.computation.get("batch_size", 0)),
            root=made.root,
            rows=manifest.rows,
            failed=manifest.failed,
            retired=manifest.retired,
            created=manifest.created,
            software=made.software,
            transform=made.transform,
        )
