"""Prefixes that trainers put before the names of a network's tensors."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping

import torch

__all__ = ["COUNTERS", "PREFIXES", "complete_prefixes", "usual_prefix"]

# What trainers put before the names of a network's tensors: DistributedDataParallel, Lightning and
# many more, torch.compile.
PREFIXES = ("module.", "model.", "backbone.", "encoder.", "_orig_mod.")
PREFIXES_NESTED = 3

USUAL = [
    "".join(combination)
    for count in range(PREFIXES_NESTED + 1)
    for combination in itertools.product(PREFIXES, repeat=count)
]

# Buffers of one number that profilers (thop) add to every module.
COUNTERS = ("total_ops", "total_params")


def complete_prefixes(
    state: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    removed: tuple[str, ...] = (),
) -> list[str]:
    """Return the prefixes under which every tensor of a network lies, the shortest first.

    Copies of the right shapes win over others. A state dict that has the network's own names and
    nothing else has no other copy.

    Args:
        state: Tensors of a checkpoint.
        expected: Tensors of the network.
        removed: Names of the modules that were removed from the network.
    """
    required = {key for key in expected if not key.endswith(".num_batches_tracked")}
    if not required:
        return []
    inside = tuple(f"{name}." for name in removed)
    if all(key in expected or key in removed or key.startswith(inside) for key in state) and (
        required <= state.keys()
    ):
        return [""]
    named: Counter[str] = Counter()
    fitting: Counter[str] = Counter()
    for key, value in state.items():
        for prefix in _prefixes_of(key):
            if (name := key[len(prefix) :]) in required:
                named[prefix] += 1
                fitting[prefix] += value.shape == expected[name].shape
    complete = sorted((p for p in named if named[p] == len(required)), key=lambda p: (len(p), p))
    return [prefix for prefix in complete if fitting[prefix] == len(required)] or complete


def usual_prefix(names: Collection[str], expected: Collection[str]) -> str:
    """Return the shortest combination of :data:`PREFIXES` that yields the most expected names."""

    def count_expected(prefix: str) -> int:
        return sum(name.startswith(prefix) and name[len(prefix) :] in expected for name in names)

    # max takes the first of equals, and the shortest come first.
    return max((p for p in USUAL if any(n.startswith(p) for n in names)), key=count_expected)


def _prefixes_of(name: str) -> Iterator[str]:
    yield ""
    for index, letter in enumerate(name):
        if letter == ".":
            yield name[: index + 1]
