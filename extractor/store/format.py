"""The store on disk, version 1: its names and its manifest (``docs/store-format.md``)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from extractor.errors import StoreError

__all__ = [
    "FAILURES",
    "FEATURES",
    "IMAGES",
    "MANIFEST",
    "STAGING",
    "Description",
    "FileEntry",
    "Manifest",
    "ShardEntry",
    "features_name",
    "images_name",
]

FORMAT = "extractor-store"
VERSION = 1

MANIFEST = "store.json"
FEATURES = "features"
IMAGES = "images"
FAILURES = "failures.jsonl"
# What a run builds before it becomes visible; hidden, so that no tool takes it for a result.
STAGING = ".extractor-partial"


def features_name(shard: int) -> str:
    """Name of a shard's embeddings inside the store: ``features/00000.npy``."""
    return f"{FEATURES}/{shard:05d}.npy"


def images_name(shard: int) -> str:
    """Name of a shard's image index inside the store: ``images/00000.parquet``."""
    return f"{IMAGES}/{shard:05d}.parquet"


@dataclass(frozen=True)
class FileEntry:
    """One file of the store: its name inside it, its size and its SHA-256."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardEntry:
    """One shard: how many images it answers for, and the rows that came of them.

    Attributes:
        shard: number in the file names, counted from 0 over all shards that were planned.
        images: images of the sorted list that fell to this shard, failed ones included.
        rows: images that have a row; at least 1, since a shard without rows has no files.
    """

    shard: int
    images: int
    rows: int
    features: FileEntry
    index: FileEntry

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= self.images:
            raise ValueError(f"shard {self.shard}: {self.rows} rows of {self.images} images")
        names = (features_name(self.shard), images_name(self.shard))
        if (self.features.name, self.index.name) != names:
            raise ValueError(f"shard {self.shard}: files {self.features.name}, {self.index.name}")


@dataclass(frozen=True)
class Description:
    """All that is known of a store before its first row: what it takes to repeat the vectors.

    Attributes:
        backbone: model, library, version, weights with tag and digest, replaced heads.
        embedding: definition, dim, shape, dtype, whether it is scaled to unit length.
        preprocess: the evaluation transform.
        computation: precision, device and batch size.
        root: folder that the paths are relative to; bytes that are no UTF-8 as lone surrogates.
        shard_images: images of one shard.
        software: versions of what took part.
    """

    backbone: Mapping[str, Any]
    embedding: Mapping[str, Any]
    preprocess: Mapping[str, Any]
    computation: Mapping[str, Any]
    root: str
    shard_images: int
    software: Mapping[str, str]

    def __post_init__(self) -> None:
        if not isinstance(self.backbone, Mapping):
            raise ValueError(f"backbone: got {self.backbone!r}")
        if self.dtype not in ("float32", "float16"):
            raise ValueError(f"dtype: got {self.dtype!r}")
        if not self.shape or min(self.shape) < 1 or math.prod(self.shape) != self.dim:
            raise ValueError(f"dim: got {self.dim} for embeddings of shape {self.shape}")

    @property
    def dim(self) -> int:
        """Numbers in one embedding."""
        return int(self.embedding["dim"])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one embedding: ``(dim,)``, or the axes of a map or of tokens."""
        return tuple(int(axis) for axis in self.embedding["shape"])

    @property
    def dtype(self) -> str:
        """``float32`` or ``float16``."""
        return str(self.embedding["dtype"])

    @property
    def model(self) -> str:
        """Full name of the model, such as ``timm:resnet50``."""
        return str(self.backbone["model"])

    @property
    def made_with(self) -> str:
        """The model and its weights in a few words."""
        weights = self.backbone.get("tag") or self.backbone.get("weights")
        return f"{self.model} ({weights}, sha256 {str(self.backbone.get('sha256'))[:12]})"


@dataclass(frozen=True)
class Manifest:
    """``store.json``: what the store holds and how it was made.

    Attributes:
        images: images that were asked for; rows and failures together.
        rows: images that have a row.
        created: end of the run, ISO 8601 in UTC.
    """

    description: Description
    images: int
    rows: int
    shards: tuple[ShardEntry, ...]
    failures: FileEntry
    created: str = field(compare=False)

    def __post_init__(self) -> None:
        if self.failures.name != FAILURES:
            raise ValueError(f"failures in {self.failures.name!r}")
        total = sum(shard.rows for shard in self.shards)
        if total != self.rows or self.rows > self.images:
            raise ValueError(f"{self.rows} rows of {self.images} images, shards hold {total}")
        numbers = [shard.shard for shard in self.shards]
        if numbers != sorted(set(numbers)):
            raise ValueError(f"shards out of order: {numbers}")

    @property
    def failed(self) -> int:
        """Images without a row."""
        return self.images - self.rows

    def to_json(self) -> str:
        """The text of ``store.json``, ASCII, with the keys in a fixed order."""
        description = asdict(self.description)
        content = {
            "format": FORMAT,
            "version": VERSION,
            "created": self.created,
            **description,
            "counts": {"images": self.images, "rows": self.rows, "failures": self.failed},
            "shards": [asdict(shard) for shard in self.shards],
            "failures": asdict(self.failures),
        }
        return json.dumps(content, indent=2, ensure_ascii=True) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, name: str) -> Manifest:
        """Read ``store.json``; ``name`` says in error messages where it lies.

        Raises:
            StoreError: no manifest, or one of a version that is not known here.
        """
        try:
            content = json.loads(text)
        except ValueError as error:
            raise StoreError(f"{name} is no JSON ({error}); the store is damaged") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise StoreError(f'{name} is no manifest of a store: expected "format": "{FORMAT}"')
        if content.get("version") != VERSION:
            raise StoreError(
                f"{name} is a store of version {content.get('version')!r}; this program reads "
                f"version {VERSION}, try a newer one"
            )
        try:
            return cls(
                description=Description(
                    **{key: content[key] for key in Description.__dataclass_fields__}
                ),
                images=content["counts"]["images"],
                rows=content["counts"]["rows"],
                shards=tuple(_shard(entry) for entry in content["shards"]),
                failures=FileEntry(**content["failures"]),
                created=content["created"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{name} is damaged: {type(error).__name__} {error}") from error


def _shard(entry: Mapping[str, Any]) -> ShardEntry:
    features, index = FileEntry(**entry["features"]), FileEntry(**entry["index"])
    return ShardEntry(**{**entry, "features": features, "index": index})
