"""What half precision makes NaN or infinity of is computed again in float32."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from extractor.compute.embed import Embedded, embed
from extractor.images.types import ImageInfo, ImageSource
from extractor.loading.loader import BatchLoader
from extractor.models.embedding import EmbeddingSpec

__all__ = ["Mender"]

log = logging.getLogger(__name__)


class Mender:
    """Mends the rows of a batch that are not finite.

    Args:
        load: gives the same specs in float32; is called when the first such row is met.
        loader: decodes batches of images for specs.
        normalize: scale every embedding to unit length.
    """

    def __init__(
        self,
        load: Callable[[], Sequence[EmbeddingSpec]],
        loader: Callable[[Sequence[EmbeddingSpec], list[list[ImageSource]]], BatchLoader],
        *,
        normalize: bool,
    ) -> None:
        self._load = functools.cache(load)
        self._loader = loader
        self._normalize = normalize

    def mend(self, images: Callable[[], Sequence[ImageSource]], embedded: Embedded) -> Embedded:
        """The same batch, computed in float32 where a row was NaN or infinity.

        Args:
            images: gives the images of the batch.
        """
        finite = np.all([_finite(rows) for rows in embedded.rows], axis=0)
        places = [
            place
            for place in np.flatnonzero(~finite).tolist()
            if isinstance(embedded.outcomes[place], ImageInfo)
        ]
        if not places:
            return embedded
        specs, sources = self._specs(), images()
        with self._loader(specs, [[sources[place]] for place in places]) as loader:
            again = list(embed(specs, loader, normalize=self._normalize))
        mended: list[npt.NDArray[np.float32]] = []
        for spec, rows in enumerate(embedded.rows):
            copy = rows.copy()
            for place, one in zip(places, again, strict=True):
                if isinstance(one.outcomes[0], ImageInfo) and not np.isfinite(copy[place]).all():
                    copy[place] = one.rows[spec][0]
            mended.append(copy)
        return Embedded(tuple(mended), embedded.outcomes)

    def _specs(self) -> Sequence[EmbeddingSpec]:
        if not self._load.cache_info().currsize:
            log.warning("half precision overflows for some images; these are computed in float32")
        return self._load()


def _finite(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Which rows hold neither NaN nor infinity."""
    return np.asarray(np.isfinite(rows).reshape(len(rows), -1).all(axis=1))
