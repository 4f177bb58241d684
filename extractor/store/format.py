"""The store on disk, version 1: its names and its manifest (``docs/store-format.md``)."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from extractor.errors import StoreError

__all__ = [
    "FAILURES",
    "FEATURES",
    "IMAGES",
    "IN_FLIGHT",
    "JOB",
    "JOURNAL",
    "MANIFEST",
    "MAX_SHARDS",
    "REPLACED",
    "RUN",
    "STAGING",
    "SUSPECTS",
    "Description",
    "FileEntry",
    "Manifest",
    "ShardEntry",
    "checksum",
    "features_name",
    "images_name",
    "listing_digest",
    "ranges",
    "with_checksum",
]

FORMAT = "extractor-store"
VERSION = 1
MAX_SHARDS = 100_000  # five digits in a shard's name, so that name order is row order

MANIFEST = "store.json"
FEATURES = "features"
IMAGES = "images"
FAILURES = "failures.jsonl"
RUN = "run.json"
# What a run builds before it becomes visible; hidden, so that no tool takes it for a result.
STAGING = ".extractor-partial"
JOB = "job.json"  # in it: what the run was asked for
JOURNAL = "journal"  # in it: what it has done of each shard
IN_FLIGHT = "in-flight"  # in it: the images that are being decoded
SUSPECTS = "suspects.json"  # in it: those during whose decoding a run died
REPLACED = "replaced.json"  # in it: the old manifest, while the new store takes its place


def features_name(shard: int) -> str:
    """Name of a shard's embeddings inside the store: ``features/00000.npy``."""
    return f"{FEATURES}/{shard:05d}.npy"


def images_name(shard: int) -> str:
    """Name of a shard's image index inside the store: ``images/00000.parquet``."""
    return f"{IMAGES}/{shard:05d}.parquet"


def ranges(mask: npt.NDArray[np.bool_]) -> str:
    """The places of the true values, as text.

    >>> ranges(np.array([True, False, True, True, True]))
    '0,2-4'
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    pairs = edges.reshape(-1, 2).tolist()
    return ",".join(f"{a}" if b == a + 1 else f"{a}-{b - 1}" for a, b in pairs)


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
        retired: rows that no longer count, as ranges such as ``"0,7-12"``: their images changed or
            went since.
    """

    shard: int
    images: int
    rows: int
    features: FileEntry
    index: FileEntry
    retired: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= self.images:
            raise ValueError(f"shard {self.shard}: {self.rows} rows of {self.images} images")
        names = (features_name(self.shard), images_name(self.shard))
        if (self.features.name, self.index.name) != names:
            raise ValueError(f"shard {self.shard}: files {self.features.name}, {self.index.name}")
        self.live_mask()

    def live_mask(self) -> npt.NDArray[np.bool_]:
        """``(rows,)``, which rows count.

        Raises:
            ValueError: :attr:`retired` is not what :func:`ranges` writes.
        """
        live = np.ones(self.rows, bool)
        last = -1
        for part in filter(None, self.retired.split(",")):
            first, dash, end = part.partition("-")
            start, stop = int(first), int(end if dash else first) + 1
            if not last < start < stop <= self.rows:
                raise ValueError(f"shard {self.shard}: retired {part!r} of {self.rows} rows")
            live[start:stop] = False
            last = stop
        return live

    @functools.cached_property
    def live_rows(self) -> int:
        """How many rows count."""
        return int(np.count_nonzero(self.live_mask()))

    @classmethod
    def from_mapping(cls, entry: Mapping[str, Any]) -> ShardEntry:
        """The entry that :func:`dataclasses.asdict` made a mapping of."""
        features, index = FileEntry(**entry["features"]), FileEntry(**entry["index"])
        return cls(**{**entry, "features": features, "index": index})


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

    def differences(self, other: Description) -> list[str]:
        """What two stores' making differs in, each with both sides; empty for the same.

        Versions of Python and of what only writes files do not count.
        """
        # By way of JSON, which knows no tuples.
        mine, theirs = (_flat(json.loads(json.dumps(asdict(one)))) for one in (self, other))
        return [
            f"{key}: {_told(mine.get(key))} there, {_told(theirs.get(key))} now"
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key) != theirs.get(key) and key not in _UNIMPORTANT
        ]

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


_UNIMPORTANT = {
    *(f"software.{name}" for name in ("python", "numpy", "pyarrow")),
    *(f"computation.{name}" for name in ("compiled", "least_cosine")),
}


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested mappings as one, the names joined by dots."""
    if not isinstance(value, Mapping):
        return {name: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat.update(_flat(inner, f"{name}.{key}" if name else key))
    return flat


def _told(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass(frozen=True)
class Manifest:
    """``store.json``: what the store holds and how it was made.

    Attributes:
        images: images that the store answers for; rows and failures together.
        listing: SHA-256 of their sorted paths, see :func:`listing_digest`.
        rows: images that have a row; retired rows do not count.
        created: end of the run, ISO 8601 in UTC.
    """

    description: Description
    images: int
    listing: str
    rows: int
    shards: tuple[ShardEntry, ...]
    failures: FileEntry
    created: str = field(compare=False)

    def __post_init__(self) -> None:
        if self.failures.name != FAILURES:
            raise ValueError(f"failures in {self.failures.name!r}")
        total = sum(shard.live_rows for shard in self.shards)
        if total != self.rows or self.rows > self.images:
            raise ValueError(f"{self.rows} rows of {self.images} images, shards hold {total}")
        numbers = [shard.shard for shard in self.shards]
        if numbers != sorted(set(numbers)):
            raise ValueError(f"shards out of order: {numbers}")

    @property
    def failed(self) -> int:
        """Images without a row."""
        return self.images - self.rows

    @property
    def retired(self) -> int:
        """Rows in the files that no longer count."""
        return sum(shard.rows for shard in self.shards) - self.rows

    @property
    def next_shard(self) -> int:
        """The number that no shard has, nor any behind it."""
        return self.shards[-1].shard + 1 if self.shards else 0

    @property
    def checksum(self) -> str:
        """What the last line but one of its text says: SHA-256 of all the rest."""
        return checksum(self.to_json())

    def to_json(self) -> str:
        """The text of ``store.json``, ASCII, with the keys in a fixed order."""
        description = asdict(self.description)
        content = {
            "format": FORMAT,
            "version": VERSION,
            "created": self.created,
            **description,
            "counts": {
                "images": self.images,
                "rows": self.rows,
                "failures": self.failed,
                "retired": self.retired,
            },
            "listing": self.listing,
            "shards": [asdict(shard) for shard in self.shards],
            "failures": asdict(self.failures),
            "checksum": "",
        }
        return with_checksum(json.dumps(content, indent=2, ensure_ascii=True) + "\n")

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
                listing=content["listing"],
                rows=content["counts"]["rows"],
                shards=tuple(ShardEntry.from_mapping(entry) for entry in content["shards"]),
                failures=FileEntry(**content["failures"]),
                created=content["created"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{name} is damaged: {type(error).__name__} {error}") from error


# The last line but one of a manifest.
_CHECKSUM = '  "checksum": "{}"\n'


def checksum(text: str) -> str:
    """SHA-256 of a text without its own checksum, which stands in its last line but one."""
    blank = re.sub(_CHECKSUM.format("[0-9a-f]*") + r"\}\n\Z", _CHECKSUM.format("") + "}\n", text)
    return hashlib.sha256(blank.encode()).hexdigest()


def with_checksum(text: str) -> str:
    """A text that ends with its own checksum, where that was empty before."""
    return text.replace(_CHECKSUM.format(""), _CHECKSUM.format(checksum(text)))


def listing_digest(paths: Iterable[bytes]) -> str:
    """SHA-256 of paths, each ended by a zero byte."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path + b"\0")
    return digest.hexdigest()
