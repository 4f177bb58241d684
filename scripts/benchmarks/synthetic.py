"""Synthetic images and stores of any size, without an image on the disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from extractor.store.claim import ClaimedFolder
from extractor.store.format import (
    JOB,
    Description,
    FileEntry,
    ShardEntry,
    features_name,
    images_name,
    listing_digest,
)
from extractor.store.job import Job
from extractor.store.shard import FinishedShard, done_name
from extractor.store.writer import ExistingStore, InterruptedRun, take_up

__all__ = ["SyntheticImages", "path_of", "paths", "write_store"]

PER_FOLDER = 1000
FORM = b"photos/000000/img_000000000.jpg"
FOLDER_AT, IMAGE_AT = 7, 18  # where the numbers begin
FOLDER_DIGITS, IMAGE_DIGITS = 6, 9
BLOCK = 65_536
THREADS = 2
FIRST_TIME = 1_700_000_000 * 10**9


@dataclass(frozen=True)
class SyntheticImages:
    """Images that exist on paper: what a run would know about each of them.

    Attributes:
        count: Number of images.
        dim: Number of values in one embedding.
        shard_images: Number of images in one shard.
    """

    count: int
    dim: int
    shard_images: int

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.count // self.shard_images)

    def numbers(self, shard: int) -> range:
        """Return the numbers of a shard's images."""
        start = shard * self.shard_images
        return range(start, min(start + self.shard_images, self.count))

    @property
    def description(self) -> Description:
        """Description of their store."""
        weights = {"weights": "random", "tag": "", "sha256": "0" * 64}
        return Description(
            backbone={"model": "synthetic", "library": "", "library_version": "", **weights},
            embedding={
                "definition": "pre-logits",
                "dim": self.dim,
                "shape": [self.dim],
                "dtype": "float16",
                "normalized": False,
            },
            preprocess={"size": [224, 224]},
            computation={"precision": "float32", "device": "cpu", "batch_size": 256},
            root="/synthetic",
            shard_images=self.shard_images,
            software={},
        )

    @property
    def job(self) -> Job:
        """The job that computes them."""
        return Job(self.description, self.count, listing_digest(paths(self.count)))


def path_of(number: int) -> bytes:
    """Return the path of an image."""
    return b"photos/%06d/img_%09d.jpg" % (number // PER_FOLDER, number)


def paths(count: int) -> Iterator[bytes]:
    """Yield the paths of all images, in ascending order."""
    for start in range(0, count, BLOCK):
        content = path_matrix(range(start, min(start + BLOCK, count))).tobytes()
        yield from (content[i : i + len(FORM)] for i in range(0, len(content), len(FORM)))


def path_matrix(numbers: range) -> npt.NDArray[np.uint8]:
    """Return paths as bytes, ``(n, length)``."""
    matrix = np.tile(np.frombuffer(FORM, np.uint8), (len(numbers), 1))
    images = np.arange(numbers.start, numbers.stop)
    parts = (
        (images // PER_FOLDER, FOLDER_AT, FOLDER_DIGITS),
        (images, IMAGE_AT, IMAGE_DIGITS),
    )
    for values, at, digits in parts:
        for i in range(digits):
            matrix[:, at + digits - 1 - i] = values // 10**i % 10 + ord("0")
    return matrix


def status(numbers: range) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return bytes and modification time of files, each ``(n,)``."""
    images = np.arange(numbers.start, numbers.stop, dtype=np.int64)
    # Sizes of photos around 110 KB, without a pattern that compresses well.
    sizes = 50_000 + (images * 2_654_435_761 & 0xFFFFFFFF) % 120_000
    return sizes, FIRST_TIME + images * 1_000_003


def write_store(images: SyntheticImages, out: Path) -> Any:
    """Write the shards of a store as a run leaves them, and return what can publish it.

    Publishing is left to the caller, who measures it.
    """
    claim = ClaimedFolder(out).__enter__()
    state = take_up(claim, images.description)
    assert isinstance(state, ExistingStore)
    state.begin(images.job)
    job = Job.from_json((claim.staging / JOB).read_bytes())
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(lambda shard: _write_shard(images, claim.staging, shard), _all(images)):
            pass
    state = take_up(claim, images.description)
    assert isinstance(state, InterruptedRun)
    run = state.resume(job)
    assert run is not None
    return run


def _all(images: SyntheticImages) -> range:
    return range(images.shards)


def _write_shard(images: SyntheticImages, staging: Path, shard: int) -> None:
    numbers = images.numbers(shard)
    rows = len(numbers)
    random = np.random.default_rng(shard)
    values = random.integers(-1000, 1000, (rows, images.dim), np.int16).astype(np.float16)
    np.save(staging / features_name(shard), values)
    index = staging / images_name(shard)
    pq.write_table(_index(numbers, random), index)
    entry = ShardEntry(
        shard,
        rows,
        rows,
        FileEntry.of(staging / features_name(shard), features_name(shard)),
        FileEntry.of(index, images_name(shard)),
    )
    for file in (features_name(shard), images_name(shard)):
        _sync(staging / file)
    done = FinishedShard(shard, rows, entry, [])
    (staging / done_name(shard)).write_text(done.to_json())


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _index(numbers: range, random: np.random.Generator) -> pa.Table:
    """Return the index of a shard, with the columns that the store gives it."""
    rows = len(numbers)
    offsets = pa.py_buffer((np.arange(rows + 1, dtype=np.int32) * len(FORM)).tobytes())
    names = pa.StringArray.from_buffers(rows, offsets, pa.py_buffer(path_matrix(numbers).tobytes()))
    sizes, mtimes = status(numbers)
    digests = pa.py_buffer(random.bytes(32 * rows))
    return pa.table(
        {
            "path": names,
            "size": pa.array(sizes, pa.int64()),
            "mtime_ns": pa.array(mtimes, pa.int64()),
            "width": pa.array(np.full(rows, 500), pa.int32()),
            "height": pa.array(np.full(rows, 375), pa.int32()),
            "sha256": pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), rows, [None, digests]),
        }
    )
