"""Find modules of a network by dotted name, glob, or block number."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import NoReturn

from torch import nn

from extractor.errors import ModelError
from extractor.text import plural

__all__ = ["block_names", "find_modules"]


def find_modules(network: nn.Module, pattern: str) -> tuple[str, ...]:
    """Return the dotted names of the modules that match a name, a glob, or a block number.

    >>> find_modules(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "[01]")
    ('0', '1')

    Args:
        network: The network to search.
        pattern: A dotted name; a glob, in which ``*`` and ``?`` stay between two dots and ``**``
            does not; or the negative number of a block, -1 being the last.

    Raises:
        ModelError: Nothing matches. The message lists the nearest names.
    """
    names = [name for name, _ in network.named_modules() if name]
    if re.fullmatch(r"-[1-9]\d*", pattern):
        blocks = block_names(network)
        if int(pattern) < -len(blocks):
            count = f"has {plural(len(blocks), 'block')}" if blocks else "has no list of blocks"
            raise ModelError(f"no block {pattern}: this {type(network).__name__} {count}")
        return (blocks[int(pattern)],)
    if re.search(r"[*?\[]", pattern):
        try:
            regex = re.compile(_glob_regex(pattern))
        except re.error as error:
            raise ModelError(f"layer {pattern!r} is not a valid glob: {error}") from error
        found = tuple(name for name in names if regex.fullmatch(name))
        if found:
            return found
    elif pattern in names:
        return (pattern,)
    _raise_unknown(network, pattern, names)


def _raise_unknown(network: nn.Module, pattern: str, names: list[str]) -> NoReturn:
    similar = difflib.get_close_matches(pattern, names, n=5, cutoff=0.4)
    first = [name for name, _ in network.named_children()][:12]
    hint = (
        f"did you mean {', '.join(similar)}?" if similar else f"it begins with {', '.join(first)}"
    )
    raise ModelError(f"no module {pattern!r} in this {type(network).__name__}; {hint}")


def _glob_regex(glob: str) -> str:
    """Translate a glob of dotted names to a regular expression.

    >>> [bool(re.fullmatch(_glob_regex("layer[!1].*"), n)) for n in ("layer2.0", "layer1.0")]
    [True, False]
    """
    wildcards = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
    regex = ""
    for piece in re.split(r"(\*\*|\*|\?|\[[^\]]+\])", glob):
        if re.fullmatch(r"\[[^\]]+\]", piece):
            regex += re.sub(r"^\[!", "[^", piece)
        else:
            regex += wildcards.get(piece) or re.escape(piece)
    return regex


def block_names(network: nn.Module) -> tuple[str, ...]:
    """Return the names of a network's blocks in order of execution.

    Blocks are what timm's ``feature_info`` lists: blocks of a vision transformer, stages of a
    convolutional network. Without it, they are the members of the network's only list of modules
    of one type. Empty if there is no such list, or more than one.
    """
    info = getattr(network, "feature_info", None)
    modules = dict(network.named_modules())
    if info:
        names = [str(entry["module"]) for entry in info if isinstance(entry, Mapping)]
        if names and all(name in modules for name in names):
            return tuple(names)
    lists = [
        (name, module)
        for name, module in modules.items()
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
