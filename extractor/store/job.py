"""The images that a run computes: ``job.json`` in the staging folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from extractor.errors import StoreError
from extractor.store.format import MAX_SHARDS, Description
from extractor.text import plural

__all__ = ["MAX_SHARD_IMAGES", "SHARD_STEP", "Job", "shard_images_for"]

# Sizes of shards that nobody chose are multiples of this, so that batches of up to 1,024 images
# fill them.
SHARD_STEP = 1024
# The most images of such a shard: 512 MiB of 2,048 float32 values, and 15,259 files a billion.
MAX_SHARD_IMAGES = 65_536
# Shards of a store, if that makes them neither too small nor too large. Eight workers have 32 each,
# so that the last ones wait for one thirtieth of the run at most.
SHARDS = 256
# Batches of a shard that its last, shorter one must not be many of.
MIN_BATCHES = 16


def shard_images_for(images: int, batch_size: int) -> int:
    """Return the number of images in one shard of a new store, a multiple of 1,024.

    >>> shard_images_for(1_000_000, batch_size=32)
    4096

    Args:
        images: number of images of the store.
        batch_size: number of images in one batch.
    """
    least = -(-images // SHARDS)
    if SHARD_STEP % batch_size:
        least = max(least, MIN_BATCHES * batch_size)
    return min(max(-(-least // SHARD_STEP), 1) * SHARD_STEP, MAX_SHARD_IMAGES)


@dataclass(frozen=True)
class Job:
    """The images that a run computes; an interrupted run resumes only with an equal job.

    Attributes:
        description: how the embeddings are made.
        images: number of images.
        listing: digest of their paths, :func:`extractor.store.format.listing_digest`.
        first: number of the first new shard.
        base: checksum of the manifest that the run extends; empty for a new store.
        first_id: id of the first row of the first new shard. None if it is not known yet, or if
            version 1 of the format began the run.

    Raises:
        StoreError: more shards than the format allows.
    """

    description: Description
    images: int
    listing: str
    first: int = 0
    base: str = ""
    first_id: int | None = None

    def __post_init__(self) -> None:
        shards = self.first + -(-self.images // self.description.shard_images)
        if shards > MAX_SHARDS:
            existing = f" after {plural(self.first, 'existing shard')}" if self.first else ""
            raise StoreError(
                f"{plural(self.images, 'image')} in shards of {self.description.shard_images}"
                f"{existing} need more than {MAX_SHARDS:,} shards; try a larger --shard-images, or "
                "extract compact"
            )

    def to_json(self) -> str:
        """Return the text of ``job.json``."""
        own = {"images": self.images, "listing": self.listing, "first": self.first}
        content = {**asdict(self.description), **own, "base": self.base}
        if self.first_id is not None:
            content["first_id"] = self.first_id
        return json.dumps(content, ensure_ascii=True) + "\n"

    @classmethod
    def from_json(cls, text: bytes) -> Job:
        """Parse what :meth:`to_json` wrote.

        Raises:
            ValueError: not JSON, or values out of range.
            KeyError: a key is missing.
            TypeError: a value has the wrong type.
        """
        content = json.loads(text)
        described = {key: content[key] for key in Description.__dataclass_fields__}
        own = {key: content[key] for key in ("images", "listing", "first", "base")}
        return cls(Description(**described), **own, first_id=content.get("first_id"))

    def first_id_in_shard(self, shard: int) -> int:
        """Return the id of the first row of a shard, of this run or of one that it follows."""
        return (self.first_id or 0) + (shard - self.first) * self.description.shard_images

    def images_in_shard(self, shard: int) -> int:
        """Return the number of images that fall to one shard."""
        size = self.description.shard_images
        return min(max(self.images - (shard - self.first) * size, 0), size)
