"""File names and manifest of a store on disk (``docs/store-format.md``)."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import math
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from extractor.errors import StoreDamagedError, StoreError
from extractor.system.hashing import hash_file

__all__ = [
    "DEFAULTS",
    "DERIVED",
    "FAILURES",
    "FEATURES",
    "HISTORY",
    "IMAGES",
    "IN_FLIGHT",
    "JOB",
    "JOURNAL",
    "LIST_ROWS",
    "MANIFEST",
    "MAX_SHARDS",
    "PLAN",
    "PLAN_PATHS",
    "REPLACED",
    "RUN",
    "STAGING",
    "SUSPECTS",
    "TRANSFORM",
    "WORKERS",
    "DamagedManifestError",
    "Description",
    "Difference",
    "FileEntry",
    "Manifest",
    "ShardEntry",
    "checksum",
    "features_name",
    "images_name",
    "listing_digest",
    "mask_of",
    "ranges",
    "with_checksum",
]

FORMAT = "extractor-store"
VERSION = 2  # what is written
VERSIONS = (1, 2)  # what is read
MAX_SHARDS = 100_000  # shard names have five digits, so that name order is row order

MANIFEST = "store.json"
FEATURES = "features"
IMAGES = "images"
FAILURES = "failures.jsonl"
HISTORY = "history.jsonl"
LIST_ROWS = "list_rows.npy"
RUN = "run.json"
# Arrays of the transform that made the rows, if one did.
TRANSFORM = ("transform_mean.npy", "transform_components.npy", "transform_scales.npy")
# Folder of what was made from the rows, such as an index. It is no part of the store: programs may
# delete it, and a store may be copied without it.
DERIVED = "derived"
# The staging folder, in which a run builds its shards. It is hidden, so that no tool mistakes it
# for a result.
STAGING = ".extractor-partial"
# Names inside the staging folder.
JOB = "job.json"  # what the run computes
JOURNAL = "journal"  # folder: finished batches of each shard
PLAN = "plan.json"  # what the parts of a job array share
PLAN_PATHS = "plan"  # folder: paths of the images of that plan
IN_FLIGHT = "in-flight"  # images that are being decoded
SUSPECTS = "suspects.json"  # images during whose decoding a run died
WORKERS = "workers"  # folder: what driver and workers of a run share
REPLACED = "replaced.json"  # the old manifest, while the new store is published


class DamagedManifestError(StoreDamagedError):
    """The manifest of a store, of this version, that cannot be read."""


def features_name(shard: int) -> str:
    """Return the name of a shard's embeddings in the store: ``features/00000.npy``."""
    return f"{FEATURES}/{shard:05d}.npy"


def images_name(shard: int) -> str:
    """Return the name of a shard's image index in the store: ``images/00000.parquet``."""
    return f"{IMAGES}/{shard:05d}.parquet"


def ranges(mask: npt.NDArray[np.bool_]) -> str:
    """Return the indices of the true values as text.

    >>> ranges(np.array([True, False, True, True, True]))
    '0,2-4'
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    pairs = edges.reshape(-1, 2).tolist()
    return ",".join(f"{a}" if b == a + 1 else f"{a}-{b - 1}" for a, b in pairs)


def mask_of(text: str, count: int) -> npt.NDArray[np.bool_]:
    """Return the mask ``(count,)`` that :func:`ranges` turned into text.

    >>> mask_of("0,2-4", 6).tolist()
    [True, False, True, True, True, False]

    Raises:
        ValueError: The text has another form.
    """
    mask = np.zeros(count, bool)
    last = -1
    for part in filter(None, text.split(",")):
        first, dash, end = part.partition("-")
        start, stop = int(first), int(end if dash else first) + 1
        if not last < start < stop <= count:
            raise ValueError(f"got {part!r} in {text!r}, expected ascending ranges below {count}")
        mask[start:stop] = True
        last = stop
    return mask


@dataclass(frozen=True)
class FileEntry:
    """One file of the store: its name in the store, its size and its SHA-256."""

    name: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, name: str) -> FileEntry:
        """Read a file and return its entry under a name."""
        with path.open("rb") as file:
            digest, size = hash_file(file)
        return cls(name, size, digest.hex())


@dataclass(frozen=True)
class ShardEntry:
    """One shard: its images, its rows and its files.

    Attributes:
        shard: number in the file names, counted from 0 over all planned shards.
        images: number of images of this shard, failed ones included.
        rows: number of images with a row; at least 1, since a shard without rows has no files.
        features: file of the embeddings.
        index: file of the image index.
        retired: rows that no longer count, as ranges such as ``"0,7-12"``, because their images
            changed or are gone.
        first_id: id of the first row in the files; the others count up from there. None if the
            index holds the ids.
    """

    shard: int
    images: int
    rows: int
    features: FileEntry
    index: FileEntry
    retired: str = ""
    first_id: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= self.images:
            raise ValueError(f"shard {self.shard}: {self.rows} rows of {self.images} images")
        names = (features_name(self.shard), images_name(self.shard))
        if (self.features.name, self.index.name) != names:
            raise ValueError(f"shard {self.shard}: files {self.features.name}, {self.index.name}")
        self.live_mask()

    def live_mask(self) -> npt.NDArray[np.bool_]:
        """Return a mask ``(rows,)`` of the rows that count.

        Raises:
            ValueError: :attr:`retired` is not in the form that :func:`ranges` writes.
        """
        return ~mask_of(self.retired, self.rows)

    @functools.cached_property
    def live_rows(self) -> int:
        """Number of rows that count."""
        return int(np.count_nonzero(self.live_mask()))

    def to_mapping(self, *, with_ids: bool = False) -> dict[str, Any]:
        """Return a mapping for JSON, with or without :attr:`first_id`."""
        values = asdict(self)
        if not with_ids:
            del values["first_id"]
        return values

    @classmethod
    def from_mapping(cls, entry: Mapping[str, Any]) -> ShardEntry:
        """Return the entry that :meth:`to_mapping` made."""
        features, index = FileEntry(**entry["features"]), FileEntry(**entry["index"])
        return cls(**{**entry, "features": features, "index": index})


@dataclass(frozen=True)
class Description:
    """Everything that is known about a store before its first row, enough to repeat its vectors.

    Attributes:
        backbone: model, library, version, weights with tag and digest, replaced heads.
        embedding: definition, dim, shape, dtype, and whether it is scaled to unit length.
        preprocess: the evaluation transform.
        computation: precision, device and batch size.
        root: folder that paths are relative to; bytes that are not UTF-8 as lone surrogates.
        shard_images: number of images in one shard.
        software: versions of Python and the libraries.
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
        if self.transform is not None:
            names = [entry.name for entry in self.transform_files]
            if names != [name for name in TRANSFORM if name in names]:
                raise ValueError(f"transform: files {names}")
            self.before_transform  # noqa: B018  (it checks itself)

    def differences(self, other: Description) -> list[Difference]:
        """Return what differs in the description of later rows, so that they do not fit.

        A key that one side lacks has its value in :data:`DEFAULTS`, else None. Names of weights do
        not count if their SHA-256 is the same. Nor do versions of software, the name of a GPU, the
        root, and which stores a transform was fitted on and applied to.
        """
        mine, theirs = self._flat(), other._flat()
        return [
            difference
            for difference in _differences(mine, theirs)
            if difference.setting not in _MAY_DIFFER
            and not difference.key.startswith(_MAY_DIFFER_BELOW)
            and not _is_name_of_same_weights(difference.key, mine, theirs)
        ]

    def software_changes(self, other: Description) -> list[Difference]:
        """Return the software whose version differs in the description of later rows.

        Another GPU counts, too, unless one of the descriptions does not name its own.
        """
        mine, theirs = (
            {f"software.{name}": version for name, version in side.software.items()}
            for side in (self, other)
        )
        gpus = [side.computation.get("device_name") for side in (self, other)]
        if all(gpus):
            mine["computation.device_name"], theirs["computation.device_name"] = map(str, gpus)
        return _differences(mine, theirs)

    def _flat(self) -> dict[str, Any]:
        # JSON has no tuples, so it makes tuples and lists equal.
        return _flat(json.loads(json.dumps(asdict(self))))

    @property
    def dim(self) -> int:
        """Number of values in one embedding."""
        return int(self.embedding["dim"])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one embedding: ``(dim,)``, or the axes of a map or of tokens."""
        return tuple(int(axis) for axis in self.embedding["shape"])

    @property
    def dtype(self) -> str:
        """Type of the stored values, ``float32`` or ``float16``."""
        return str(self.embedding["dtype"])

    @property
    def transform(self) -> Mapping[str, Any] | None:
        """What ``extract transform`` did to rows of another store; None if it did not."""
        transform: Mapping[str, Any] | None = self.embedding.get("transform")
        return transform

    @property
    def transform_files(self) -> tuple[FileEntry, ...]:
        """Arrays of the transform; none if it fitted nothing."""
        files = self.transform["files"] if self.transform is not None else ()
        return tuple(FileEntry(**entry) for entry in files)

    @property
    def before_transform(self) -> Description:
        """Description of the rows before the transform; the same one if there is none."""
        if self.transform is None:
            return self
        embedding = {**self.embedding, **self.transform["of"]}
        del embedding["transform"]
        return replace(self, embedding=embedding)

    @property
    def model(self) -> str:
        """Full name of the model, such as ``timm:resnet50``."""
        return str(self.backbone["model"])

    @property
    def made_with(self) -> str:
        """Short text that names the model and its weights."""
        weights = self.backbone.get("tag") or self.backbone.get("weights")
        return f"{self.model} ({weights}, sha256 {str(self.backbone.get('sha256'))[:12]})"


@dataclass(frozen=True)
class Difference:
    """A key with two values in two descriptions.

    Attributes:
        key: names of nested keys, joined by dots, such as ``backbone.parts.0.sha256``.
        before: value in the description of the existing rows.
        now: value in the description of the new rows.
    """

    key: str
    before: Any
    now: Any

    @property
    def setting(self) -> str:
        """The key without the number of a joined backbone, such as ``backbone.sha256``."""
        return _without_part(self.key)

    @property
    def name(self) -> str:
        """Last part of the key, such as ``sha256``."""
        return self.key.rpartition(".")[2]

    def __str__(self) -> str:
        return f"{self.key}: {_shorten(self.before)} there, {_shorten(self.now)} now"


# Values of keys that a description lacks because the program that wrote it did not know them: what
# that program did, which is the default of the option that came with the key. Keys of joined
# backbones have no number here. A key whose default is None needs no entry.
DEFAULTS: Mapping[str, Any] = {
    "backbone.code": "",
}

# Keys that may differ between the runs on a store.
_MAY_DIFFER = frozenset(
    {
        "root",
        "backbone.library_version",
        "computation.compiled",
        "computation.device_name",
        "computation.least_cosine",
    }
)
_MAY_DIFFER_BELOW = ("software.", "embedding.transform.source", "embedding.transform.fit")
# Keys that name weights. The SHA-256 beside them tells whether the weights are the same.
_WEIGHTS_NAMES = frozenset({"weights", "tag", "source", "revision"})
# Models named by the folder or the repository that describes them, which may move.
_LOCATIONS = ("local-dir:", "hf-hub:")


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    differences = []
    for key in sorted(before.keys() | now.keys()):
        default = DEFAULTS.get(_without_part(key))
        old, new = before.get(key, default), now.get(key, default)
        if old != new:
            differences.append(Difference(key, old, new))
    return differences


def _is_name_of_same_weights(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    if key == "backbone.model" and "backbone.parts.0.sha256" in before.keys() & now.keys():
        return True  # joined from the names of the parts, which have keys of their own
    if _without_part(key) == "embedding.model":
        return True  # a name in backbone, again
    owner, _, name = key.rpartition(".")
    digest = before.get(f"{owner}.sha256")
    if not digest or digest != now.get(f"{owner}.sha256"):
        return False
    if name == "model":
        return all(str(side.get(key)).startswith(_LOCATIONS) for side in (before, now))
    return name in _WEIGHTS_NAMES


def _without_part(key: str) -> str:
    return re.sub(r"\.parts\.\d+", "", key)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Flatten nested mappings and the lists of joined backbones; names are joined by dots."""
    if name.endswith(".parts") and isinstance(value, list):
        value = {str(number): part for number, part in enumerate(value)}
    if not isinstance(value, Mapping):
        return {name: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat.update(_flat(inner, f"{name}.{key}" if name else key))
    return flat


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass(frozen=True)
class Manifest:
    """``store.json``: what the store holds and how it was made.

    Attributes:
        description: how the embeddings were made.
        images: number of images, rows and failures together.
        listing: SHA-256 of their sorted paths, see :func:`listing_digest`.
        rows: number of images with a row; retired rows do not count.
        shards: the shards in the order of their numbers.
        failures: file that lists the images without a row.
        created: end of the run, ISO 8601 in UTC.
        list_rows: file with the row of each line of the list, see ``--keep-order``; None if the
            last run that changed the store did not write one.
        vanished: number of rows that are kept although their images are gone.
        history: file of the ids that the last runs added and removed; None in version 1.
        next_id: lowest number that is free for the id of a later row.
        version: version of the format, 1 for a store that no run has changed since.
    """

    description: Description
    images: int
    listing: str
    rows: int
    shards: tuple[ShardEntry, ...]
    failures: FileEntry
    created: str = field(compare=False)
    list_rows: FileEntry | None = None
    vanished: int = 0
    history: FileEntry | None = None
    next_id: int = 0
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.history is not None and self.history.name != HISTORY:
            raise ValueError(f"history in {self.history.name!r}")
        if self.list_rows is not None and self.list_rows.name != LIST_ROWS:
            raise ValueError(f"rows of a list in {self.list_rows.name!r}")
        if self.failures.name != FAILURES:
            raise ValueError(f"failures in {self.failures.name!r}")
        total = sum(shard.live_rows for shard in self.shards)
        if total != self.rows or self.rows > self.images:
            raise ValueError(f"{self.rows} rows of {self.images} images, shards hold {total}")
        numbers = [shard.shard for shard in self.shards]
        if numbers != sorted(set(numbers)):
            raise ValueError(f"shards out of order: {numbers}")
        first = 0
        for shard in self.shards:
            if shard.first_id is not None:
                if shard.first_id < first:
                    raise ValueError(
                        f"shard {shard.shard}: first id {shard.first_id} below {first}"
                    )
                first = shard.first_id + shard.rows
        if first > self.next_id:
            raise ValueError(f"next id {self.next_id}, but shards hold ids below {first}")

    @property
    def failed(self) -> int:
        """Number of images without a row."""
        return self.images - self.rows

    @property
    def retired(self) -> int:
        """Number of rows in the files that no longer count."""
        return sum(shard.rows for shard in self.shards) - self.rows

    @property
    def shard_files(self) -> list[FileEntry]:
        """Arrays and indexes of all shards."""
        return [entry for shard in self.shards for entry in (shard.features, shard.index)]

    @property
    def files(self) -> list[FileEntry]:
        """Every file of the store except the manifest itself."""
        optional = (self.list_rows, self.history)
        return [*self.kept_files, self.failures, *filter(None, optional)]

    @property
    def kept_files(self) -> list[FileEntry]:
        """Files that a store keeps as it grows: those of the shards and of the transform."""
        return [*self.shard_files, *self.description.transform_files]

    @property
    def next_shard(self) -> int:
        """Number of the shard that the next run begins with."""
        return self.shards[-1].shard + 1 if self.shards else 0

    @property
    def checksum(self) -> str:
        """SHA-256 of the text without its checksum line, as that line gives it."""
        return checksum(self.to_json())

    def to_json(self) -> str:
        """Return the text of ``store.json``, ASCII, with the keys in a fixed order."""
        description = asdict(self.description)
        has_ids = self.version > 1
        content = {
            "format": FORMAT,
            "version": self.version,
            "created": self.created,
            **description,
            "counts": {
                "images": self.images,
                "rows": self.rows,
                "failures": self.failed,
                "retired": self.retired,
                **({"vanished": self.vanished} if self.vanished else {}),
            },
            "listing": self.listing,
            "shards": [shard.to_mapping(with_ids=has_ids) for shard in self.shards],
            "failures": asdict(self.failures),
            **({} if self.list_rows is None else {"list_rows": asdict(self.list_rows)}),
            **({} if self.history is None else {"history": asdict(self.history)}),
            **({"next_id": self.next_id} if has_ids else {}),
            "checksum": "",
        }
        return with_checksum(json.dumps(content, indent=2, ensure_ascii=True) + "\n")

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read the manifest in a file.

        Raises:
            StoreDamagedError: not a manifest.
            StoreError: a manifest of an unknown format version.
            OSError: the file cannot be read.
        """
        if stat.S_ISFIFO(path.stat().st_mode):  # reading it would wait for a writer
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return cls.from_json(path.read_bytes(), str(path))

    @classmethod
    def from_json(cls, text: str | bytes, name: str) -> Manifest:
        """Parse the text of ``store.json``.

        Args:
            text: what :meth:`to_json` wrote.
            name: path of the file, for error messages.

        Raises:
            StoreDamagedError: not a manifest.
            StoreError: a manifest of an unknown format version.
        """
        try:
            content = json.loads(text)
        except ValueError as error:
            raise DamagedManifestError(
                f"{name} is not JSON ({error}); the store is damaged"
            ) from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise StoreDamagedError(
                f'{name} is not the manifest of a store: expected "format": "{FORMAT}"'
            )
        version = content.get("version")
        if version not in VERSIONS:
            raise StoreError(
                f"{name} has format version {version!r}; this program reads "
                f"versions {VERSIONS[0]} to {VERSIONS[-1]}, try a newer release"
            )
        try:
            shards = tuple(ShardEntry.from_mapping(entry) for entry in content["shards"])
            if version == 1:
                shards = _numbered(shards)
            return cls(
                description=Description(
                    **{key: content[key] for key in Description.__dataclass_fields__}
                ),
                images=content["counts"]["images"],
                listing=content["listing"],
                rows=content["counts"]["rows"],
                shards=shards,
                failures=FileEntry(**content["failures"]),
                created=content["created"],
                list_rows=FileEntry(**content["list_rows"]) if "list_rows" in content else None,
                vanished=content["counts"].get("vanished", 0),
                history=FileEntry(**content["history"]) if "history" in content else None,
                next_id=content["next_id"] if version > 1 else sum(s.rows for s in shards),
                version=version,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedManifestError(
                f"{name} is damaged: {type(error).__name__} {error}"
            ) from error


def _numbered(shards: Iterable[ShardEntry]) -> tuple[ShardEntry, ...]:
    """Return shards with ids that count the rows in their files; version 1 has no others."""
    numbered = []
    first = 0
    for shard in shards:
        numbered.append(replace(shard, first_id=first))
        first += shard.rows
    return tuple(numbered)


# The second-last line of a manifest.
_CHECKSUM = '  "checksum": "{}"\n'


def checksum(text: str) -> str:
    """Return the SHA-256 of a text without its own checksum in the second-last line."""
    blank = re.sub(_CHECKSUM.format("[0-9a-f]*") + r"\}\n\Z", _CHECKSUM.format("") + "}\n", text)
    return hashlib.sha256(blank.encode()).hexdigest()


def with_checksum(text: str) -> str:
    """Fill in the empty checksum of a text."""
    return text.replace(_CHECKSUM.format(""), _CHECKSUM.format(checksum(text)))


def listing_digest(paths: Iterable[bytes]) -> str:
    """Return the SHA-256 of paths, each followed by a zero byte."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path + b"\0")
    return digest.hexdigest()
