"""What one run computes: the embeddings of several stores, from one or more backbones."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from extractor.errors import DeviceError, UsageError
from extractor.models.backbone import Backbone
from extractor.models.load import load, with_changes
from extractor.models.naming import join_names, split_model, split_weights, store_name
from extractor.network.fusion.fuse import should_fuse
from extractor.network.precision import resolve_precision
from extractor.network.taps import Output
from extractor.options import Options
from extractor.text import first_line

__all__ = [
    "EmbeddingPart",
    "EmbeddingSpec",
    "Model",
    "backbones_of",
    "check_models",
    "fuse_as_chosen",
    "load_specs",
    "weights_of",
]

log = logging.getLogger(__name__)

Model: TypeAlias = "str | Backbone"


@dataclass(frozen=True)
class EmbeddingPart:
    """One output of a backbone, by its index."""

    backbone: Backbone
    index: int = 0

    @property
    def output(self) -> Output:
        """Description of this output."""
        return self.backbone.outputs[self.index]


@dataclass(frozen=True)
class EmbeddingSpec:
    """Embeddings of one store: one output, or several joined in one vector.

    Attributes:
        name: Name of the store, such as ``resnet50@layer3``.
        parts: Outputs in the order in which they are joined.
        unit_parts: Whether each part is scaled to unit length before they are joined.
    """

    name: str
    parts: tuple[EmbeddingPart, ...]
    unit_parts: bool = False

    def __post_init__(self) -> None:
        if not self.parts or (len(self.parts) > 1 and any(len(s) > 1 for s in self._shapes)):
            raise ValueError(f"{self.name}: shapes {self._shapes} cannot be joined")
        if len({backbone.views for backbone in self.backbones}) > 1:
            raise UsageError(
                f"{self.name}: joins backbones that average different views of an image; give all "
                "of them --augment and --scales, or none"
            )

    @property
    def _shapes(self) -> list[tuple[int, ...]]:
        return [part.output.shape for part in self.parts]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one embedding."""
        shapes = self._shapes
        return shapes[0] if len(shapes) == 1 else (sum(shape[0] for shape in shapes),)

    @property
    def dim(self) -> int:
        """Number of values in one embedding."""
        return sum(part.output.dim for part in self.parts)

    @property
    def backbones(self) -> tuple[Backbone, ...]:
        """Backbones of the parts, without repetition."""
        return tuple({id(part.backbone): part.backbone for part in self.parts}.values())

    def with_backbones(self, others: Mapping[int, Backbone]) -> EmbeddingSpec:
        """Return the same embedding of other backbones, by the ``id`` of those they replace."""
        parts = (EmbeddingPart(others[id(part.backbone)], part.index) for part in self.parts)
        return replace(self, parts=tuple(parts))

    @property
    def size_text(self) -> str:
        """Image sizes of the backbones in words."""
        return " + ".join(dict.fromkeys(backbone.size_text for backbone in self.backbones))

    def __str__(self) -> str:
        return " + ".join(str(backbone.provenance) for backbone in self.backbones)


def backbones_of(specs: Iterable[EmbeddingSpec]) -> list[Backbone]:
    """Return the backbones of several embeddings, each once."""
    return list({id(each): each for spec in specs for each in spec.backbones}.values())


def weights_of(specs: Iterable[EmbeddingSpec]) -> dict[str, str]:
    """Return the SHA-256 of loaded weights, by full name of the model."""
    origins = (backbone.provenance for backbone in backbones_of(specs))
    return {origin.model: origin.sha256 for origin in origins}


def load_specs(
    models: Sequence[Model],
    options: Options,
    *,
    recorded_sha256: Mapping[str, str] | None = None,
    fold_given: bool = True,
) -> list[EmbeddingSpec]:
    """Load the models of a run, each once, and return the embeddings of its stores.

    Args:
        models: Names or loaded backbones. The name ``A+B`` joins the embeddings of A and B.
        options: Options of the run.
        recorded_sha256: SHA-256 of the weights in existing stores, see
            :func:`extractor.models.load.load`.
        fold_given: Whether loaded backbones are copied and folded. If not, they are used as they
            are, and later changes of them have an effect.

    Raises:
        UsageError: The options contradict each other.
        ExtractorError: A model cannot be loaded, see :func:`extractor.load_backbone`.
    """
    check_models(models, options)
    loaded: dict[str, Backbone] = {}
    specs: list[EmbeddingSpec] = []
    for model in models:
        if isinstance(model, Backbone):
            backbone = with_changes(model, options)
            backbone = _fused_copy(backbone, options.fuse) if fold_given else backbone
            specs += _specs_of(backbone.provenance.model, backbone, options)
            continue
        names = split_model(model)
        for name in names:
            if name not in loaded:
                loaded[name] = _load(name, options, recorded_sha256)
        if len(names) == 1:
            specs += _specs_of(model, loaded[model], options)
        else:
            parts = tuple(EmbeddingPart(loaded[name]) for name in names)
            specs.append(EmbeddingSpec(store_name(model), parts, unit_parts=True))
    stores = [spec.name for spec in specs]
    if len(set(stores)) < len(stores):
        twice = sorted({name for name in stores if stores.count(name) > 1})
        raise UsageError(
            f"several stores would be named {', '.join(twice)}; use a run and an output folder for "
            "each, or give networks of your own different names (Backbone.from_module(name=...))"
        )
    return specs


def _load(model: str, options: Options, recorded_sha256: Mapping[str, str] | None) -> Backbone:
    """Load a model as a run computes it: fused in float32, then in its precision."""
    backbone = load(model, replace(options, precision="float32"), recorded_sha256)
    backbone = fuse_as_chosen(backbone, options.fuse)
    return backbone.to(backbone.device, resolve_precision(options.precision))


def fuse_as_chosen(backbone: Backbone, choice: str) -> Backbone:
    """Fuse a backbone in place if ``choice`` is ``auto`` and its device is a CPU."""
    return backbone.fold() if should_fuse(choice, backbone.device) else backbone


def _fused_copy(backbone: Backbone, choice: str) -> Backbone:
    """Return a fused copy of the user's backbone; itself if it is not fused or cannot be copied."""
    if not (backbone.may_fold and should_fuse(choice, backbone.device)):
        return backbone
    try:
        return replace(backbone, module=copy.deepcopy(backbone.module)).fold()
    except DeviceError:
        raise
    except Exception as error:  # a module may hold objects that cannot be copied
        log.info("%s is not fused: %s", backbone.provenance.model, first_line(error))
        return backbone


def _specs_of(model: str, backbone: Backbone, options: Options) -> list[EmbeddingSpec]:
    parts = [EmbeddingPart(backbone, index) for index in range(len(backbone.outputs))]
    if options.concat:
        layer = join_names([output.layer for output in backbone.outputs])
        return [EmbeddingSpec(store_name(model, layer), tuple(parts))]
    return [EmbeddingSpec(store_name(model, part.output.layer), (part,)) for part in parts]


def check_models(models: Sequence[Model], options: Options) -> None:
    """Check that models and options fit together, before anything is loaded.

    Raises:
        UsageError: They do not.
    """
    names = [model for model in models if isinstance(model, str)]
    if not models or not all(names):
        raise UsageError("got no model, or an empty name; expected a name such as resnet50")
    for name in (part for model in names for part in split_model(model)):
        model, weights = split_weights(name)
        if not model or (name.endswith("=") and not weights):
            raise UsageError(f"model: got {name!r}, expected NAME or NAME=WEIGHTS")
    if len(set(names)) < len(names):
        raise UsageError(f"model: got {', '.join(names)}, expected each only once")
    several = len(models) > 1 or any(len(split_model(name)) > 1 for name in names)
    if several and options.weights not in ("default", "random"):
        raise UsageError(
            "weights: one file or tag cannot fit several models; name those of each model, such as "
            "resnet50=FILE or resnet50=a1_in1k"
        )
    if several and options.bypass:
        raise UsageError("bypass: works with one model only; give one --model")
    if options.layers and any(len(split_model(name)) > 1 for name in names):
        raise UsageError("layers: A+B joins embeddings of whole models; leave --layer out")
