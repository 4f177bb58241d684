"""How many images a second the network of a store embeds, and how many parameters it has."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from extractor.reading.reader import FeatureStore

if TYPE_CHECKING:
    from extractor.models.backbone import Backbone

__all__ = ["Speed", "speed_of"]

SECONDS = 1.0  # of measuring, after a first batch that does not count
BATCH = 32


@dataclass(frozen=True)
class Speed:
    """How fast a network is.

    Attributes:
        parameters: Number of parameters, without classifiers.
        images_per_second: Images per second in batches of 32, without reading and decoding.
    """

    parameters: int
    images_per_second: float


def speed_of(store: FeatureStore, device: str = "auto") -> Speed:
    """Load the network of a store and measure it.

    Raises:
        ExtractorError: The network cannot be loaded, see :meth:`extractor.Extractor.for_store`.
    """
    from extractor.api import Extractor

    with Extractor.for_store(store, device=device) as embed:
        # Of the size that a resize would give, so that there is nothing to resize.
        height, width = embed.backbones[0].preprocess.resize_size
        random = np.random.default_rng(0)
        pictures = list(random.integers(0, 256, (BATCH, height, width, 3), np.uint8))
        embed(pictures)
        done, start = 0, time.perf_counter()
        while (seconds := time.perf_counter() - start) < SECONDS or not done:
            embed(pictures)
            done += BATCH
        parameters = sum(_parameters(backbone) for backbone in embed.backbones)
    return Speed(parameters, done / seconds)


def _parameters(backbone: Backbone) -> int:
    """Return the number of parameters, before normalizations were folded into convolutions."""
    from extractor.models.catalog import Catalog

    provenance = backbone.provenance
    if provenance.library in ("timm", "torchvision") and not backbone.bypassed:
        return Catalog.read().entry(provenance.model).parameters
    return sum(parameter.numel() for parameter in backbone.module.parameters())
