"""Groups of numbers that pairs connect."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["Components"]

Numbers = npt.NDArray[np.int64]


class Components:
    """Connected components of a graph that grows by edges.

    >>> components = Components(4)
    >>> components.join(np.array([3, 1]), np.array([1, 0]))
    >>> components.labels().tolist()
    [0, 0, 2, 0]

    Args:
        count: Number of nodes.
    """

    def __init__(self, count: int) -> None:
        self._parents: Numbers = np.arange(count)

    def find(self, nodes: Numbers) -> Numbers:
        """Return the label of the component of each node: its lowest node."""
        roots = self._parents[nodes]
        while True:
            above = self._parents[roots]
            if (above == roots).all():
                break
            roots = above
        self._parents[nodes] = roots
        return roots

    def join(self, left: Numbers, right: Numbers) -> None:
        """Add an edge between each pair of nodes."""
        while len(left):
            left, right = self.find(left), self.find(right)
            apart = left != right
            left, right = left[apart], right[apart]
            low, high = np.minimum(left, right), np.maximum(left, right)
            # A root gets a parent below it, so no cycle arises.
            np.minimum.at(self._parents, high, low)

    def labels(self) -> Numbers:
        """Return the label of each node, ``(count,)``."""
        return self.find(np.arange(len(self._parents)))
