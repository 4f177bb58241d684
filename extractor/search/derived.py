"""Files that were made from a store: where they lie, and which rows an index holds."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from extractor.errors import StoreError
from extractor.search.knn import METRICS, Metric
from extractor.store.atomic import sync, write_atomically
from extractor.store.format import DERIVED, FileEntry, Manifest

__all__ = [
    "KINDS",
    "DerivedNames",
    "IndexEntry",
    "ShardKey",
    "check_file",
    "covers",
    "derived_folders",
    "entries_of",
    "publish_derived",
    "publish_index",
    "publishing",
    "shard_keys",
]

log = logging.getLogger(__name__)

FORMAT = "extractor-index"
VERSION = 1
KINDS = ("flat", "hnsw", "ivf")
SUFFIX = ".index.json"

# Number, SHA-256 of the embeddings, and rows in the file of a shard, retired ones included.
ShardKey = tuple[int, str, int]


@dataclass(frozen=True)
class IndexEntry:
    """What the JSON file beside an index says.

    Attributes:
        folder: Folder of both files.
        kind: ``flat``, ``hnsw`` or ``ivf``.
        metric: Metric that it searches by.
        dim: Number of values in one vector.
        shards: Shards whose rows it holds, in its order.
        file: Name, size and SHA-256 of the index.
        effort: ``efSearch`` of HNSW, ``nprobe`` of IVF; 0 for a flat index.
        recall: Share of the 10 nearest rows that it finds, measured when it was made.
        sample: Number of queries for that measurement.
        faiss: Version of faiss that wrote it.
    """

    folder: Path
    kind: str
    metric: Metric
    dim: int
    shards: tuple[ShardKey, ...]
    file: FileEntry
    effort: int
    recall: float
    sample: int
    faiss: str

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: One is impossible.
        """
        if self.kind not in KINDS or self.metric not in METRICS:
            raise ValueError(f"kind {self.kind!r}, metric {self.metric!r}")
        if os.path.basename(self.file.name) != self.file.name or not self.shards:
            raise ValueError(f"file {self.file.name!r}, {len(self.shards)} shards")

    @property
    def rows(self) -> int:
        """Number of rows in the index, retired ones included."""
        return sum(rows for _, _, rows in self.shards)

    @property
    def path(self) -> Path:
        """File of the index."""
        return self.folder / self.file.name

    @property
    def title(self) -> str:
        """Kind and recall, for people."""
        return f"{self.kind} index (recall@10 {self.recall:.3f})"

    def to_json(self) -> str:
        """Return the content of the JSON file."""
        values = {"format": FORMAT, "version": VERSION, **asdict(self)}
        del values["folder"]
        return json.dumps(values, indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> IndexEntry:
        """Read the JSON file of an index.

        Raises:
            ValueError: It has another form.
            OSError: It cannot be read.
        """
        try:
            if not path.is_file():  # opening a FIFO would wait for its writer
                raise ValueError("no regular file")
            values = json.loads(path.read_bytes())
            if not isinstance(values, dict):
                raise ValueError(f"got {type(values).__name__}, expected an object")
            if (values.pop("format"), values.pop("version")) != (FORMAT, VERSION):
                raise ValueError("another format")
            values["shards"] = tuple((int(n), str(d), int(r)) for n, d, r in values["shards"])
            values["file"] = FileEntry(**values["file"])
            values["effort"], values["recall"] = int(values["effort"]), float(values["recall"])
            return cls(folder=path.parent, **values)
        except KeyError as error:
            raise ValueError(f"it lacks {error}") from error
        except (TypeError, AttributeError) as error:
            raise ValueError(f"a value of another type: {error}") from error


def shard_keys(manifest: Manifest) -> tuple[ShardKey, ...]:
    """Return the shards of a store, as an index names them."""
    return tuple((shard.shard, shard.features.sha256, shard.rows) for shard in manifest.shards)


def covers(entry: IndexEntry, manifest: Manifest) -> bool:
    """Return whether a store still holds all shards of an index."""
    dim = manifest.description.dim
    return entry.dim == dim and set(shard_keys(manifest)).issuperset(entry.shards)


def derived_folders(out: Path) -> tuple[Path, ...]:
    """Return where what is derived from a store may lie: in it, and in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if not cache.is_absolute():  # without HOME, and for a user without a name, "~" stays
        return (out / DERIVED,)
    key = hashlib.sha256(os.fsencode(os.path.realpath(out))).hexdigest()[:32]
    return out / DERIVED, cache / "extractor" / "derived" / key


def entries_of(out: Path) -> list[IndexEntry]:
    """Return all indexes of a store; a JSON file that is none is left out with a warning."""
    entries = []
    for folder in derived_folders(out):
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            try:
                entries.append(IndexEntry.read(path))
            except (OSError, ValueError) as error:
                log.warning("%s is left out: it describes no index (%s)", path, error)
    return entries


def check_file(path: Path, file: FileEntry) -> str:
    """Return why a file cannot be used; empty if it is as it was written.

    faiss parses files in C++, where other content may do anything.
    """
    try:
        if path.stat().st_size != file.bytes:
            return "its size changed"
        return "" if FileEntry.of(path, file.name) == file else "it was changed"
    except OSError as error:
        return error.strerror or str(error)


def publish_index(out: Path, write: Callable[[Path], None], entry: IndexEntry) -> IndexEntry:
    """Write an index and the JSON file beside it, which appears last.

    The name of the index holds its SHA-256, so that a reader of the old one keeps it.

    Args:
        out: Folder of the store.
        write: Writes the index to a file.
        entry: What is known about the index; its folder and its file are replaced.

    Returns:
        The entry as it was written.

    Raises:
        StoreError: It cannot be written, neither to the store nor to the cache.
    """
    described = entry

    def describe(folder: Path, file: FileEntry) -> str:
        nonlocal described
        described = replace(entry, folder=folder, file=file)
        return described.to_json()

    names = DerivedNames(f"{entry.kind}-{entry.metric}", ".faiss", SUFFIX)
    publish_derived(out, write, names, describe, "index")
    return described


@dataclass(frozen=True)
class DerivedNames:
    """Names of a derived file, and of the JSON file beside it.

    Attributes:
        stem: What both begin with, such as ``hnsw-cosine``.
        suffix: End of the file, such as ``.faiss``.
        json_suffix: End of the JSON file, such as ``.index.json``.
    """

    stem: str
    suffix: str
    json_suffix: str


def publish_derived(
    out: Path,
    write: Callable[[Path], None],
    names: DerivedNames,
    describe: Callable[[Path, FileEntry], str],
    what: str,
) -> None:
    """Write a file and the JSON file beside it, which appears last; remove older ones.

    The name of the file holds its SHA-256, so that a reader of the old one keeps it.

    Args:
        out: Folder of the store.
        write: Writes the file.
        names: Names of both.
        describe: Returns the content of the JSON file, from the folder and the file.
        what: What the file is, for messages.

    Raises:
        StoreError: It cannot be written, neither to the store nor to the cache.
    """
    problem = ""
    for folder in derived_folders(out):
        try:
            with _temporary(folder) as partial:
                write(partial)
                with partial.open("rb") as file:
                    sync(file.fileno())
                found = FileEntry.of(partial, "")
                found = replace(found, name=f"{names.stem}-{found.sha256[:16]}{names.suffix}")
                content = describe(folder, found).encode()
                with publishing(folder):
                    os.replace(partial, folder / found.name)
                    write_atomically(folder / f"{names.stem}{names.json_suffix}", content)
                    for path in folder.glob(f"{names.stem}-*{names.suffix}"):
                        if path.name != found.name:
                            with contextlib.suppress(OSError):
                                path.unlink()
        except OSError as error:
            problem = problem or f"{folder}: {error.strerror or error}"
            continue
        return
    raise StoreError(f"the {what} cannot be written ({problem}); free some room, or try again")


@contextlib.contextmanager
def publishing(folder: Path) -> Iterator[None]:
    """Wait until no other process publishes to a folder; where that cannot be locked, go on.

    Without this, two at once remove each other's files.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """Yield the path of a new file in a folder; remove it if it is still there.

    A lock says that its writer lives, so that the next one removes what a killed process left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with publishing(folder):  # nobody finds the new file before it is locked
        for path in folder.glob("tmp*.partial"):
            _remove_abandoned(path)
        handle, name = tempfile.mkstemp(prefix="tmp", suffix=".partial", dir=folder)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        os.chmod(name, 0o644)
        yield Path(name)
    finally:
        os.close(handle)
        Path(name).unlink(missing_ok=True)


def _remove_abandoned(path: Path) -> None:
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        finally:
            os.close(handle)
