"""Table of all models, which describes them before they are built.

``scripts/check_backbones.py`` writes it. It builds each model on torch's meta device, where
parameters have shapes but no values, and so cost neither time nor memory.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources

import torch

from extractor.models import from_timm, from_torchvision
from extractor.models.backbone import Backbone
from extractor.network.prefixes import PREFIXES

__all__ = ["Catalog", "Entry", "outline", "survey"]

FILE = "catalog.tsv"
COLUMNS = ("model", "version", "dim", "input", "parameters", "heads", "fingerprint")


@dataclass(frozen=True)
class Entry:
    """One model in the table.

    Attributes:
        model: Full name, such as ``timm:resnet50``.
        version: Version of the library that the other fields were read from.
        dim: Length of one embedding.
        input_size: (height, width) of its images, in pixels.
        parameters: Number of parameters without the classifiers.
        heads: Dotted names of the modules that become ``nn.Identity``.
        fingerprint: Digest of the names and shapes of its tensors, see :func:`fingerprint`.
    """

    model: str
    version: str
    dim: int
    input_size: tuple[int, int]
    parameters: int
    heads: tuple[str, ...]
    fingerprint: str

    def to_line(self) -> str:
        """Return the line of the table for this model."""
        height, width = self.input_size
        heads = ",".join(self.heads)
        fields = (self.model, self.version, self.dim, f"{height}x{width}", self.parameters, heads)
        return "\t".join(map(str, (*fields, self.fingerprint)))

    @classmethod
    def from_line(cls, line: str) -> Entry:
        """Read the entry that :meth:`to_line` wrote."""
        model, version, dim, size, parameters, heads, mark = line.split("\t")
        height, width = size.split("x")
        named = tuple(filter(None, heads.split(",")))
        return cls(
            model, version, int(dim), (int(height), int(width)), int(parameters), named, mark
        )


class Catalog:
    """Table of models by full name."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._entries = {entry.model: entry for entry in entries}

    @classmethod
    @functools.cache
    def read(cls) -> Catalog:
        """Read the table that is part of the package."""
        text = resources.files("extractor.models").joinpath(FILE).read_text("ascii")
        return cls.from_text(text)

    @classmethod
    def from_text(cls, text: str) -> Catalog:
        """Read the table that :meth:`to_text` wrote."""
        return cls(Entry.from_line(line) for line in text.splitlines()[1:])

    def to_text(self) -> str:
        """Return the table as text: the names of the columns, then a line for each entry."""
        lines = [entry.to_line() for entry in self._entries.values()]
        return "\n".join(["\t".join(COLUMNS), *lines]) + "\n"

    def entry(self, model: str) -> Entry:
        """Return the entry of ``timm:NAME`` or ``torchvision:NAME``.

        If the table lacks the model in the installed version of its library, the model is built on
        the meta device. A patch release of torchvision has the models of the one before.
        """
        library, _, name = model.partition(":")
        known = self._entries.get(model)
        version = from_timm.version() if library == "timm" else from_torchvision.version()
        if known is not None and _release(library, known.version) == _release(library, version):
            return known
        return survey(library, name)

    def models_with(self, state: Mapping[str, torch.Tensor]) -> list[str]:
        """Return the full names of the models whose tensors have the names and shapes of ``state``.

        Classifiers and prefixes that trainers add are ignored.
        """
        marks = self._marks
        heads = {entry.heads for entry in self._entries.values()}
        found: dict[str, None] = {}
        for count in range(3):
            for prefix in map("".join, itertools.product(PREFIXES, repeat=count)):
                shapes = {
                    key[len(prefix) :]: value.shape
                    for key, value in state.items()
                    if key.startswith(prefix)
                }
                if shapes and 2 * len(shapes) > len(state):
                    for names in heads:
                        mark = fingerprint(shapes, (*names, *from_torchvision.AUXILIARY))
                        found.update(dict.fromkeys(marks.get(mark, ())))
        return list(found)

    @functools.cached_property
    def _marks(self) -> dict[str, list[str]]:
        marks: dict[str, list[str]] = {}
        for entry in self._entries.values():
            marks.setdefault(entry.fingerprint, []).append(entry.model)
        return marks


def _release(library: str, version: str) -> str:
    return version.rpartition(".")[0] if library == "torchvision" else version


def survey(library: str, name: str) -> Entry:
    """Build one model without weights and return its entry."""
    backbone = outline(library, name)
    state = backbone.module.state_dict()
    return Entry(
        backbone.provenance.model,
        backbone.provenance.library_version,
        backbone.dim,
        backbone.preprocess.input_size,
        sum(value.numel() for value in backbone.module.parameters()),
        backbone.heads,
        fingerprint({key: value.shape for key, value in state.items()}, backbone.heads),
    )


def outline(library: str, name: str) -> Backbone:
    """Build a model without values, on the meta device if possible; it cannot run.

    The name of a timm model may end with a tag, which decides the evaluation transform.
    """
    return from_timm.outline(name) if library == "timm" else from_torchvision.outline(name)


def fingerprint(shapes: Mapping[str, tuple[int, ...]], heads: Iterable[str]) -> str:
    """Return a short digest of the names and shapes of a network's tensors, without its heads.

    >>> fingerprint({"a": (2, 3), "fc.weight": (10, 3)}, ["fc"]) == fingerprint({"a": (2, 3)}, [])
    True
    """
    left_out = tuple(f"{head}." for head in heads)
    # Old checkpoints lack the counter of batch normalization.
    lines = sorted(
        f"{key} {tuple(shape)}"
        for key, shape in shapes.items()
        if not key.startswith(left_out) and not key.endswith(".num_batches_tracked")
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
