"""The store of embeddings: its format, the writer and the reader (``docs/store-format.md``)."""

from extractor.store.array import ShardedArray
from extractor.store.format import Description, Manifest
from extractor.store.journal import FailureRecord, ImageRecord
from extractor.store.reader import FeatureStore
from extractor.store.writer import Job, StoreWriter

__all__ = [
    "Description",
    "FailureRecord",
    "FeatureStore",
    "ImageRecord",
    "Job",
    "Manifest",
    "ShardedArray",
    "StoreWriter",
]
