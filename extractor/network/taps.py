"""Embeddings from inside a network: layers by name, their shapes told apart, pooled to vectors."""

from __future__ import annotations

import difflib
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import nn

from extractor.errors import ModelError, UsageError
from extractor.network.probe import BATCH, shapes, trial
from extractor.options import Pooling

__all__ = ["Output", "Taps", "block_names", "find_modules", "given_shapes"]

PRE_LOGITS = "pre-logits"
# Of encoders that never had a classifier: the mean over the positions of what they give.
POOLED_FEATURES = "pooled-features"
LAYER = "layer"

# Below this a generalised mean takes a value for it: roots of negative numbers are none.
GEM_FLOOR = 1e-6

# What the libraries call the parameters that are put before the tokens of the picture.
CLASS_TOKENS = ("cls_token", "class_token")
PREFIX_TOKENS = (*CLASS_TOKENS, "dist_token", "reg_token", "register_tokens")


@dataclass(frozen=True)
class Output:
    """One thing that a backbone gives for each image.

    Attributes:
        shape: of one embedding: ``(dim,)``; without pooling ``(channels, height, width)`` of a map
            or ``(tokens, channels)``.
        definition: ``pre-logits``, ``pooled-features`` or ``layer``.
        layer: dotted name of the module whose output it is; empty for the whole network.
        pool: how the positions of that output became one vector; empty where there were none.
        layout: what the layer itself gives: ``vector``, ``map`` or ``tokens``.
        prefix_tokens: tokens that stand before those of the picture; no pooling counts them but
            ``cls``, which takes the first.
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
        """Numbers in one embedding."""
        return math.prod(self.shape)


# ---------------------------------------------------------------------------------------------
# Names


def find_modules(network: nn.Module, wanted: str) -> tuple[str, ...]:
    """The dotted names of the modules that a user's word means.

    Args:
        wanted: a dotted name, a glob (``*`` and ``?`` stay between two dots, ``**`` does not), or
            the negative number of a block, -1 the last.

    Raises:
        ModelError: none; shows the nearest names.
    """
    names = [name for name, _ in network.named_modules() if name]
    if re.fullmatch(r"-[1-9]\d*", wanted):
        blocks = block_names(network)
        if int(wanted) < -len(blocks):
            count = f"has {len(blocks)} blocks" if blocks else "has no list of blocks"
            raise ModelError(f"no block {wanted}: this {type(network).__name__} {count}")
        return (blocks[int(wanted)],)
    if re.search(r"[*?\[]", wanted):
        try:
            pattern = re.compile(_glob_pattern(wanted))
        except re.error as error:
            raise ModelError(f"layer {wanted!r} is no glob: {error}") from error
        found = tuple(name for name in names if pattern.fullmatch(name))
        if found:
            return found
    elif wanted in names:
        return (wanted,)
    _unknown(network, wanted, names)


def _unknown(network: nn.Module, wanted: str, names: list[str]) -> NoReturn:
    near = difflib.get_close_matches(wanted, names, n=5, cutoff=0.4)
    top = [name for name, _ in network.named_children()]
    hint = f"did you mean {', '.join(near)}?" if near else f"it begins with {', '.join(top[:12])}"
    raise ModelError(f"no module {wanted!r} in this {type(network).__name__}; {hint}")


def _glob_pattern(glob: str) -> str:
    """A regular expression for a glob of dotted names.

    >>> [bool(re.fullmatch(_glob_pattern("layer[!1].*"), n)) for n in ("layer2.0", "layer1.0")]
    [True, False]
    """
    known = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
    pattern = ""
    for piece in re.split(r"(\*\*|\*|\?|\[[^\]]+\])", glob):
        if re.fullmatch(r"\[[^\]]+\]", piece):
            pattern += re.sub(r"^\[!", "[^", piece)
        else:
            pattern += known.get(piece) or re.escape(piece)
    return pattern


def block_names(network: nn.Module) -> tuple[str, ...]:
    """Names of a network's blocks in their order: timm's ``feature_info``, else its one long list.

    Blocks of a vision transformer, stages of a convolutional network; empty where a network has
    several lists of like modules or none.
    """
    info = getattr(network, "feature_info", None)
    known = dict(network.named_modules())
    if info:
        names = [str(entry["module"]) for entry in info if isinstance(entry, Mapping)]
        if names and all(name in known for name in names):
            return tuple(names)
    lists = [
        (name, module)
        for name, module in known.items()
        if isinstance(module, (nn.Sequential, nn.ModuleList))
        and len(module) > 1
        and len({type(child) for child in module}) == 1
        and any(True for _ in module[0].children())
    ]
    outer = [
        (name, module)
        for name, module in lists
        if not any(name.startswith(f"{other}.") for other, _ in lists)
    ]
    if len(outer) != 1:
        return ()
    name, module = outer[0]
    return tuple(f"{name}.{child}" for child, _ in module.named_children())


# ---------------------------------------------------------------------------------------------
# Shapes


@dataclass(frozen=True)
class _Layout:
    kind: str  # vector, map or tokens
    channels_last: bool = True
    prefix: int = 0

    def positions(self, values: torch.Tensor) -> torch.Tensor:
        """``(B, positions, channels)`` of what a layer gives, without prefix tokens."""
        if self.kind == "map":
            return values.flatten(1, 2) if self.channels_last else values.flatten(2).mT
        return (values if self.channels_last else values.mT)[:, self.prefix :]

    def kept(self, values: torch.Tensor) -> torch.Tensor:
        """``(B, channels, height, width)`` of a map, ``(B, tokens, channels)`` of tokens."""
        if self.kind == "map":
            return values.permute(0, 3, 1, 2) if self.channels_last else values
        return values if self.kind == "vector" or self.channels_last else values.mT


def _layout(
    network: nn.Module, layer: nn.Module, shape: tuple[int, ...], size: tuple[int, int]
) -> _Layout | None:
    """What the axes of a layer's output mean, the batch left out; None for what is none of them.

    A map is told by its two axes that have the ratio of the picture; where two readings fit, the
    kind of the layer decides, then what the network says of itself.
    """
    if len(shape) == 1:
        return _Layout("vector")
    if len(shape) == 3:
        first, last = _is_grid(shape[1:], size), _is_grid(shape[:2], size)
        if first or last:
            both = first and last  # as many channels as rows and columns
            return _Layout("map", channels_last=_is_channels_last(network, layer) if both else last)
    if len(shape) == 2:
        most = _prefix_tokens(network)
        patches = _patches(network, size)
        if patches > 1 and 0 <= shape[0] - patches <= most:
            return _Layout("tokens", prefix=shape[0] - patches)
        for count, channels_last in ((shape[0], True), (shape[1], False)):
            for prefix in (0, most, *range(1, most)):
                if _has_grid(count - prefix, size):
                    return _Layout("tokens", channels_last, prefix if channels_last else 0)
        return _Layout("tokens", prefix=min(most, shape[0] - 1))
    return None


def _is_channels_last(network: nn.Module, layer: nn.Module) -> bool:
    """How a layer holds its maps, after what it is made of."""
    kinds = [type(module).__name__ for module in layer.modules()]
    convolves = any(isinstance(module, nn.Conv2d) for module in layer.modules())
    if not convolves and any(isinstance(module, nn.Linear) for module in layer.modules()):
        return True  # a linear layer works on the last axis
    if kinds[-1].endswith("LayerNorm"):  # LayerNorm2d, of both libraries, works on the second one
        return True
    return not convolves and getattr(network, "output_fmt", "") == "NHWC"


def _patches(network: nn.Module, size: tuple[int, int]) -> int:
    """How many patches a vision transformer cuts a picture into; 1 if it is none."""
    embed = getattr(network, "patch_embed", network)
    patch = getattr(embed, "patch_size", None)
    if isinstance(patch, int):
        patch = (patch, patch)
    if not (isinstance(patch, (tuple, list)) and len(patch) == 2):
        return 1
    return (size[0] // int(patch[0])) * (size[1] // int(patch[1]))


def _is_grid(axes: tuple[int, ...], size: tuple[int, int]) -> bool:
    """Whether (rows, columns) have the ratio of a picture of ``size``, up to rounding."""
    (rows, columns), (height, width) = axes, size
    return rows <= height and columns <= width and abs(rows * width - columns * height) < max(size)


def _has_grid(count: int, size: tuple[int, int]) -> bool:
    return any(
        count % rows == 0 and _is_grid((rows, count // rows), size)
        for rows in range(1, min(count, size[0]) + 1)
    )


def _prefix_tokens(network: nn.Module) -> int:
    declared = getattr(network, "num_prefix_tokens", None)
    if isinstance(declared, int):
        return declared
    named = ((name.rpartition(".")[2], value) for name, value in network.named_parameters())
    return sum(value.shape[-2] for name, value in named if name in PREFIX_TOKENS and value.ndim > 1)


def _has_class_token(network: nn.Module) -> bool:
    return any(name.rpartition(".")[2] in CLASS_TOKENS for name, _ in network.named_parameters())


# ---------------------------------------------------------------------------------------------
# Pooling


def _pool(values: torch.Tensor, layout: _Layout, pooling: Pooling) -> torch.Tensor:
    if pooling.kind == "none" or layout.kind == "vector":
        # A copy: the next layer may well work in place.
        return layout.kept(values).clone(memory_format=torch.contiguous_format)
    if pooling.kind == "cls":
        return values[:, 0].clone()
    positions = layout.positions(values).float()
    if pooling.kind == "max":
        return positions.amax(1)
    if pooling.kind == "gem":
        powers = positions.clamp_min(GEM_FLOOR).pow(pooling.power)
        return powers.mean(1).pow(1 / pooling.power)
    if pooling.kind == "avg+max":
        return torch.cat([positions.mean(1), positions.amax(1)], 1)
    return positions.mean(1)


# ---------------------------------------------------------------------------------------------
# Taking them


class _Done(BaseException):
    """All that was asked for is there: the rest of the network need not be computed.

    No ``Exception``, which a network might catch.
    """


@dataclass
class _Seen:
    """What the hooks of one forward pass saw."""

    calls: list[int]
    values: list[torch.Tensor | None]
    left: int


@dataclass(frozen=True)
class _Tap:
    layout: _Layout
    calls: int  # of the module in one forward pass; the last one counts


def _only_tensor(output: Any) -> Any:
    """A layer's output, where it comes with what is no tensor, such as the size of a map."""
    if isinstance(output, (tuple, list)):
        tensors = [one for one in output if isinstance(one, torch.Tensor)]
        if len(tensors) == 1:
            return tensors[0]
    return output


class Taps:
    """Takes the outputs of modules out of a network's forward pass and pools them.

    Hooks stay on the network; they do nothing in a forward pass that was not begun here.

    Attributes:
        outputs: what is taken, in the order asked for.

    Args:
        names: dotted names of modules; the empty one is the whole network.
        size: (height, width) of its images.
        model: name of the network for error messages.
        definition: of the outputs.

    Raises:
        ModelError: a module that does not run in a forward pass, or gives no tensor for each image.
        UsageError: ``cls`` of something that has no class token.
    """

    def __init__(
        self,
        network: nn.Module,
        names: tuple[str, ...],
        pooling: Pooling,
        size: tuple[int, int],
        model: str,
        definition: str = LAYER,
    ) -> None:
        self._pooling = pooling
        self._running = threading.local()
        modules = [network.get_submodule(name) for name in names]
        watched = _watch(network, modules, size, model)
        taps, outputs = [], []
        for name, module, watch in zip(names, modules, watched, strict=True):
            layout = watch.layout(network, module, size, f"{model}: layer {name!r}")
            if pooling.kind == "cls" and not (
                layout.kind == "tokens" and layout.prefix and _has_class_token(network)
            ):
                what = "tokens" if layout.kind == "tokens" else f"a {layout.kind}"
                raise UsageError(
                    f"pool cls: {name!r} of {model} gives {what} without a class token; try avg"
                )
            pooled = _pool(torch.zeros(1, *watch.shape), layout, pooling)
            taps.append(_Tap(layout, watch.calls))
            outputs.append(
                Output(
                    tuple(pooled.shape[1:]),
                    definition,
                    name,
                    "" if layout.kind == "vector" else str(pooling),
                    layout.kind,
                    layout.prefix,
                )
            )
        self._taps = tuple(taps)
        self.outputs = tuple(outputs)
        for place, module in enumerate(modules):
            module.register_forward_hook(self._hook(place))

    def __call__(self, network: nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        count = len(self._taps)
        seen = self._running.seen = _Seen([0] * count, [None] * count, count)
        try:
            network(pixels)
        except _Done:
            pass
        finally:
            self._running.seen = None
        values = [value for value in seen.values if value is not None]
        if len(values) != count:
            missing = [o.layer for o, v in zip(self.outputs, seen.values, strict=True) if v is None]
            raise ModelError(f"layers {missing} did not run as they did with blank images")
        return tuple(values)

    def _hook(self, place: int) -> Callable[[nn.Module, Any, Any], None]:
        tap = self._taps[place]

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen: _Seen | None = getattr(self._running, "seen", None)
            if seen is None:
                return
            seen.calls[place] += 1
            if seen.calls[place] == tap.calls:
                seen.values[place] = _pool(_only_tensor(output), tap.layout, self._pooling)
                seen.left -= 1
                if not seen.left:
                    raise _Done

        return hook


@dataclass
class _Watch:
    """What one module gave in a trial, the last time that it ran."""

    calls: int = 0
    output: object = None
    shape: tuple[int, ...] = field(default=())

    def layout(
        self, network: nn.Module, module: nn.Module, size: tuple[int, int], what: str
    ) -> _Layout:
        if not self.calls:
            inner = [name for name, _ in module.named_children()]
            raise ModelError(
                f"{what} does not run as a whole in a forward pass"
                + (f"; it holds {', '.join(inner[-8:])}" if inner else "")
            )
        layout = None
        values = _only_tensor(self.output)
        if isinstance(values, torch.Tensor) and values.shape[:1] == (BATCH,):
            self.shape = tuple(values.shape[1:])
            layout = _layout(network, module, self.shape, size)
        if layout is None:
            raise ModelError(
                f"{what} gives {shapes(self.output)} for {BATCH} images, expected one tensor with "
                "a vector, a map or tokens for each; try a layer beside or inside it"
            )
        return layout


def given_shapes(network: nn.Module, size: tuple[int, int]) -> dict[str, list[int] | None]:
    """What each module that runs in a forward pass gives for one image, by its dotted name.

    A shape without the batch; None where it gives no single tensor. A network on the meta device
    computes nothing; empty where it cannot run there.
    """
    names = [name for name, _ in network.named_modules() if name]
    modules = [network.get_submodule(name) for name in names]
    try:
        watched = _watch(network, modules, size, type(network).__name__)
    except ModelError:
        return {}
    given: dict[str, list[int] | None] = {}
    for name, watch in zip(names, watched, strict=True):
        if watch.calls:
            values = _only_tensor(watch.output)
            given[name] = list(values.shape[1:]) if isinstance(values, torch.Tensor) else None
    return given


def _watch(
    network: nn.Module, modules: list[nn.Module], size: tuple[int, int], model: str
) -> list[_Watch]:
    watches = [_Watch() for _ in modules]

    def watching() -> Iterator[torch.utils.hooks.RemovableHandle]:
        for watch, module in zip(watches, modules, strict=True):

            def hook(_: nn.Module, __: Any, output: object, watch: _Watch = watch) -> None:
                watch.calls += 1
                watch.output = output

            yield module.register_forward_hook(hook)

    handles = list(watching())
    try:
        trial(network, size, what=model)
    finally:
        for handle in handles:
            handle.remove()
    return watches
