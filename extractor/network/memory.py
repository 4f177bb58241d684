"""Memory of a forward pass on a CPU, estimated without computing anything.

A CPU that runs out of memory does not say so: the kernel ends the process.
"""

from __future__ import annotations

import copy
import logging
import warnings
import weakref
from typing import NamedTuple, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from extractor.system.memory import free_memory
from extractor.system.process_tuning import return_freed_memory
from extractor.text import first_line

__all__ = ["USABLE", "Fit", "images_that_fit"]

log = logging.getLogger(__name__)

# Largest memory of a pass that needs no estimate, in sizes of its pixels in float32. resnet50 takes
# 13, mobilenetv3_large_100 9, vgg16 about 50.
UNESTIMATED = 64

# Share of the free memory that feature maps may take. The rest is for what the estimate does not
# see: decoded images, and what kernels of oneDNN hold for themselves.
USABLE = 0.7


class Fit(NamedTuple):
    """How many images can be computed at a time.

    Attributes:
        images: That number; 0 if the memory does not suffice for one.
        image_bytes: Memory for one image; 0 if it was not estimated.
        free_bytes: Memory that this process may still use.
    """

    images: int
    image_bytes: int
    free_bytes: float


class Embedder(Protocol):
    """Something with a network that can be copied."""

    module: nn.Module

    def embed(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the network."""


# By network and image size: the estimate of the network before it was fused or converted, which
# takes no less.
_known: weakref.WeakKeyDictionary[nn.Module, dict[tuple[int, int], int]]
_known = weakref.WeakKeyDictionary()


def images_that_fit(
    embedder: Embedder, size: tuple[int, int], wanted: int, *, reserved_bytes: int = 0
) -> Fit:
    """Return how many images a CPU can compute at a time, at most ``wanted``.

    The estimate takes about a second. It is made once for a network and a size, and only if the
    pixels are large compared with the free memory. Fusing a network makes it impossible, so ask
    before.

    Args:
        embedder: Has the network.
        size: (height, width) of the images.
        wanted: Number of images.
        reserved_bytes: Memory that other things will take.
    """
    free = free_memory()
    usable = USABLE * free - reserved_bytes
    pixel_bytes = 3 * size[0] * size[1] * torch.float32.itemsize
    if wanted * pixel_bytes * UNESTIMATED <= usable:
        return Fit(wanted, 0, free)
    known = _known.setdefault(embedder.module, {})
    if size not in known:
        known[size] = _bytes_of_pass(embedder, size)
    if not known[size]:
        return Fit(wanted, 0, free)
    images = max(min(wanted, int(usable // known[size])), 0)
    if images < wanted:
        return_freed_memory()
    return Fit(images, known[size], free)


def _bytes_of_pass(embedder: Embedder, size: tuple[int, int]) -> int:
    """Return the memory that a pass of one image takes; 0 if that cannot be found out."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _peak_of_copy(embedder, size)
    except Exception as error:
        # The code depends on values, the network cannot be copied, or its weights are packed.
        log.info("the memory of a pass cannot be estimated: %s", first_line(error))
        return 0


def _peak_of_copy(embedder: Embedder, size: tuple[int, int]) -> int:
    """Run a copy whose tensors have shapes and no memory, and return what real ones would take."""
    fake, peak = FakeTensorMode(), _Peak()
    with torch.no_grad(), FakeCopyMode(fake):
        copied = copy.deepcopy(embedder)  # the network itself may keep tensors that it makes
    with torch.no_grad(), fake, peak:
        pixels = torch.empty(1, 3, *size).to(memory_format=torch.channels_last)
        copied.embed(pixels)
    return peak.bytes


class _Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums the sizes of all tensors that exist at a time.

    Attributes:
        bytes: Largest sum so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self._now = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Run an operation, and count the tensors that it makes."""
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self._now += size
            self.bytes = max(self.bytes, self._now)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._now -= size
