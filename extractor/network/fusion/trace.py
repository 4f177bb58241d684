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
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["Chain", "Embed", "MayFollow", "find_chains"]

Embed: TypeAlias = Callable[[torch.Tensor], Sequence[torch.Tensor]]
MayFollow: TypeAlias = Callable[[nn.Module, bool], bool]
"""Whether a module may be a follower; True for one behind an addition."""

ADD, ADD_IN_PLACE = torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor


class Chain(NamedTuple):
    """A convolution and what alone takes what it gives: an addition, a module, or both in turn.

    Attributes:
        follower: the module; None where that is not alone, or none.
        name: dotted, of the follower.
        is_sum: a tensor of the same shape and type is added to what the convolution gives.
        may_overwrite: that tensor was made in the same pass, and nothing takes or keeps it
            afterwards; for pixels of another size or layout it may be something else.
    """

    convolution: nn.Conv2d
    follower: nn.Module | None
    name: str
    is_sum: bool = False
    may_overwrite: bool = False

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
    may_follow: MayFollow,
    *,
    sums: bool = False,
) -> tuple[Sequence[torch.Tensor], list[Chain]]:
    """Run a network, and see what follows its convolutions.

    Left out are modules that share their weights or have hooks, convolutions that run several
    times, and followers that also follow something else.

    Args:
        embed: runs the network.
        pixels: ``(B, 3, H, W)``.
        may_lead: whether a module is a convolution that may be the first of a chain.
        may_follow: whether one may be the follower.
        sums: look for additions, too; else there is a follower in every chain.

    Returns:
        What ``embed`` gave, and the chains.
    """
    calls: Counter[nn.Module] = Counter()
    watch = _Watch(sums=sums)
    outputs: list[_Output] = []
    # Hooks of others may keep what they see.
    hooked = any(one._forward_hooks or one._forward_pre_hooks for one in network.modules())

    def convolved(module: nn.Conv2d, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        calls[module] += 1
        outputs.append(_Output(module))
        watch.convolved(given[0], output, outputs[-1])

    def follows(name: str, module: nn.Module, given: tuple[object, ...]) -> None:
        calls[module] += 1
        taken = watch.output_of(given[0]) if given else None
        if taken is not None and not taken.uses and may_follow(module, bool(taken.terms)):
            taken.follower, taken.name = module, name

    def followed(_: nn.Module, given: tuple[object, ...], output: object) -> None:
        # Changed in place: nothing takes any more what the convolution gave.
        if given and output is given[0]:
            watch.forget(output)

    with ExitStack() as hooks:
        for name, module in _lone(network):
            if may_lead(module):
                hooks.callback(module.register_forward_hook(convolved).remove)
            elif may_follow(module, False):
                before = functools.partial(follows, name)
                hooks.callback(module.register_forward_pre_hook(before).remove)
                hooks.callback(module.register_forward_hook(followed).remove)
        with watch:
            embeddings = embed(pixels)
        watch.taken(embeddings)
        watch.finish()
    chains = [one.chain() for one in outputs if calls[one.convolution] == 1]
    places = Counter(one.follower for one in chains)
    for place, one in enumerate(chains):
        if one.follower is not None and places[one.follower] != calls[one.follower]:
            one = one._replace(follower=None, name="")
        chains[place] = one._replace(may_overwrite=one.may_overwrite and not hooked)
    return embeddings, [one for one in chains if one.is_sum or one.follower is not None]


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


@dataclass(eq=False)
class _Output:
    """Of a convolution, or of an addition to such a one, while it is somewhere.

    Attributes:
        uses: operations that take it.
        follower: the module of the first of them, with its name.
        terms: of an addition, the outputs that it takes.
        sum: of an output, the addition that takes it.
        given: the convolution, as long as there are no uses.
        is_given_lost: it was changed in place before there was one.
        may_overwrite: see :class:`Chain`.
    """

    convolution: nn.Conv2d
    uses: int = 0
    follower: nn.Module | None = None
    name: str = ""
    terms: tuple[_Output, ...] = ()
    sum: _Output | None = None
    given: torch.UntypedStorage | None = None
    is_given_lost: bool = False
    may_overwrite: bool = False

    @property
    def is_alone(self) -> bool:
        return self.uses == 1 and not self.is_given_lost

    def chain(self) -> Chain:
        terms = self.sum.terms if self.sum is not None else ()
        is_sum = next((one for one in terms if one.is_alone), None) is self
        last = self.sum if self.sum is not None and is_sum else self
        follower, name = (last.follower, last.name) if last.uses == 1 else (None, "")
        return Chain(self.convolution, follower, name, is_sum, self.may_overwrite)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that take the output of a convolution, and sees additions."""

    def __init__(self, *, sums: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sums = sums
        self._outputs = WeakTensorKeyDictionary()  # keeps none of them in memory
        # By where tensors lie. What was made in this pass is held weakly, so that nothing else
        # comes to lie there.
        self._made: dict[int, StorageWeakRef] = {}
        self._waiting: dict[int, list[_Output]] = {}  # of convolutions of what lies there
        self._added: dict[int, _Output] = {}  # what lies there, to these

    def convolved(self, given: torch.Tensor, tensor: torch.Tensor, output: _Output) -> None:
        """Watch what takes the tensor that is a convolution's output."""
        self._outputs[tensor] = output
        if self._sums:
            output.given = given.untyped_storage()  # kept: nothing else comes to lie there
            self._waiting.setdefault(_place(given), []).append(output)

    def output_of(self, tensor: object) -> _Output | None:
        """What a tensor is the output of, where that is watched."""
        if isinstance(tensor, torch.Tensor) and tensor in self._outputs:
            output: _Output = self._outputs[tensor]
            return output
        return None

    def forget(self, tensor: object) -> None:
        """What takes a tensor from now on is not to be counted."""
        self._outputs.pop(tensor, None)  # type: ignore[no-untyped-call]

    def taken(self, tree: object) -> list[torch.Tensor]:
        """Count a use of all tensors of a tree; these tensors."""
        tensors = [one for one in tree_leaves(tree) if isinstance(one, torch.Tensor)]
        for one in tensors:
            output = self.output_of(one)
            if output is not None:
                output.uses += 1
            if self._sums and (term := self._added.get(_place(one))) is not None:
                term.may_overwrite = False
        return tensors

    def finish(self) -> None:
        """See what is still there: somebody keeps it."""
        for place, term in self._added.items():
            if not self._made[place].expired():  # type: ignore[no-untyped-call]
                term.may_overwrite = False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        given = self.taken((args, kwargs))
        result = func(*args, **kwargs)
        if self._sums:
            outputs = [one for one in map(self.output_of, given) if one is not None]
            if func in (ADD, ADD_IN_PLACE) and len(given) == len(args) == 2 and not kwargs:
                self._add(given[0], given[1], result, in_place=func is ADD_IN_PLACE)
            self._follow(given, outputs, result, is_mutable=func._schema.is_mutable)
        return result

    def _add(
        self, one: torch.Tensor, other: torch.Tensor, result: torch.Tensor, *, in_place: bool
    ) -> None:
        if one.shape != other.shape or one.dtype != other.dtype:
            return
        terms = []
        for mine, added in ((one, other), (other, one))[: 1 if in_place else 2]:
            term = self.output_of(mine)
            if term is None or term.terms:
                continue
            terms.append(term)
            place = _place(added)
            # Whoever waits for what lies there may come to compute only after this.
            is_whole = added.untyped_storage().nbytes() == added.nbytes
            if is_whole and place in self._made and not self._waiting.get(place):
                term.may_overwrite = True
                self._added[place] = term
        if terms:
            self._outputs[result] = addition = _Output(terms[0].convolution, terms=tuple(terms))
            for term in terms:
                term.sum = addition

    def _follow(
        self,
        given: Sequence[torch.Tensor],
        outputs: Sequence[_Output],
        result: object,
        *,
        is_mutable: bool,
    ) -> None:
        """Keep true what is known of tensors that an operation took, and of those that it gave."""
        for output in outputs:
            if output.given is not None:
                self._waiting[output.given._cdata].remove(output)
                output.given = None
        places = {_place(one) for one in given}
        if is_mutable:
            for output in (one for place in places for one in self._waiting.get(place, ())):
                output.is_given_lost = True
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor) and _place(one) not in places:
                held = StorageWeakRef(one.untyped_storage())  # type: ignore[no-untyped-call]
                self._made[_place(one)] = held


def _place(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
