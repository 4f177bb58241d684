"""Batch normalisations folded into the convolutions before them.

Behind a trained convolution a batch normalisation is one multiplication and one addition a channel
(Ioffe and Szegedy 2015), which the convolution's own weights and bias can do. The embeddings stay
what they are, up to the rounding of float32, and every map is read and written once less.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from extractor.trial import first_line

__all__ = ["fold", "may_fold"]

log = logging.getLogger(__name__)

# That compute with their weights as they are; others scale these first, or choose among several.
CONVOLUTIONS = (nn.Conv2d, Conv2dSame)
NORMS = (nn.BatchNorm2d, BatchNormAct2d)

TOLERANCE = 1e-3  # of an embedding's length; some networks double what rounding does many times

Embed: TypeAlias = Callable[[torch.Tensor], Sequence[torch.Tensor]]


def fold(network: nn.Module, embed: Embed, pixels: torch.Tensor) -> tuple[str, ...]:
    """Fold what can be folded of a network in float32; changes it in place.

    Left as they are: normalisations of what also goes elsewhere, modules that run several times,
    share their weights or have hooks, and the whole network where its embeddings would change.

    Args:
        embed: runs the network.
        pixels: ``(B, 3, H, W)``, to see how it is wired: of several kinds, since a network may take
            another way for others.

    Returns:
        Dotted names of the normalisations that are gone; an activation or an ``nn.Identity`` is in
        the place of each.
    """
    if not may_fold(network):
        return ()
    with torch.no_grad(), ExitStack() as undo:
        try:
            expected, pairs = _watch(network, embed, pixels)
            alone = embed(pixels[-1:])  # some networks look at how many there are
            for pair in pairs:
                undo.callback(_join(network, pair))
            same = _alike(expected, embed(pixels)) and _alike(alone, embed(pixels[-1:]))
            if not pairs or not same:
                return ()
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # of a network that looks into its own modules
            log.info("no normalisation is folded: %s", first_line(error))
            return ()
        undo.pop_all()
    return tuple(pair.name for pair in pairs)


def may_fold(network: nn.Module) -> bool:
    """Whether a network has normalisations, and no part that is compiled already."""
    modules = list(network.modules())
    compiled = any(hasattr(module, "_orig_mod") for module in modules)
    return not compiled and any(type(module) in NORMS for module in modules)


class _Pair(NamedTuple):
    convolution: nn.Conv2d
    norm: nn.BatchNorm2d
    name: str  # of the normalisation


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


def _watch(
    network: nn.Module, embed: Embed, pixels: torch.Tensor
) -> tuple[Sequence[torch.Tensor], list[_Pair]]:
    """Embeddings, and what can be folded, as one forward pass shows it."""
    calls: Counter[nn.Module] = Counter()
    uses = _Uses()
    met: list[tuple[_Output, _Pair]] = []

    def convolved(module: nn.Conv2d, _: object, output: torch.Tensor) -> None:
        calls[module] += 1
        uses.outputs[output] = _Output(module)

    def normalised(name: str, module: nn.BatchNorm2d, given: tuple[torch.Tensor, ...]) -> None:
        calls[module] += 1
        if given[0] in uses.outputs:
            output: _Output = uses.outputs[given[0]]
            met.append((output, _Pair(output.convolution, module, name)))

    with ExitStack() as hooks:
        for name, module in _foldable(network):
            if type(module) in CONVOLUTIONS:
                handle = module.register_forward_hook(convolved)
            else:
                handle = module.register_forward_pre_hook(functools.partial(normalised, name))
            hooks.callback(handle.remove)
        with uses:
            embeddings = embed(pixels)
    alone = [pair for output, pair in met if output.uses == 1]
    return embeddings, [p for p in alone if calls[p.convolution] == calls[p.norm] == 1]


def _foldable(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Convolutions and normalisations that nothing else knows of, as far as one can see."""
    named = list(network.named_modules(remove_duplicate=False))
    places = Counter(id(module) for _, module in named)
    owners = Counter(id(one) for module in network.modules() for one in module.parameters(False))
    for name, module in named:
        hooked = module._forward_hooks or module._forward_pre_hooks
        own = {name for name, _ in module.named_parameters(recurse=False)}
        shared = any(owners[id(one)] > 1 for one in module.parameters(False))
        if hooked or shared or places[id(module)] > 1:
            continue
        if (type(module) in CONVOLUTIONS and "weight" in own) or (
            type(module) in NORMS and _is_affine(module)
        ):
            yield name, module


def _is_affine(norm: nn.Module) -> bool:
    """Whether a normalisation is one multiplication and one addition a channel, and no more."""
    known = not norm.training and norm.running_mean is not None
    return known and isinstance(getattr(norm, "drop", None), (nn.Identity, type(None)))


def _join(network: nn.Module, pair: _Pair) -> Callable[[], None]:
    """Fold a pair; the answer takes it apart again."""
    convolution, norm = pair.convolution, pair.norm
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight, bias = convolution.weight, convolution.bias
    convolution.weight, convolution.bias = fuse_conv_bn_weights(
        weight,
        bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    path, _, name = pair.name.rpartition(".")
    holder = network.get_submodule(path)
    setattr(holder, name, norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity())

    def undo() -> None:
        setattr(holder, name, norm)
        convolution.weight, convolution.bias = weight, bias

    return undo


def _alike(expected: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> bool:
    """Whether embeddings are the same, as near as float32 comes."""
    for one, other in zip(expected, given, strict=True):
        length = one.flatten(1).norm(dim=1)
        apart = (other - one).flatten(1).norm(dim=1)
        if not bool((apart <= TOLERANCE * length).all()):
            return False
    return True
