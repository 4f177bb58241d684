"""``nn.Identity`` where the classifiers were, or any other module; nothing is downloaded here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from extractor.errors import ModelError
from extractor.network.probe import shapes, trial

__all__ = [
    "Bypass",
    "bypass",
    "identities",
    "modules_with_outputs",
    "replace_with_identity",
    "reset_timm_classifier",
]


def identities(module: nn.Module) -> frozenset[str]:
    """Dotted names of every ``nn.Identity`` inside a module."""
    return frozenset(
        name for name, child in module.named_modules() if isinstance(child, nn.Identity)
    )


def modules_with_outputs(module: nn.Module, outputs: int) -> tuple[str, ...]:
    """Dotted names of the modules that hold a parameter with ``outputs`` rows.

    In a network that was built for a number of classes that no other layer has as its width, these
    are its classifiers, whatever they are called and however deep they lie: a ``Linear``, the
    1x1 ``Conv2d`` of SqueezeNet, an auxiliary head.
    """
    names = {
        name.rpartition(".")[0]: None
        for name, value in module.named_parameters()
        if value.shape[0] == outputs
    }
    return tuple(names)


def replace_with_identity(module: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Put an ``nn.Identity`` in the place of each named submodule, and return the names.

    >>> model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 10))
    >>> replace_with_identity(model, ["1"]), model[1]
    (('1',), Identity())

    Raises:
        ModelError: a name that is not in the module, or the module itself.
    """
    replaced = tuple(names)
    for name in replaced:
        if not name:
            raise ModelError("the whole model cannot be its own head")
        try:
            module.get_submodule(name)
        except AttributeError as error:
            raise ModelError(f"no module {name!r} in {type(module).__name__}") from error
        _set_submodule(module, name, nn.Identity())
    return replaced


class Bypass(nn.Identity):
    """An identity in the place of a module that was given more than one argument: the first counts.

    >>> Bypass()("the tokens", mask="a mask")
    'the tokens'
    """

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return arguments[0] if arguments else next(iter(keywords.values()))


def bypass(
    network: nn.Module, names: Sequence[str], size: tuple[int, int], model: str
) -> tuple[str, ...]:
    """Put ``nn.Identity`` in the place of modules, in place, if what comes out keeps its shape.

    Args:
        names: dotted names of the modules; those that lie in others of them go with these.
        size: (height, width) of the images that the network is tried with.
        model: name of the network, for error messages.

    Returns:
        The names of the modules that were replaced.

    Raises:
        ModelError: a module does not run, or the network does not fit without it; names the shapes
            that go into the module and come out of it. The network is as it was.
    """
    once = dict.fromkeys(names)
    outer = [name for name in once if not any(name.startswith(f"{other}.") for other in once)]
    before: dict[str, nn.Module] = {}
    try:
        for name in outer:
            module = network.get_submodule(name)
            _bypass(network, name, size, model)
            before[name] = module
    except BaseException:
        for name, module in before.items():
            _set_submodule(network, name, module)
        raise
    return tuple(outer)


def _bypass(network: nn.Module, name: str, size: tuple[int, int], model: str) -> None:
    module = network.get_submodule(name)
    flows: list[tuple[str, str]] = []

    def watch(_: nn.Module, arguments: tuple[Any, ...], keywords: Any, output: Any) -> None:
        first = arguments[0] if arguments else next(iter(keywords.values()), None)
        flows.append((shapes(first), shapes(output)))

    handle = module.register_forward_hook(watch, with_kwargs=True)
    try:
        before = trial(network, size, what=model)
    finally:
        handle.remove()
    if not flows:
        raise ModelError(f"bypass {name}: this module of {model} does not run as a whole")
    _set_submodule(network, name, Bypass())
    try:
        after = trial(network, size, what=model)
    except ModelError:
        after = None
    if after != before or not flows[-1][1].startswith("("):  # more than one tensor
        _set_submodule(network, name, module)
        taken, given = flows[-1]
        raise ModelError(
            f"bypass {name}: it turns {taken} into {given}, so that {model} does not fit without "
            "it; bypass a module that keeps the shape"
        )


def _set_submodule(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own_name = name.rpartition(".")
    setattr(network.get_submodule(parent), own_name, module)


def reset_timm_classifier(module: nn.Module) -> tuple[str, ...]:
    """Remove the classifiers of a timm model by its own ``reset_classifier(0)``.

    Returns the dotted names that are ``nn.Identity`` now and were not before, and checks that
    nothing is left of what the model's configuration calls its classifiers.

    Raises:
        ModelError: the model keeps a classifier.
    """
    reset = getattr(module, "reset_classifier", None)
    if reset is None:
        raise ModelError(f"{type(module).__name__} has no reset_classifier()")
    before = identities(module)
    reset(0)
    for name in _configured_classifiers(module):
        left = _submodule_or_none(module, name)
        if left is not None and any(True for _ in left.parameters()):
            raise ModelError(
                f"{type(module).__name__}: reset_classifier(0) left {name} a "
                f"{type(left).__name__}, expected nn.Identity; this model cannot give pre-logits"
            )
    return tuple(sorted(identities(module) - before))


def _configured_classifiers(module: nn.Module) -> tuple[str, ...]:
    get: Callable[[str], object] | None = getattr(
        getattr(module, "pretrained_cfg", {}), "get", None
    )
    names = get("classifier") if get is not None else None
    if isinstance(names, str):
        return (names,)
    return tuple(names) if isinstance(names, (tuple, list)) else ()


def _submodule_or_none(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None
