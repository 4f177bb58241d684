"""Rows that overflow in half precision are computed again in float32."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from extractor.compute.embed import Embedded, embed
from extractor.compute.inputs import Inputs
from extractor.images.types import ImageInfo, ImageSource
from extractor.models.embedding import EmbeddingSpec

__all__ = ["Float32Retry"]

log = logging.getLogger(__name__)


class Float32Retry:
    """Replaces rows that hold NaN or infinity by rows computed in float32.

    Args:
        load: Returns the same specs in float32. Called once, when the first such row appears.
        inputs: Decodes the images of such rows.
    """

    def __init__(self, load: Callable[[], Sequence[EmbeddingSpec]], inputs: Inputs) -> None:
        self._load = functools.cache(load)
        self._inputs = inputs.with_batch_size(1)

    def retry(self, images: Callable[[], Sequence[ImageSource]], embedded: Embedded) -> Embedded:
        """Return the batch with all rows finite, as far as float32 makes them finite.

        Args:
            images: Returns the images of the batch.
            embedded: The batch as half precision computed it.
        """
        finite = np.all([_are_finite(rows) for rows in embedded.rows], axis=0)
        overflowed = [
            index
            for index in np.flatnonzero(~finite).tolist()
            if isinstance(embedded.outcomes[index], ImageInfo)
        ]
        if not overflowed:
            return embedded
        specs, sources = self._specs(), images()
        with self._inputs.loader([[sources[index]] for index in overflowed], specs) as loader:
            retried = list(embed(specs, loader, normalize=self._inputs.options.normalize))
        replaced: list[npt.NDArray[np.float32]] = []
        for spec_index, rows in enumerate(embedded.rows):
            copy = rows.copy()
            for index, again in zip(overflowed, retried, strict=True):
                if isinstance(again.outcomes[0], ImageInfo) and not np.isfinite(copy[index]).all():
                    copy[index] = again.rows[spec_index][0]
            replaced.append(copy)
        return Embedded(tuple(replaced), embedded.outcomes)

    def _specs(self) -> Sequence[EmbeddingSpec]:
        if not self._load.cache_info().currsize:
            log.warning("half precision overflows for some images; computing them in float32")
        return self._load()


def _are_finite(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Return which rows hold neither NaN nor infinity."""
    return np.asarray(np.isfinite(rows).reshape(len(rows), -1).all(axis=1))
