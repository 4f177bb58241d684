"""Inputs of forward passes: which pictures the specs need, and the loader that decodes them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from extractor.images.types import ImageSource
from extractor.loading.crash_log import CrashLog
from extractor.loading.loader import BatchLoader
from extractor.loading.options import LoaderOptions, default_workers
from extractor.loading.watchdog import MAX_ABANDONED
from extractor.models.embedding import EmbeddingSpec
from extractor.options import Options, default_batch_size
from extractor.preprocess import Preprocess
from extractor.system.cpu import available_cores
from extractor.system.devices import device_errors
from extractor.system.timing import Timer

__all__ = ["Inputs", "batch_size_for", "device_of", "pictures_of"]


def device_of(specs: Sequence[EmbeddingSpec]) -> torch.device:
    """Return the device that computes the specs; all of them share one."""
    return specs[0].backbones[0].device


def pictures_of(specs: Sequence[EmbeddingSpec]) -> list[Preprocess]:
    """Return the pictures that the specs need of each image, each once, in the order of a batch."""
    pictures: dict[object, Preprocess] = {}
    for spec in specs:
        for backbone in spec.backbones:
            pictures.setdefault(backbone.preprocess.picture_key, backbone.preprocess)
    return list(pictures.values())


def batch_size_for(specs: Sequence[EmbeddingSpec], options: Options, device: str = "") -> int:
    """Return the number of images in one forward pass.

    It is at most the size of a shard, which ends a batch. It does not depend on the number of
    images, since the value of a row must not depend on it.

    Args:
        specs: Embeddings of a run.
        options: Options of the run.
        device: Type of the device that computes; that of the specs if empty.
    """
    batch_size = options.batch_size or default_batch_size(device or device_of(specs).type)
    return min(batch_size, options.shard_images or batch_size)


@dataclass(frozen=True)
class Inputs:
    """How images become batches of decoded pictures.

    Attributes:
        options: Options of the run.
        batch_size: Number of images in one batch; shorter batches are padded.
        suspects: Paths of images that are decoded in a process of their own.
        timer: Sums the time of reading and decoding.
        pixel_share: As in :class:`~extractor.loading.options.LoaderOptions`.
        large_image_slot: As there.
    """

    options: Options
    batch_size: int
    suspects: Collection[bytes] = ()
    timer: Timer | None = None
    pixel_share: int | None = None
    large_image_slot: Path | None = None

    def with_batch_size(self, batch_size: int) -> Inputs:
        """Return the same inputs in batches of another size."""
        return replace(self, batch_size=batch_size)

    @property
    def workers(self) -> int:
        """Number of decoding threads."""
        return self.options.workers or default_workers(available_cores(), self.options.decode)

    @property
    def crash_log_slots(self) -> int:
        """Number of images that the threads of one loader can have in hand at a time."""
        return self.workers + MAX_ABANDONED

    @property
    def decode_on_cpu(self) -> str:
        """Decode mode of everything that no GPU decodes."""
        return "exact" if self.options.decode == "gpu" else self.options.decode

    def loader(
        self,
        batches: Iterable[Sequence[ImageSource]],
        specs: Sequence[EmbeddingSpec],
        crash_log: CrashLog | None = None,
        *,
        decode: str | None = None,
    ) -> BatchLoader:
        """Return a loader that decodes batches of images for the specs.

        Args:
            batches: Images of each batch, at most :attr:`batch_size`.
            specs: Embeddings to compute from the pictures.
            crash_log: Keeps the images that are being decoded.
            decode: Decode mode; None decodes everything on the CPU.
        """
        device = device_of(specs)
        with device_errors(device):
            return BatchLoader(
                batches,
                pictures_of(specs),
                LoaderOptions(
                    batch_size=self.batch_size,
                    workers=self.workers,
                    pin=device.type == "cuda",
                    max_pixels=self.options.max_pixels,
                    pixel_share=self.pixel_share,
                    large_image_slot=self.large_image_slot,
                    image_timeout_seconds=self.options.image_timeout,
                    decode_mode=decode or self.decode_on_cpu,
                ),
                suspects=self.suspects,
                crash_log=crash_log,
                timer=self.timer,
            )
