"""Several views of one picture: its mirror image and other sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["ONE_VIEW", "Views"]


@dataclass(frozen=True)
class Views:
    """Views of a picture whose embeddings are averaged; by default the picture alone.

    >>> Views(flip=True, scales=(1.0, 0.5)).count
    4

    Attributes:
        flip: Whether each view is also mirrored, left to right.
        scales: Factors of the size, each once.
    """

    flip: bool = False
    scales: tuple[float, ...] = (1.0,)

    @property
    def count(self) -> int:
        """Number of views."""
        return len(self.scales) * (2 if self.flip else 1)

    def sizes(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Return (height, width) of the views, in the order of the scales.

        >>> Views(scales=(1.0, 0.71)).sizes((224, 160))
        [(224, 160), (159, 114)]
        """
        return [
            (max(round(size[0] * scale), 1), max(round(size[1] * scale), 1))
            for scale in self.scales
        ]

    def of(self, pixels: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the views of pixels, one at a time.

        Args:
            pixels: ``(B, 3, H, W)`` floating point.

        Yields:
            ``(B, 3, h, w)`` for each of :meth:`sizes`. Other sizes than the pixels' own are float32
            and resized by a bilinear filter, which widens where it shrinks (as Pillow's does).
        """
        own = (pixels.shape[2], pixels.shape[3])
        for size in self.sizes(own):
            view = pixels
            if size != own:
                view = torch.nn.functional.interpolate(
                    pixels.float(), size, mode="bilinear", antialias=True
                )
            yield view
            if self.flip:
                yield view.flip(3)

    def as_dict(self) -> dict[str, Any]:
        """Return the entries of a manifest; none of what is at its default.

        >>> Views(flip=True).as_dict()
        {'augment': 'flip'}
        """
        entries: dict[str, Any] = {"augment": "flip"} if self.flip else {}
        if self.scales != (1.0,):
            entries["scales"] = list(self.scales)
        return entries

    @classmethod
    def from_mapping(cls, entries: Mapping[str, Any]) -> Views:
        """Return the views that :meth:`as_dict` describes; other keys have no meaning."""
        scales = entries.get("scales") or (1.0,)
        return cls(entries.get("augment") == "flip", tuple(map(float, scales)))


ONE_VIEW = Views()
