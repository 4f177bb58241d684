"""Files of weights for transformers of timm in another layout: image size, pooling, registers.

A file that fits as it is needs none of this. Otherwise timm's own conversion applies: it knows the
layouts in which networks were published, and resamples position embeddings for an image size.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from extractor.models.checkpoint import MisfitError, State, find_prefix, fits, without_prefix
from extractor.models.libraries import removed_modules

__all__ = ["fitted"]

log = logging.getLogger(__name__)

Arguments: TypeAlias = "dict[str, Any]"

# Older names of the last layer.
OLD_HEADS = ("head", "fc", "classifier", "head.fc")


def fitted(
    create: Callable[..., nn.Module],
    remove_heads: Callable[[nn.Module], object],
    state: State,
    size: tuple[int, int] | None,
    label: str,
) -> tuple[Arguments, State]:
    """Return further arguments of an architecture, and a state dict that fits it with them.

    What nothing helps is returned as it was; loading it says what is wrong.

    Args:
        create: Builds the network. Takes arguments of ``timm.create_model``.
        remove_heads: Takes the classifiers off a network.
        state: Tensors of the file.
        size: (height, width) that was asked for; None stands for the network's own.
        label: The file and the model, for the error message.

    Raises:
        MisfitError: The file is of another image size, and none was asked for.
        WeightsError: The file holds several copies of the network.
    """
    try:
        own = _Sketch(create, remove_heads)
    except Exception:  # a network that cannot be built without values
        return {}, state
    if own.takes(state, label):
        return {}, state
    bare = without_prefix(state, find_prefix(state, own.expected, own.removed, label)[0])
    bare = _without_decoder(bare)
    variant = _variant(bare, own.expected)
    tried = [variant] if size is None else [variant, {**variant, "img_size": size}]
    for arguments in tried:
        if (sketch := own.changed(arguments)) and sketch.takes(bare, label):
            _announce(variant, label)
            return arguments, bare
    if size is None:
        _check_size(bare, own.changed(variant) or own, label)
    for arguments in reversed(tried):
        if converted := own.convert(bare, arguments):
            _announce(variant, label)
            return arguments, converted
    return {}, state


def _announce(variant: Arguments, label: str) -> None:
    if variant:
        chosen = ", ".join(f"{name}={value}" for name, value in variant.items())
        log.warning("%s: built with %s, as the tensors suggest", label, chosen)


class _Sketch:
    """A network without values, to compare names and shapes."""

    def __init__(
        self, create: Callable[..., nn.Module], remove_heads: Callable[[nn.Module], object]
    ) -> None:
        self._create = create
        self._remove_heads = remove_heads
        with torch.device("meta"):
            self.module = create()
        self._whole = self.module.state_dict()
        remove_heads(self.module)
        self.expected = self.module.state_dict()
        self.removed = removed_modules(tuple(self._whole), self.module)

    def takes(self, state: State, label: str) -> bool:
        return fits(state, self.expected, self.removed, label)

    def changed(self, arguments: Mapping[str, Any]) -> _Sketch | None:
        """Return the network with further arguments, or None if it does not take them."""
        try:
            return _Sketch(lambda **more: self._create(**{**arguments, **more}), self._remove_heads)
        except Exception:  # whatever a constructor raises
            return None

    def convert(self, state: State, arguments: Arguments) -> State | None:
        """Return a state dict as timm converts it for the network, or None if it cannot.

        timm is strict about all tensors but takes no other number of classes. Classifiers pass by
        its conversion: zeros stand for them, and the file's own come back afterwards.
        """
        if not all(_is_plain(key, value) for key, value in state.items()):
            return None
        network = self.changed(arguments) if arguments else self
        if network is None:
            return None
        heads = {key: value for key, value in network._whole.items() if key not in network.expected}
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # some conversions print
                module = self._create(
                    pretrained=True,
                    pretrained_cfg_overlay={"state_dict": _with_heads(state, heads)},
                    **arguments,
                )
        except Exception:  # each conversion fails in its own way on what it does not know
            return None
        loaded = module.state_dict().items()
        converted = State((key, value) for key, value in loaded if key not in heads)
        converted.update((key, value) for key, value in state.items() if key in heads)
        return converted


def _with_heads(state: State, heads: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors with classifiers of the right shapes."""
    filled = dict(state)
    for key, value in heads.items():
        tail = key.rpartition(".")[2]
        named = [each for each in (key, *(f"{old}.{tail}" for old in OLD_HEADS)) if each in state]
        filled[named[0] if named else key] = torch.zeros(value.shape)
    return filled


def _is_plain(key: str, value: torch.Tensor) -> bool:
    """Return whether timm would copy a tensor as it is meant; indexes and counters are integers."""
    if value.is_meta or value.layout is not torch.strided:
        return False
    return value.is_floating_point() or value.ndim < 2 or "index" in key


def _without_decoder(state: State) -> State:
    """Return a masked autoencoder's tensors without the part that only its training needs."""
    if "decoder_pos_embed" not in state:
        return state
    needed = {k: v for k, v in state.items() if k != "mask_token" and not k.startswith("decoder_")}
    return State(needed.items())


def _variant(state: State, expected: Mapping[str, torch.Tensor]) -> Arguments:
    """Return the arguments with which a transformer has the tokens and the norm that a file has.

    With ``global_pool="avg"`` the mean of the image's tokens is normalized, by ``fc_norm`` in place
    of ``norm``.
    """

    def only(name: str, there: Mapping[str, object], other: Mapping[str, object]) -> bool:
        return name in there and name not in other

    arguments: Arguments = {}
    registers = [state[key] for key in ("reg_token", "register_tokens") if key in state]
    if registers and registers[0].ndim == 3 and "reg_token" not in expected:
        arguments["reg_tokens"] = registers[0].shape[1]
        if "register_tokens" in state:  # timm's conversion takes the class token off pos_embed
            arguments["no_embed_class"] = True
    if only("cls_token", expected, state) and "pos_embed" in state:
        has_norm = "fc_norm.weight" in state
        return {**arguments, "class_token": False, "global_pool": "avg", "fc_norm": has_norm}
    if only("fc_norm.weight", state, expected) and only("norm.weight", expected, state):
        return {**arguments, "global_pool": "avg"}
    if only("norm.weight", state, expected) and only("fc_norm.weight", expected, state):
        # A network that was trained to restore masked images: timm converts it.
        return arguments if "mask_token" in state else {**arguments, "global_pool": "token"}
    return arguments


# ---------------------------------------------------------------------------------------------
# Image size


def _check_size(state: State, network: _Sketch, label: str) -> None:
    """Refuse a file that was trained at another image size.

    Raises:
        MisfitError: It was. The message names the size, as far as the file tells.
    """
    positions, own = state.get("pos_embed"), network.expected.get("pos_embed")
    embed = getattr(network.module, "patch_embed", None)
    patch, grid_size = (getattr(embed, name, None) for name in ("patch_size", "grid_size"))
    if positions is not None and own is not None and patch and grid_size:
        _check_positions(state, positions.shape, own.shape, (patch[0], grid_size), label)
    for key, value in state.items():
        table = network.expected.get(key)
        if "relative_position" in key and table is not None and table.shape != value.shape:
            window, own_window = _window(len(value)), _window(len(table))
            if window and grid_size == (own_window, own_window) and patch:  # one window, the image
                edge = str(window * patch[0])
                _raise_size(state, label, f"{edge} pixels", edge)
            _raise_size(state, label, f"{key} has {len(value)} rows instead of {len(table)}", "N")


def _check_positions(
    state: State,
    shape: torch.Size,
    own_shape: torch.Size,
    patches: tuple[int, tuple[int, int]],
    label: str,
) -> None:
    """Compare the shapes of two tables of positions, ``(1, tokens, channels)``.

    Args:
        state: Tensors of the file.
        shape: Of its table.
        own_shape: Of the network's.
        patches: Edge of a patch in pixels, and the network's grid of patches.
        label: The file and the model, for the error message.

    Raises:
        MisfitError: They are of grids of another size.
    """
    edge, own_grid = patches
    if len(shape) != 3 or len(own_shape) != 3 or shape == own_shape:
        return
    grid = _grid(shape[1], (own_shape[1] - math.prod(own_grid), int("cls_token" in state)))
    if grid is None:
        rows = f"pos_embed has {shape[1]} rows instead of {own_shape[1]}"
        _raise_size(state, label, rows, "HEIGHTxWIDTH")
    elif (grid, grid) != own_grid:
        sizes = f"{grid * edge} pixels instead of {own_grid[0] * edge}"
        _raise_size(state, label, sizes, str(grid * edge))


def _grid(tokens: int, ahead: tuple[int, ...]) -> int | None:
    """Return the edge of the square grid of an image's tokens."""
    edges = (math.isqrt(max(0, tokens - each)) for each in ahead)
    return next((e for e, each in zip(edges, ahead, strict=True) if e * e + each == tokens), None)


def _window(rows: int) -> int | None:
    """Return the edge of the square window of a table of relative positions.

    The table has a row for each offset, and three for the class token if there is one.
    """
    edge = _grid(rows, (0, 3))
    return (edge + 1) // 2 if edge and edge % 2 else None


def _raise_size(state: State, label: str, sizes: str, edge: str) -> None:
    raise MisfitError(
        f"{label}: the weights are of another image size ({sizes})",
        state,
        advice=f"Use the size that they were trained at: --image-size {edge}",
    )
