"""Folders of images to embeddings from pretrained backbones, kept as plain ``.npy`` files.

>>> from extractor import FeatureStore
>>> store = FeatureStore.open("features/resnet50")  # doctest: +SKIP
>>> store.features.shape  # doctest: +SKIP
(334, 2048)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from extractor.version import __version__

if TYPE_CHECKING:
    from extractor.api import Extractor, extract
    from extractor.errors import ExtractorError
    from extractor.models.backbone import Backbone
    from extractor.models.load import load_backbone
    from extractor.preprocess import Preprocess
    from extractor.store.reader import FeatureStore

__all__ = [
    "Backbone",
    "Extractor",
    "ExtractorError",
    "FeatureStore",
    "Preprocess",
    "Report",
    "__version__",
    "extract",
    "load_backbone",
]

# Resolved when they are first asked for: who only reads a store never waits for torch.
_HOMES = {
    "Backbone": "extractor.models.backbone",
    "Extractor": "extractor.api",
    "ExtractorError": "extractor.errors",
    "FeatureStore": "extractor.store.reader",
    "Preprocess": "extractor.preprocess",
    "Report": "extractor.report",
    "extract": "extractor.api",
    "load_backbone": "extractor.models.load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
