"""Decoding with a time limit, for pictures to look at: :func:`decode_within`."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from extractor.errors import DecodeError
from extractor.images.budget import PixelBudget
from extractor.images.decode import decode_into
from extractor.images.types import ImageInfo, ImageSource
from extractor.preprocess import Preprocess
from extractor.system.running_clock import LOOK_SECONDS, running_seconds

__all__ = ["IMAGE_SECONDS", "decode_within"]

IMAGE_SECONDS = 20.0  # for one picture
# Each hanging decoder keeps a thread and its pictures. So many of them mean that the disk hangs.
MAX_HANGING = 32

_hanging: list[tuple[threading.Thread, ImageSource]] = []
_lock = threading.Lock()


def decode_within(
    source: ImageSource,
    preprocesses: Sequence[Preprocess],
    outs: Sequence[npt.NDArray[np.uint8]],
    budget: PixelBudget | None = None,
    seconds: float | None = None,
) -> ImageInfo:
    """Decode an image like :func:`decode_into`, and give up if its decoder or its disk hangs.

    The decoder then keeps a thread, which does not keep the process from ending.

    Args:
        source: As for :func:`decode_into`.
        preprocesses: Transforms.
        outs: Pictures, which are written only if the image is decoded in time.
        budget: Limit on pixels, as for :func:`decode_into`.
        seconds: Time limit; None for :data:`IMAGE_SECONDS`.

    Raises:
        DecodeError: The image cannot be decoded. The reason is ``timeout`` if it takes too long, or
            if too many others hang.
    """
    limit = IMAGE_SECONDS if seconds is None else seconds
    _check_hanging(source, limit)
    pictures = [np.empty_like(out) for out in outs]  # a late decoder must not write to ``outs``
    outcome: list[ImageInfo | BaseException] = []

    def work() -> None:
        try:
            outcome.append(decode_into(source, preprocesses, pictures, budget))
        except BaseException as error:  # raised again where the caller waits
            outcome.append(error)

    thread = threading.Thread(target=work, name="picture", daemon=True)
    started = running_seconds()
    thread.start()
    while thread.is_alive():
        thread.join(min(LOOK_SECONDS, limit))
        if thread.is_alive() and running_seconds() - started >= limit:
            with _lock:
                _hanging.append((thread, source))
            raise DecodeError("timeout", f"not decoded within {limit:g} s")
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    for out, picture in zip(outs, pictures, strict=True):
        out[...] = picture
    return outcome[0]


def _check_hanging(source: ImageSource, seconds: float) -> None:
    """Refuse a file whose decoder still hangs, and any image if many do.

    Raises:
        DecodeError: It is refused.
    """
    with _lock:
        _hanging[:] = [(thread, each) for thread, each in _hanging if thread.is_alive()]
        is_path = isinstance(source, (str, bytes, os.PathLike))
        if is_path and any(each == source for _, each in _hanging if type(each) is type(source)):
            raise DecodeError("timeout", f"not decoded within {seconds:g} s")
        if len(_hanging) >= MAX_HANGING:
            raise DecodeError(
                "timeout", f"{len(_hanging)} other images hang; check that their disk responds"
            )
