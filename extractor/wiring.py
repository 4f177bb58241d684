"""How a network is wired, as one forward pass shows it: what alone follows its convolutions."""

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

__all__ = ["Embed", "Pair", "find_pairs"]

Embed: TypeAlias = Callable[[torch.Tensor], Sequence[torch.Tensor]]


class Pair(NamedTuple):
    """A convolution, and the module that alone takes what it gives; ``name`` is dotted, of that."""

    convolution: nn.Conv2d
    follower: nn.Module
    name: str


def find_pairs(
    network: nn.Module,
    embed: Embed,
    pixels: torch.Tensor,
    convolutions: Sequence[type[nn.Module]],
    is_follower: Callable[[nn.Module], bool],
) -> tuple[Sequence[torch.Tensor], list[Pair]]:
    """Run a network, and see what follows its convolutions.

    Left out are modules that run several times, share their weights, or have hooks.

    Args:
        embed: runs the network.
        pixels: ``(B, 3, H, W)``.
        convolutions: types of the first ones of the pairs.
        is_follower: whether a module may be the second one.

    Returns:
        What ``embed`` gave, and the pairs.
    """
    calls: Counter[nn.Module] = Counter()
    uses = _Uses()
    met: list[tuple[_Output, Pair]] = []

    def convolved(module: nn.Conv2d, _: object, output: torch.Tensor) -> None:
        calls[module] += 1
        uses.outputs[output] = _Output(module)

    def follows(name: str, module: nn.Module, given: tuple[object, ...]) -> None:
        calls[module] += 1
        taken = given[0] if given else None
        if isinstance(taken, torch.Tensor) and taken in uses.outputs:
            output: _Output = uses.outputs[taken]
            if not output.uses:
                met.append((output, Pair(output.convolution, module, name)))

    def followed(_: nn.Module, given: tuple[object, ...], output: object) -> None:
        # Changed in place: nothing takes any more what the convolution gave.
        if given and output is given[0] and isinstance(output, torch.Tensor):
            uses.outputs.pop(output, None)  # type: ignore[no-untyped-call]

    with ExitStack() as hooks:
        for name, module in _lone(network):
            if type(module) in convolutions:
                hooks.callback(module.register_forward_hook(convolved).remove)
            elif is_follower(module):
                before = functools.partial(follows, name)
                hooks.callback(module.register_forward_pre_hook(before).remove)
                hooks.callback(module.register_forward_hook(followed).remove)
        with uses:
            embeddings = embed(pixels)
    alone = [pair for output, pair in met if output.uses == 1]
    return embeddings, [p for p in alone if calls[p.convolution] == calls[p.follower] == 1]


def _lone(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that nothing else knows of, and whose weights are what they compute with."""
    named = list(network.named_modules(remove_duplicate=False))
    places = Counter(id(module) for _, module in named)
    owners = Counter(id(one) for module in network.modules() for one in module.parameters(False))
    for name, module in named:
        hooked = module._forward_hooks or module._forward_pre_hooks
        shared = any(owners[id(one)] > 1 for one in module.parameters(False))
        # Some make their weight anew each time, out of others.
        made = isinstance(module, nn.Conv2d) and "weight" not in module._parameters
        if not (hooked or shared or made or places[id(module)] > 1):
            yield name, module


@dataclass
class _Output:
    """Of a convolution, while it is somewhere."""

    convolution: nn.Conv2d
    uses: int = 0  # operations that take it


class _Uses(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that take the output of a convolution."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.outputs = WeakTensorKeyDictionary()  # keeps none of them in memory

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        for one in tree_leaves((args, kwargs)):
            if isinstance(one, torch.Tensor) and one in self.outputs:
                self.outputs[one].uses += 1
        return func(*args, **kwargs)
