"""Embeddings from inside a network: hooks that take the outputs of layers and pool them."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from extractor.errors import ModelError, UsageError
from extractor.network.layout import Layout, find_layout, has_class_token, pool
from extractor.network.probe import PROBE_IMAGES, describe_shapes, probe
from extractor.options import Pooling

__all__ = ["Output", "Taps", "output_shapes"]

PRE_LOGITS = "pre-logits"
# Networks without a classifier: their features, averaged over the positions.
POOLED_FEATURES = "pooled-features"
LAYER = "layer"
HEAD = "head"  # output of a network that keeps its classifier


@dataclass(frozen=True)
class Output:
    """One embedding that a backbone computes per image.

    Attributes:
        shape: Shape of one embedding: ``(dim,)``; without pooling ``(channels, height, width)`` or
            ``(tokens, channels)``.
        definition: ``pre-logits``, ``pooled-features``, ``layer``, or ``head`` for the output of a
            classifier that was kept.
        layer: Dotted name of the module whose output it is; empty for the whole network.
        pool: Pooling over the positions of that output; empty if it has no positions.
        layout: Layout of the layer's output: ``vector``, ``map`` or ``tokens``.
        prefix_tokens: Number of tokens that precede those of the image. Only the pooling ``cls``
            uses one of them, the first.
    """

    shape: tuple[int, ...]
    definition: str = PRE_LOGITS
    layer: str = ""
    pool: str = ""
    layout: str = "vector"
    prefix_tokens: int = 0

    def __post_init__(self) -> None:
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"shape: got {self.shape}, expected positive numbers")

    @property
    def dim(self) -> int:
        """Count of numbers in one embedding."""
        return math.prod(self.shape)


class _StopForward(BaseException):
    """Ends a forward pass once the last layer has run.

    Not an ``Exception``, which a network might catch.
    """


@dataclass
class _Pass:
    """State of one forward pass: calls of each layer, its pooled output, layers to come."""

    calls: list[int]
    values: list[torch.Tensor | None]
    remaining: int


@dataclass(frozen=True)
class _Tap:
    """One layer: the layout of its output, and its number of calls per forward pass."""

    layout: Layout
    calls: int  # the last one counts


def _only_tensor(output: Any) -> Any:
    """Return the only tensor of a tuple or list, such as of a map and its size; else ``output``."""
    if isinstance(output, (tuple, list)):
        tensors = [item for item in output if isinstance(item, torch.Tensor)]
        if len(tensors) == 1:
            return tensors[0]
    return output


class Taps:
    """Runs a network and returns the pooled outputs of some of its layers.

    The hooks stay on the network. They do nothing in a forward pass that did not start here.

    Attributes:
        outputs: Descriptions of the embeddings, in the order of the names.

    Args:
        network: The network; changed by adding hooks.
        names: Dotted names of modules; the empty name is the whole network.
        pooling: How positions become one vector.
        size: (height, width) of the network's images.
        model: Name of the network for error messages.

    Raises:
        ModelError: A module does not run in a forward pass, or returns no tensor with one row per
            image.
        UsageError: The pooling is ``cls`` and a layer's output has no class token.
    """

    def __init__(
        self,
        network: nn.Module,
        names: tuple[str, ...],
        pooling: Pooling,
        size: tuple[int, int],
        model: str,
    ) -> None:
        self._pooling = pooling
        self._running = threading.local()
        modules = [network.get_submodule(name) for name in names]
        records = _record_outputs(network, modules, size, model)
        taps, outputs = [], []
        for name, module, record in zip(names, modules, records, strict=True):
            shape = _tensor_shape(record, module, f"{model}: layer {name!r}")
            layout = find_layout(network, module, shape, size) if shape else None
            if layout is None:
                raise ModelError(
                    f"{model}: layer {name!r} returned {describe_shapes(record.output)} for "
                    f"{PROBE_IMAGES} images, expected one tensor with a vector, a map or tokens "
                    "per image; try a layer beside or inside it"
                )
            if pooling.kind == "cls":
                _check_class_token(network, layout, f"{name!r} of {model}")
            pooled = pool(torch.zeros(1, *shape), layout, pooling)
            taps.append(_Tap(layout, record.calls))
            outputs.append(
                Output(
                    tuple(pooled.shape[1:]),
                    LAYER,
                    name,
                    "" if layout.kind == "vector" else str(pooling),
                    layout.kind,
                    layout.prefix_tokens,
                )
            )
        self._taps = tuple(taps)
        self.outputs = tuple(outputs)
        for index, module in enumerate(modules):
            module.register_forward_hook(functools.partial(self._take, index))

    def __call__(self, network: nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the network up to its last tapped layer.

        Args:
            network: The network, or a compiled form of it.
            pixels: ``(B, 3, H, W)`` float, RGB, normalized.

        Returns:
            One tensor per output, ``(B, *shape)``.

        Raises:
            ModelError: A layer did not run as often as with blank images.
        """
        count = len(self._taps)
        state = self._running.state = _Pass([0] * count, [None] * count, count)
        try:
            network(pixels)
        except _StopForward:
            pass
        finally:
            self._running.state = None
        values = [value for value in state.values if value is not None]
        if len(values) != count:
            pairs = zip(self.outputs, state.values, strict=True)
            missing = ", ".join(output.layer for output, value in pairs if value is None)
            raise ModelError(f"layer {missing} did not run as often as with blank images")
        return tuple(values)

    def _take(self, index: int, _: nn.Module, __: Any, output: Any) -> None:
        """Forward hook of a layer: pool its output, and end the pass after the last layer."""
        state: _Pass | None = getattr(self._running, "state", None)
        if state is None:
            return
        tap = self._taps[index]
        state.calls[index] += 1
        if state.calls[index] == tap.calls:
            state.values[index] = pool(_only_tensor(output), tap.layout, self._pooling)
            state.remaining -= 1
            if not state.remaining:
                raise _StopForward

    def __deepcopy__(self, _: object) -> Taps:
        """Return the same object: the hooks of a copied network belong to it, too."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_running"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _running=threading.local())


def _check_class_token(network: nn.Module, layout: Layout, name: str) -> None:
    if layout.kind == "tokens" and layout.prefix_tokens and has_class_token(network):
        return
    kind = "tokens" if layout.kind == "tokens" else f"a {layout.kind}"
    raise UsageError(f"pool cls: {name} returns {kind} without a class token; try avg")


@dataclass
class _Record:
    """Number of calls of one module in a forward pass of blank images, and its last output."""

    calls: int = 0
    output: object = None


def _tensor_shape(record: _Record, module: nn.Module, name: str) -> tuple[int, ...]:
    """Return the shape of a module's output without the batch axis; empty if there is none.

    Raises:
        ModelError: The module did not run.
    """
    if not record.calls:
        inner = [child for child, _ in module.named_children()]
        raise ModelError(
            f"{name} does not run as a whole in a forward pass"
            + (f"; it holds {', '.join(inner[-8:])}" if inner else "")
        )
    tensor = _only_tensor(record.output)
    if isinstance(tensor, torch.Tensor) and tensor.shape[:1] == (PROBE_IMAGES,):
        return tuple(tensor.shape[1:])
    return ()


def output_shapes(network: nn.Module, size: tuple[int, int]) -> dict[str, list[int] | None]:
    """Return the shape of each module's output for one image, by the module's dotted name.

    Shapes have no batch axis. A module that does not run has no entry; one that returns no single
    tensor has None. Empty if the network cannot run. On the meta device nothing is computed.
    """
    names = [name for name, _ in network.named_modules() if name]
    modules = [network.get_submodule(name) for name in names]
    try:
        records = _record_outputs(network, modules, size, type(network).__name__)
    except ModelError:
        return {}
    shapes: dict[str, list[int] | None] = {}
    for name, record in zip(names, records, strict=True):
        if record.calls:
            tensor = _only_tensor(record.output)
            shapes[name] = list(tensor.shape[1:]) if isinstance(tensor, torch.Tensor) else None
    return shapes


def _record_outputs(
    network: nn.Module, modules: Sequence[nn.Module], size: tuple[int, int], model: str
) -> list[_Record]:
    """Run a network on blank images, and record the output of each module."""
    records = [_Record() for _ in modules]
    with ExitStack() as hooks:
        for record, module in zip(records, modules, strict=True):

            def hook(_: nn.Module, __: Any, output: object, record: _Record = record) -> None:
                record.calls += 1
                record.output = output

            hooks.callback(module.register_forward_hook(hook).remove)
        probe(network, size, name=model)
    return records
