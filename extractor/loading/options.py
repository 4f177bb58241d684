"""Options of the loader."""

from __future__ import annotations

import os
from dataclasses import dataclass

from extractor.options import Options

__all__ = ["LoaderOptions", "default_workers"]

# Threads take turns at Python's lock about twenty times for an image, and a turn of one of many
# takes long. Photos of 500 x 375 on 16 cores of a virtual machine with an H200: 360 images/s with
# one thread, 930 with 4, 1,095 with 8, 768 with 15. Eight processes of two threads: 4,679.
MAX_DEFAULT_WORKERS = 8

# Threads that only read files for a GPU that decodes.
MAX_DEFAULT_READERS = 4

_DEFAULT = Options()


@dataclass(frozen=True)
class LoaderOptions:
    """Options of :class:`extractor.loading.loader.BatchLoader`.

    Attributes:
        batch_size: Rows of every batch, however many images it holds.
        workers: Number of decoding threads, at least 1.
        pin: Whether to page-lock the buffers, so that copies to a CUDA device overlap computation.
        max_pixels: Limit on the pixels of an image. A larger image fails.
        pixel_share: Limit on the pixels in all decoders of this process together; ``max_pixels`` if
            None. A larger image takes all of it.
        large_image_slot: File that stands for the slot of this machine: of all processes that name
            it, only one decodes an image above its share at a time. None if there is one process.
        image_timeout_seconds: Time after which an image fails and its thread is abandoned.
        decode_mode: ``scaled`` or ``exact``, see :func:`extractor.images.decode.decode_into`.
            ``gpu`` leaves plain JPEGs encoded, and decodes all other images exactly.
    """

    batch_size: int
    workers: int
    pin: bool = False
    max_pixels: int = _DEFAULT.max_pixels
    pixel_share: int | None = None
    large_image_slot: str | os.PathLike[str] | None = None
    image_timeout_seconds: float = _DEFAULT.image_timeout
    decode_mode: str = _DEFAULT.decode

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("batch_size", "workers", "pixel_share"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")


def default_workers(cores: int, decode: str) -> int:
    """Return the number of decoding threads of a process.

    Args:
        cores: Number of cores that the process may use.
        decode: Decode mode, see :class:`LoaderOptions`.
    """
    return max(min(cores, MAX_DEFAULT_READERS if decode == "gpu" else MAX_DEFAULT_WORKERS), 1)
