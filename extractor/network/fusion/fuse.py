"""Fuse batch normalizations and activations into convolutions: the entry to this folder.

The embeddings stay the same up to float32 rounding, and the network reads and writes each feature
map less often.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import nn

from extractor.network.fusion.fold_batchnorm import NORMS, fold_chain, is_affine, is_foldable
from extractor.network.fusion.onednn import (
    can_pack,
    is_packable,
    pack_convolutions,
    without_packing,
)
from extractor.network.fusion.trace import Embed, find_chains
from extractor.system.devices import is_broken_device, is_out_of_memory
from extractor.system.float32 import full_float32
from extractor.text import first_line

__all__ = ["fuse", "may_fuse", "should_fuse", "without_packing"]

log = logging.getLogger(__name__)

# Relative to the length of an embedding; some networks double a rounding error many times.
TOLERANCE = 1e-3


def fuse(
    network: nn.Module, embed: Embed, pixels: torch.Tensor, *, compared: Embed | None = None
) -> tuple[str, ...]:
    """Fold batch normalizations into convolutions, and pack these on a CPU; in place.

    A follower stays if the convolution's output also goes elsewhere, if it runs several times,
    shares its weights, or has hooks. The whole network stays if its embeddings would change.

    Args:
        network: A network in float32 and eval mode.
        embed: Runs the network on ``(B, 3, H, W)`` pixels.
        pixels: ``(B, 3, H, W)`` float, RGB, normalized: images of several kinds, since a network
            may take another path for each.
        compared: Runs the network as the embeddings are computed, if not with ``embed``: perhaps
            several times, and with other image sizes.

    Returns:
        Dotted names of the fused modules. Each is now an activation or an ``nn.Identity``.
    """
    if not may_fuse(network, pixels.device):
        return ()
    single = pixels[-1:]  # some networks depend on the number of images
    with torch.no_grad(), full_float32(), ExitStack() as undo:
        try:
            expected, chains = find_chains(network, embed, pixels, is_foldable, is_affine)
            if compared is None:
                compared = embed
            else:
                expected = compared(pixels)
            expected_single = compared(single)
            change = 0.0

            def is_same() -> bool:
                nonlocal change
                change = max(
                    _change(expected, compared(pixels)),
                    _change(expected_single, compared(single)),
                )
                return change <= TOLERANCE

            for chain in chains:
                undo.callback(fold_chain(network, chain))
            packed = pack_convolutions(network, embed, single, is_same)
            if packed is None and not (chains and is_same()):
                if chains:
                    log.warning(
                        "%s: batch normalizations are not folded; the embeddings would change by "
                        "%.2g of their length, expected %g at most",
                        *(type(network).__name__, change, TOLERANCE),
                    )
                return ()
        except Exception as error:  # a network may inspect its own modules
            if pixels.device.type != "cpu" and (is_out_of_memory(error) or is_broken_device(error)):
                raise
            log.info("nothing is fused: %s", first_line(error))
            return ()
        undo.pop_all()
    return tuple(dict.fromkeys([chain.name for chain in chains] + (packed or [])))


def may_fuse(network: nn.Module, device: torch.device) -> bool:
    """Return whether :func:`fuse` has something to try: False for a compiled network."""
    modules = list(network.modules())
    if any(hasattr(module, "_orig_mod") for module in modules):
        return False
    convolutions = sum(map(is_packable, modules)) if can_pack(device) else 0
    mostly = convolutions > sum(isinstance(module, nn.Linear) for module in modules)
    return mostly or any(type(module) in NORMS for module in modules)


def should_fuse(choice: str, device: torch.device) -> bool:
    """Return whether a run fuses its networks.

    Args:
        choice: ``auto`` or ``off``, see :class:`extractor.options.Options`.
        device: The device that computes.

    ``auto`` fuses on a CPU, where it is measured (docs/performance.md), and on no other device.
    """
    return choice == "auto" and device.type == "cpu"


def _change(expected: Sequence[torch.Tensor], embeddings: Sequence[torch.Tensor]) -> float:
    """Return the largest change of an embedding relative to its length; inf if it is not finite."""
    largest = 0.0
    for before, after in zip(expected, embeddings, strict=True):
        length = before.flatten(1).norm(dim=1)
        distance = (after - before).flatten(1).norm(dim=1)
        changes = torch.where(distance == 0, 0.0, distance / length)
        largest = max(largest, float(changes.nan_to_num(math.inf, math.inf).max()))
    return largest
