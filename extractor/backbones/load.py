"""From the name of a model to a :class:`Backbone`."""

from __future__ import annotations

import difflib
import logging
import os

from extractor.backbones import from_timm, from_torchvision
from extractor.backbones.backbone import Backbone
from extractor.devices import resolve_device, resolve_precision
from extractor.errors import ModelError
from extractor.options import DEFAULT_MODEL, Options

__all__ = ["load_backbone"]

log = logging.getLogger(__name__)

_DEFAULT = Options()


def load_backbone(
    model: str = DEFAULT_MODEL,
    *,
    weights: str | os.PathLike[str] = _DEFAULT.weights,
    seed: int = _DEFAULT.seed,
    device: str = _DEFAULT.device,
    precision: str = _DEFAULT.precision,
) -> Backbone:
    """Build a network of timm or torchvision, load its weights and take off its classifier.

    Args:
        model: ``timm:NAME``, ``torchvision:NAME``, or NAME alone, which means timm where timm has
            it; a timm name may carry its weights tag (``resnet50.a1_in1k``).
        weights: ``default``, ``random``, a tag of the library (``a1_in1k``, ``IMAGENET1K_V1``), or
            a ``.pth`` or ``.safetensors`` file with a state dict.
        seed: of random weights.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        precision: ``auto`` (float32), ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        ModelError: unknown model, or a head that cannot be removed.
        UsageError: an option out of its range.
        WeightsError: weights that are not here, cannot be read, or do not fit.
        DeviceError: a device that this machine does not have.
    """
    wanted = os.fspath(weights)
    Options(weights=wanted, seed=seed, device=device, precision=precision)  # checks them
    target = resolve_device(device)  # first: it is the cheapest to be wrong
    dtype = resolve_precision(precision)
    library, name = _resolve_name(model)
    if wanted == "random":
        log.warning("%s: RANDOM weights (seed %d): the embeddings mean nothing", model, seed)
    build = from_timm.build if library == "timm" else from_torchvision.build
    return build(name, wanted, seed).to(target, dtype)


def _resolve_name(model: str) -> tuple[str, str]:
    """(library, name in that library) for a name as it was typed."""
    library, colon, name = model.rpartition(":")
    if colon and library not in ("timm", "torchvision"):
        raise ModelError(
            f"model {model!r}: unknown library {library!r}; expected timm:NAME, torchvision:NAME "
            "or NAME alone"
        )
    if library in ("", "timm") and from_timm.has(name):
        return "timm", name
    if library in ("", "torchvision") and name in from_torchvision.names():
        return "torchvision", name
    known = ([] if library == "torchvision" else from_timm.names()) + (
        [] if library == "timm" else from_torchvision.names()
    )
    near = difflib.get_close_matches(name.partition(".")[0], sorted(set(known)), n=5, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "expected a name such as resnet50"
    raise ModelError(f"unknown model {model!r}; {hint}")
