"""Options of the loader."""

from __future__ import annotations

from dataclasses import dataclass

from extractor.options import Options

__all__ = ["LoaderOptions"]

_DEFAULT = Options()


@dataclass(frozen=True)
class LoaderOptions:
    """Options of :class:`extractor.loading.loader.BatchLoader`.

    Attributes:
        batch_size: Rows of every batch, however many images it holds.
        workers: Number of decoding threads, at least 1.
        pin: Whether to page-lock the buffers, so that copies to a CUDA device overlap computation.
        max_pixels: Limit on the pixels in all decoders together. A larger image fails.
        image_timeout_seconds: Time after which an image fails and its thread is abandoned.
        decode_mode: ``scaled`` or ``exact``, see :func:`extractor.images.decode.decode_into`.
            ``gpu`` leaves plain JPEGs encoded, and decodes all other images exactly.
    """

    batch_size: int
    workers: int
    pin: bool = False
    max_pixels: int = _DEFAULT.max_pixels
    image_timeout_seconds: float = _DEFAULT.image_timeout
    decode_mode: str = _DEFAULT.decode

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, value in (("batch_size", self.batch_size), ("workers", self.workers)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
