"""Pretrained networks without their classifiers."""

from extractor.backbones.backbone import Backbone, Provenance
from extractor.backbones.load import load_backbone
from extractor.backbones.targets import Model, Part, Target, check_models, load_targets

__all__ = [
    "Backbone",
    "Model",
    "Part",
    "Provenance",
    "Target",
    "check_models",
    "load_backbone",
    "load_targets",
]
