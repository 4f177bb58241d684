"""Decoded images of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from extractor.images.types import EncodedJpeg, Failure, ImageInfo, ImageSource

if TYPE_CHECKING:
    import torch

__all__ = ["Batch", "BatchOwner"]


class BatchOwner(Protocol):
    """The part of the loader that a batch calls."""

    def release(self, batch: Batch) -> None:
        """Take back the buffers of a batch."""

    def resting(self, cores: int) -> AbstractContextManager[None]:
        """Let as many decoding threads rest during a block."""

    def decode_on_host(self) -> None:
        """Leave no more images encoded."""


class Batch:
    """Decoded images of one forward pass, in the order of the plan.

    Attributes:
        pictures: For each preprocessing ``(B, H, W, 3)`` uint8 RGB in host memory, where B is the
            fixed batch size. Rows of failed images and rows after the last image are black. Valid
            until :meth:`release`.
        outcomes: For each image its facts, or the failure; at most B of them.
        encoded: Images by index that are left for the GPU to decode. Their rows are black.
        sources: Images of the batch, in order.
        rows: The pictures as arrays.
    """

    def __init__(
        self,
        pictures: tuple[torch.Tensor, ...],
        sources: Sequence[ImageSource],
        owner: BatchOwner,
    ) -> None:
        self.pictures = pictures
        self.outcomes: list[ImageInfo | Failure | None] = [None] * len(sources)
        self.encoded: dict[int, EncodedJpeg] = {}
        self.sources = sources
        self.rows: list[npt.NDArray[np.uint8]] = [picture.numpy() for picture in pictures]
        for rows in self.rows:
            rows[len(sources) :] = 0
        self._claimed = 0
        self._pending = len(sources)
        self._owner = owner

    @property
    def has_unclaimed(self) -> bool:
        """Whether an image is left that no thread has claimed."""
        return self._claimed < len(self.sources)

    @property
    def is_complete(self) -> bool:
        """Whether every image has an outcome."""
        return self._pending == 0

    @property
    def encoded_bytes(self) -> int:
        """Size of all images that are left encoded."""
        return sum(len(image.file.content) for image in self.encoded.values())

    def claim(self) -> int:
        """Return the index of the next image that no thread has claimed."""
        self._claimed += 1
        return self._claimed - 1

    def settle(
        self, index: int, outcome: ImageInfo | Failure, encoded: EncodedJpeg | None = None
    ) -> None:
        """Record the outcome of an image, which may be left encoded."""
        self.outcomes[index] = outcome
        self._pending -= 1
        if encoded is not None:
            self.encoded[index] = encoded
        if isinstance(outcome, Failure) or encoded is not None:
            for rows in self.rows:
                rows[index] = 0

    def move_to(self, pictures: tuple[torch.Tensor, ...]) -> None:
        """Copy the pictures to new buffers; an abandoned thread may write to the old ones."""
        for picture, rows in zip(pictures, self.rows, strict=True):
            picture.numpy()[...] = rows
        self.pictures = pictures
        self.rows = [picture.numpy() for picture in pictures]

    def alone_on(self, cores: int) -> AbstractContextManager[None]:
        """Let as many decoding threads rest during the block, after their current images."""
        return self._owner.resting(cores)

    def decode_on_host(self) -> None:
        """Make the loader decode all images of later batches itself."""
        self._owner.decode_on_host()

    def release(self) -> None:
        """Give the buffers back. ``pictures`` will be overwritten from now on."""
        self._owner.release(self)
        self.encoded = {}
