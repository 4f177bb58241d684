"""How many images share a batch and a shard: as in existing stores, else by the run's size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from extractor.compute.inputs import batch_size_for
from extractor.images.listing import ImageList
from extractor.lease.describe import describe
from extractor.models.embedding import EmbeddingSpec
from extractor.options import MAX_BATCH_SIZE, Options
from extractor.store.claim import ClaimedFolder
from extractor.store.job import shard_images_for
from extractor.store.writer import existing_computation

__all__ = ["Sizes", "choose_sizes"]


@dataclass(frozen=True)
class Sizes:
    """How the images of a run are cut into batches and shards.

    Attributes:
        batch_size: Number of images in one batch, the same for all stores.
        shard_images: Number of images in one shard of each store.
    """

    batch_size: int
    shard_images: Sequence[int]

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.batch_size > min(self.shard_images):
            raise ValueError(f"{self}: a batch must fit into a shard")


def choose_sizes(
    specs: Sequence[EmbeddingSpec],
    claims: Sequence[ClaimedFolder],
    images: ImageList,
    options: Options,
    device: str = "",
) -> Sizes:
    """Return the sizes of a run: what was chosen, else that of existing rows.

    A new store is cut as an existing one of the same run, so that both share a pass.

    Args:
        specs: Embedding of each store.
        claims: Folder of each store.
        images: Images of the run.
        options: Options of the run.
        device: Type of the device that computes; that of the specs if empty.

    Raises:
        StoreError: An existing store cannot be read.
    """
    batch_size = batch_size_for(specs, options, device)
    found = [
        existing_computation(claim, describe(spec, options, images.root, batch_size))
        for claim, spec in zip(claims, specs, strict=True)
    ]
    if options.batch_size is None:
        recorded = {each.computation.get("batch_size") for each in found if each is not None}
        (size,) = recorded if len(recorded) == 1 else (None,)
        if isinstance(size, int) and 0 < size <= MAX_BATCH_SIZE:
            batch_size = size
    if options.shard_images is not None:
        sizes = [options.shard_images] * len(specs)
    else:
        existing = [each.shard_images for each in found if each is not None]
        new = existing[0] if existing else shard_images_for(len(images), batch_size)
        sizes = [new if each is None else each.shard_images for each in found]
    return Sizes(min(batch_size, *sizes), sizes)
