"""What is known of every model before it is built: a table that comes with the program.

``scripts/check_backbones.py`` makes it, by building each of them on torch's meta device, where
parameters have shapes but no values and cost neither time nor memory.
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
from extractor.models.checkpoint import PREFIXES

__all__ = ["Catalog", "Entry", "outline", "survey"]

FILE = "catalog.tsv"
COLUMNS = ("model", "version", "dim", "input", "parameters", "heads", "fingerprint")


@dataclass(frozen=True)
class Entry:
    """One model, in short.

    Attributes:
        model: full name, such as ``timm:resnet50``.
        version: of the library that the rest was read from.
        dim: numbers in one embedding.
        input_size: (height, width) of its images, in pixels.
        parameters: of the backbone, its classifiers left out.
        heads: dotted names of the modules that become ``nn.Identity``.
        fingerprint: of the names and shapes of its tensors, see :func:`fingerprint`.
    """

    model: str
    version: str
    dim: int
    input_size: tuple[int, int]
    parameters: int
    heads: tuple[str, ...]
    fingerprint: str

    def to_line(self) -> str:
        """One line of the table."""
        height, width = self.input_size
        heads = ",".join(self.heads)
        fields = (self.model, self.version, self.dim, f"{height}x{width}", self.parameters, heads)
        return "\t".join(map(str, (*fields, self.fingerprint)))

    @classmethod
    def from_line(cls, line: str) -> Entry:
        """The entry that :meth:`to_line` wrote."""
        model, version, dim, size, parameters, heads, mark = line.split("\t")
        height, width = size.split("x")
        named = tuple(filter(None, heads.split(",")))
        return cls(
            model, version, int(dim), (int(height), int(width)), int(parameters), named, mark
        )


class Catalog:
    """The table, by full name."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._entries = {entry.model: entry for entry in entries}

    @classmethod
    @functools.cache
    def read(cls) -> Catalog:
        """The table that comes with the program."""
        text = resources.files("extractor.models").joinpath(FILE).read_text("ascii")
        return cls.from_text(text)

    @classmethod
    def from_text(cls, text: str) -> Catalog:
        """The table that :meth:`to_text` wrote."""
        return cls(Entry.from_line(line) for line in text.splitlines()[1:])

    def to_text(self) -> str:
        """A line for each entry, below one with the names of the columns."""
        lines = [entry.to_line() for entry in self._entries.values()]
        return "\n".join(["\t".join(COLUMNS), *lines]) + "\n"

    def entry(self, model: str) -> Entry:
        """What is known of ``timm:NAME`` or ``torchvision:NAME``.

        A model that the table does not have in the installed version of its library is built, on
        the meta device, to see.
        """
        library, _, name = model.partition(":")
        known = self._entries.get(model)
        version = from_timm.version() if library == "timm" else from_torchvision.version()
        if known is not None and known.version == version:
            return known
        return survey(library, name)

    def models_with(self, state: Mapping[str, torch.Tensor]) -> list[str]:
        """Full names of the models whose tensors have the names and shapes of a state dict.

        Whatever classifier it holds, and whatever its trainer put before the names.
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


def survey(library: str, name: str) -> Entry:
    """Build one model to see what the table says of it; no weights are read."""
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
    """A model without values, on the meta device where it can be built there; computes nothing."""
    return from_timm.outline(name) if library == "timm" else from_torchvision.outline(name)


def fingerprint(shapes: Mapping[str, tuple[int, ...]], heads: Iterable[str]) -> str:
    """A short digest of the names and shapes of a network's tensors, its heads left out.

    >>> fingerprint({"a": (2, 3), "fc.weight": (10, 3)}, ["fc"]) == fingerprint({"a": (2, 3)}, [])
    True
    """
    left_out = tuple(f"{head}." for head in heads)
    # Old checkpoints do not have the counter of batch normalisation.
    lines = sorted(
        f"{key} {tuple(shape)}"
        for key, shape in shapes.items()
        if not key.startswith(left_out) and not key.endswith(".num_batches_tracked")
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
