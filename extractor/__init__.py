"""Embeddings of image folders from pretrained backbones, stored as plain ``.npy`` files.

>>> from extractor import extract
>>> report = extract("images/", "resnet50")  # doctest: +SKIP
>>> report.store.features.shape  # doctest: +SKIP
(25, 2048)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from extractor.system.installation import installation_errors
from extractor.version import __version__

if TYPE_CHECKING:
    from extractor.analysis.duplicate_groups import DuplicateGroup, DuplicateImage, Duplicates
    from extractor.analysis.duplicates import find_duplicates
    from extractor.analysis.mapping import StoreMap, map_store
    from extractor.analysis.outliers import LabelError, Outlier, Outliers, find_outliers
    from extractor.api import Extractor, extract
    from extractor.errors import (
        DecodeError,
        DeviceError,
        ExtractorError,
        InstallationError,
        InterruptedRunError,
        ModelError,
        ShardBusyError,
        ShardsFailedError,
        SourceError,
        StoreBusyError,
        StoreDamagedError,
        StoreError,
        StoreNotFoundError,
        StoreReplacedError,
        UnknownTokenError,
        UsageError,
        WeightsError,
    )
    from extractor.evaluation.comparing import Comparison, compare_stores
    from extractor.evaluation.evaluating import Evaluation, evaluate_store
    from extractor.export.exporting import ExportReport, export_store
    from extractor.images.listing import ImageList, list_images
    from extractor.models.backbone import Backbone
    from extractor.models.load import load_backbone
    from extractor.options import Options
    from extractor.preprocess import Preprocess
    from extractor.reading.info import StoreInfo
    from extractor.reading.reader import FeatureStore
    from extractor.report import Progress, Report, StoreReport
    from extractor.search.hits import Hit, Hits
    from extractor.search.searcher import Searcher
    from extractor.store.history import Changes
    from extractor.upkeep.transforming import TransformReport, transform_store
    from extractor.view.app import view_app
    from extractor.view.site import PageReport, export_page

__all__ = [
    "Backbone",
    "Changes",
    "Comparison",
    "DecodeError",
    "DeviceError",
    "DuplicateGroup",
    "DuplicateImage",
    "Duplicates",
    "Evaluation",
    "ExportReport",
    "Extractor",
    "ExtractorError",
    "FeatureStore",
    "Hit",
    "Hits",
    "ImageList",
    "InstallationError",
    "InterruptedRunError",
    "LabelError",
    "ModelError",
    "Options",
    "Outlier",
    "Outliers",
    "PageReport",
    "Preprocess",
    "Progress",
    "Report",
    "Searcher",
    "ShardBusyError",
    "ShardsFailedError",
    "SourceError",
    "StoreBusyError",
    "StoreDamagedError",
    "StoreError",
    "StoreInfo",
    "StoreMap",
    "StoreNotFoundError",
    "StoreReplacedError",
    "StoreReport",
    "TransformReport",
    "UnknownTokenError",
    "UsageError",
    "WeightsError",
    "__version__",
    "compare_stores",
    "evaluate_store",
    "export_page",
    "export_store",
    "extract",
    "find_duplicates",
    "find_outliers",
    "list_images",
    "load_backbone",
    "map_store",
    "transform_store",
    "view_app",
]

# Imported on first use, so that a program that only reads a store does not wait for torch.
_MODULES = {
    "extractor.analysis.duplicate_groups": ("DuplicateGroup", "DuplicateImage", "Duplicates"),
    "extractor.analysis.duplicates": ("find_duplicates",),
    "extractor.analysis.mapping": ("StoreMap", "map_store"),
    "extractor.analysis.outliers": ("LabelError", "Outlier", "Outliers", "find_outliers"),
    "extractor.api": ("Extractor", "extract"),
    "extractor.errors": (
        "DecodeError",
        "DeviceError",
        "ExtractorError",
        "InstallationError",
        "InterruptedRunError",
        "ModelError",
        "ShardBusyError",
        "ShardsFailedError",
        "SourceError",
        "StoreBusyError",
        "StoreDamagedError",
        "StoreError",
        "StoreNotFoundError",
        "StoreReplacedError",
        "UnknownTokenError",
        "UsageError",
        "WeightsError",
    ),
    "extractor.evaluation.comparing": ("Comparison", "compare_stores"),
    "extractor.evaluation.evaluating": ("Evaluation", "evaluate_store"),
    "extractor.export.exporting": ("ExportReport", "export_store"),
    "extractor.images.listing": ("ImageList", "list_images"),
    "extractor.models.backbone": ("Backbone",),
    "extractor.models.load": ("load_backbone",),
    "extractor.options": ("Options",),
    "extractor.preprocess": ("Preprocess",),
    "extractor.report": ("Progress", "Report", "StoreReport"),
    "extractor.reading.info": ("StoreInfo",),
    "extractor.reading.reader": ("FeatureStore",),
    "extractor.search.hits": ("Hit", "Hits"),
    "extractor.search.searcher": ("Searcher",),
    "extractor.store.history": ("Changes",),
    "extractor.upkeep.transforming": ("TransformReport", "transform_store"),
    "extractor.view.app": ("view_app",),
    "extractor.view.site": ("PageReport", "export_page"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with installation_errors():
        value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
