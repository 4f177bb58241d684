"""Pretrained networks without their classifiers."""

from extractor.backbones.backbone import Backbone, Provenance
from extractor.backbones.load import load_backbone

__all__ = ["Backbone", "Provenance", "load_backbone"]
