"""Batch normalisations folded into the convolutions before them, and these packed on a CPU.

Behind a trained convolution a batch normalisation is one multiplication and one addition a channel
(Ioffe and Szegedy 2015), which the convolution's own weights and bias can do. The embeddings stay
what they are, up to the rounding of float32, and every map is read and written once less.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from extractor.network.fusion.onednn import Done, can_do, can_pack, is_packable, pack
from extractor.network.fusion.trace import Chain, Embed, find_chains
from extractor.text import first_line

__all__ = ["fold", "may_fold"]

log = logging.getLogger(__name__)

# That compute with their weights as they are; others scale these first, or choose among several.
CONVOLUTIONS = (nn.Conv2d, Conv2dSame)
NORMS = (nn.BatchNorm2d, BatchNormAct2d)

TOLERANCE = 1e-3  # of an embedding's length; some networks double what rounding does many times
MAX_PACKED_BYTES = 2**30  # of weights, which are there twice then


def fold(network: nn.Module, embed: Embed, pixels: torch.Tensor) -> tuple[str, ...]:
    """Fold what can be folded of a network in float32; changes it in place.

    On a CPU its convolutions are packed as well, see :mod:`extractor.network.fusion.onednn`. Left
    as they are: what follows a convolution whose output also goes elsewhere, modules that run
    several times, share their weights or have hooks, and the whole network where its embeddings
    would change.

    Args:
        embed: runs the network.
        pixels: ``(B, 3, H, W)``, to see how it is wired: of several kinds, since a network may take
            another way for others.

    Returns:
        Dotted names of the modules that are gone; an activation or an ``nn.Identity`` is in the
        place of each.
    """
    if not may_fold(network, pixels.device):
        return ()
    one = pixels[-1:]  # some networks look at how many there are
    with torch.no_grad(), ExitStack() as undo:
        try:
            expected, chains = find_chains(network, embed, pixels, _is_convolution, _is_affine)
            alone = embed(one)

            def is_same() -> bool:
                return _alike(expected, embed(pixels)) and _alike(alone, embed(one))

            for chain in chains:
                undo.callback(_join(network, chain))
            packed = _pack(network, embed, one, is_same)
            if packed is None and not (chains and is_same()):
                return ()
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # of a network that looks into its own modules
            log.info("nothing is folded: %s", first_line(error))
            return ()
        undo.pop_all()
    return tuple(dict.fromkeys([chain.name for chain in chains] + (packed or [])))


def may_fold(network: nn.Module, device: torch.device) -> bool:
    """Whether :func:`fold` would find something to do, and no part is compiled already."""
    modules = list(network.modules())
    if any(hasattr(module, "_orig_mod") for module in modules):
        return False
    convolutions = sum(map(is_packable, modules)) if can_pack(device) else 0
    mostly = convolutions > sum(isinstance(module, nn.Linear) for module in modules)
    return mostly or any(type(module) in NORMS for module in modules)


def _pack(
    network: nn.Module, embed: Embed, pixels: torch.Tensor, is_same: Callable[[], bool]
) -> list[str] | None:
    """Pack the convolutions; the names of the activations that went into them.

    None where that cannot be done, and nothing is changed.
    """
    convolutions = [module for module in network.modules() if is_packable(module)]
    weights = sum(one.weight.nbytes for one in convolutions)
    if not can_pack(pixels.device) or weights > MAX_PACKED_BYTES:
        return None
    for sums in (True, False):  # a network may ask what only a tensor can answer
        with ExitStack() as undo:
            try:
                _, found = find_chains(network, embed, pixels, is_packable, can_do, sums=sums)
                chains = {chain.convolution: chain for chain in found}
                for convolution in convolutions:
                    chain = chains.get(convolution, Chain(convolution, None, ""))
                    undo.callback(pack(chain))
                    if chain.follower is not None:
                        undo.callback(_replace(network, chain.name, Done(chain.follower)))
                if is_same():
                    undo.pop_all()
                    return [chain.name for chain in chains.values() if chain.name]
            except Exception as error:  # of an operation that this torch does otherwise
                what = "with additions" if sums else "at all"
                log.info("convolutions are not packed %s: %s", what, first_line(error))
    return None


def _replace(network: nn.Module, name: str, module: nn.Module) -> Callable[[], None]:
    """Put a module in the place of another; the answer brings that back."""
    path, _, last = name.rpartition(".")
    holder = network.get_submodule(path)
    before = getattr(holder, last)
    setattr(holder, last, module)
    return lambda: setattr(holder, last, before)


def _is_convolution(module: nn.Module) -> bool:
    return type(module) in CONVOLUTIONS


def _is_affine(norm: nn.Module, _: bool) -> bool:
    """Whether it is a normalisation of one multiplication and one addition a channel, no more."""
    known = type(norm) in NORMS and not norm.training and norm.running_mean is not None
    return known and isinstance(getattr(norm, "drop", None), (nn.Identity, type(None)))


def _join(network: nn.Module, chain: Chain) -> Callable[[], None]:
    """Fold a normalisation into the convolution before; the answer takes them apart again."""
    convolution, norm = chain.convolution, chain.follower
    assert isinstance(norm, nn.BatchNorm2d)
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
    rest = norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity()
    put_back = _replace(network, chain.name, rest)

    def undo() -> None:
        put_back()
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
