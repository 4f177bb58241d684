"""Memory of the batches: a few buffers that are used again and again."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from extractor.loading.options import LoaderOptions
from extractor.text import first_line

if TYPE_CHECKING:
    import torch

    from extractor.preprocess import Preprocess

__all__ = ["BufferPool"]

log = logging.getLogger(__name__)

# One buffer is being filled, one is ready, one is on its way to the device, and one is spare for a
# slow image. More would only cost memory, because a rate bounds a run and not a queue. A CPU may
# compute several batches at the same time, so small batches get more buffers to fill meanwhile.
MIN_BUFFERS = 4
MAX_BUFFERS = 8
MAX_BUFFERS_BYTES = 2**28


class BufferPool:
    """Buffers for the pictures of a batch. The caller holds the loader's lock.

    Args:
        preprocesses: Transforms; each one needs a buffer ``(B, H, W, 3)`` uint8.
        options: Batch size, and whether to page-lock the memory.
    """

    def __init__(self, preprocesses: Sequence[Preprocess], options: LoaderOptions) -> None:
        self._shapes = [(options.batch_size, *p.input_size, 3) for p in preprocesses]
        self._pin = options.pin
        self._free = [self.allocate() for _ in range(self._count())]

    def _count(self) -> int:
        if self._pin:
            return MIN_BUFFERS
        affordable = MAX_BUFFERS_BYTES // sum(map(math.prod, self._shapes))
        return min(max(affordable, MIN_BUFFERS), MAX_BUFFERS)

    def allocate(self) -> tuple[torch.Tensor, ...]:
        """Return new buffers, one per preprocessing. Where none can be page-locked, they are not.

        Raises:
            RuntimeError: The memory does not suffice.
        """
        import torch

        from extractor.system.devices import is_out_of_memory

        try:
            return tuple(
                torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin)
                for shape in self._shapes
            )
        except RuntimeError as error:
            if not self._pin or not is_out_of_memory(error):
                raise
            log.warning(
                "no more memory can be page-locked (%s); copies to the GPU take longer",
                first_line(error),
            )
        self._pin = False
        return self.allocate()

    def __len__(self) -> int:
        """Return the number of free buffers."""
        return len(self._free)

    def take(self) -> tuple[torch.Tensor, ...]:
        """Return the buffers of one batch."""
        return self._free.pop()

    def give_back(self, pictures: tuple[torch.Tensor, ...]) -> None:
        """Make buffers free again."""
        self._free.append(pictures)
