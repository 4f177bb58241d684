"""Trace one forward pass of a network: which modules alone take the output of a convolution."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["Chain", "Embed", "find_chains"]

Embed: TypeAlias = Callable[[torch.Tensor], Sequence[torch.Tensor]]
"""Runs a network on ``(B, 3, H, W)`` pixels and returns its embeddings."""


class Chain(NamedTuple):
    """A convolution and its follower.

    Attributes:
        convolution: The convolution.
        follower: The only module that takes its output.
        name: Dotted name of the follower.
    """

    convolution: nn.Conv2d
    follower: nn.Module
    name: str

    def replace_follower(self, network: nn.Module, module: nn.Module) -> Callable[[], None]:
        """Put another module in place of the follower; return a function that undoes it."""
        path, _, attribute = self.name.rpartition(".")
        parent = network.get_submodule(path)
        before = getattr(parent, attribute)
        setattr(parent, attribute, module)
        return lambda: setattr(parent, attribute, before)


def find_chains(
    network: nn.Module,
    embed: Embed,
    pixels: torch.Tensor,
    may_lead: Callable[[nn.Module], bool],
    may_follow: Callable[[nn.Module], bool],
) -> tuple[Sequence[torch.Tensor], list[Chain]]:
    """Run a network, and find the convolutions whose output only one module takes.

    Modules that share their weights or have hooks take no part. Nor do convolutions that run
    several times, and followers that also follow something else.

    Args:
        network: The network to trace.
        embed: Runs the network.
        pixels: ``(B, 3, H, W)`` float, RGB, normalized.
        may_lead: Whether a module is a convolution that may start a chain.
        may_follow: Whether a module may be a follower.

    Returns:
        The embeddings that ``embed`` returned, and the chains.
    """
    calls: Counter[nn.Module] = Counter()
    counter = _UseCounter()
    outputs: list[_Output] = []

    def after_convolution(module: nn.Conv2d, _: object, tensor: torch.Tensor) -> None:
        calls[module] += 1
        outputs.append(_Output(module))
        counter.add(tensor, outputs[-1])

    def before_follower(name: str, module: nn.Module, args: tuple[object, ...]) -> None:
        calls[module] += 1
        output = counter.output_of(args[0]) if args else None
        if output is not None and not output.uses:
            output.follower, output.name = module, name

    def after_follower(_: nn.Module, args: tuple[object, ...], tensor: object) -> None:
        # It worked in place: from now on the tensor is no longer the convolution's output.
        if args and tensor is args[0]:
            counter.forget(tensor)

    with ExitStack() as hooks:
        for name, module in _independent_modules(network):
            if may_lead(module):
                hooks.callback(module.register_forward_hook(after_convolution).remove)
            elif may_follow(module):
                before = functools.partial(before_follower, name)
                hooks.callback(module.register_forward_pre_hook(before).remove)
                hooks.callback(module.register_forward_hook(after_follower).remove)
        with counter:
            embeddings = embed(pixels)
        counter.count(embeddings)
    return embeddings, _unambiguous_chains(outputs, calls)


def _unambiguous_chains(outputs: Sequence[_Output], calls: Counter[nn.Module]) -> list[Chain]:
    """Return the outputs with one use, whose follower runs only as a follower."""
    chains = [
        Chain(output.convolution, output.follower, output.name)
        for output in outputs
        if calls[output.convolution] == 1 and output.uses == 1 and output.follower is not None
    ]
    follows = Counter(chain.follower for chain in chains)
    return [chain for chain in chains if follows[chain.follower] == calls[chain.follower]]


def _independent_modules(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that share nothing with others and compute with their weights as they are.

    Modules with hooks are left out: hooks may change or keep what they see.
    """
    named = list(network.named_modules(remove_duplicate=False))
    names = Counter(id(module) for _, module in named)
    owners = Counter(
        id(parameter) for module in network.modules() for parameter in module.parameters(False)
    )
    for name, module in named:
        is_hooked = module._forward_hooks or module._forward_pre_hooks
        is_shared = any(owners[id(parameter)] > 1 for parameter in module.parameters(False))
        # Parametrized modules compute their weight from other tensors in every pass.
        is_derived = isinstance(module, nn.Conv2d) and "weight" not in module._parameters
        if not (is_hooked or is_shared or is_derived or names[id(module)] > 1):
            yield name, module


@dataclass(eq=False)
class _Output:
    """Output of a convolution.

    Attributes:
        convolution: The convolution.
        uses: Number of operations that took the output so far.
        follower: The module that took it first, with its dotted name.
    """

    convolution: nn.Conv2d
    uses: int = 0
    follower: nn.Module | None = None
    name: str = ""


class _UseCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that take the output of a convolution."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._outputs = WeakTensorKeyDictionary()  # weak: keeps no tensor in memory

    def add(self, tensor: torch.Tensor, output: _Output) -> None:
        """Start to count the uses of a tensor."""
        self._outputs[tensor] = output

    def output_of(self, tensor: object) -> _Output | None:
        """Return the output that a tensor is; None if its uses are not counted."""
        if isinstance(tensor, torch.Tensor) and tensor in self._outputs:
            output: _Output = self._outputs[tensor]
            return output
        return None

    def forget(self, tensor: object) -> None:
        """Stop to count the uses of a tensor."""
        self._outputs.pop(tensor, None)  # type: ignore[no-untyped-call]

    def count(self, tree: object) -> None:
        """Count one use of every tensor in nested tuples, lists and dicts."""
        for leaf in tree_leaves(tree):
            output = self.output_of(leaf)
            if output is not None:
                output.uses += 1

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        self.count((args, kwargs))
        return func(*args, **kwargs)
