"""Replace classifiers, or any other module, by ``nn.Identity``; nothing here downloads weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from extractor.errors import ModelError
from extractor.network.probe import describe_shapes, probe

__all__ = [
    "Bypass",
    "bypass",
    "identities",
    "modules_with_outputs",
    "replace_with_identity",
    "reset_timm_classifier",
    "set_submodule",
]


def identities(network: nn.Module) -> frozenset[str]:
    """Return the dotted names of all ``nn.Identity`` modules in a network."""
    return frozenset(
        name for name, module in network.named_modules() if isinstance(module, nn.Identity)
    )


def modules_with_outputs(network: nn.Module, outputs: int) -> tuple[str, ...]:
    """Return the dotted names of the modules that have a parameter with ``outputs`` rows.

    If a network is built for a number of classes that no other layer has as its width, these are
    its classifiers, whatever their name and depth: a ``Linear``, the 1x1 ``Conv2d`` of SqueezeNet,
    an auxiliary head.

    >>> modules_with_outputs(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 13)), 13)
    ('1',)
    """
    names = {
        name.rpartition(".")[0]: None
        for name, parameter in network.named_parameters()
        if parameter.shape[0] == outputs
    }
    return tuple(names)


def replace_with_identity(network: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Replace modules by ``nn.Identity``, in place, and return their names.

    >>> model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 10))
    >>> replace_with_identity(model, ["1"]), model[1]
    (('1',), Identity())

    Args:
        network: The network to change.
        names: Dotted names of the modules.

    Raises:
        ModelError: There is no such module, or the name is empty. The network stays as it was.
    """
    replaced = tuple(names)
    for name in replaced:
        if not name:
            raise ModelError("the whole model cannot be its own head")
        try:
            network.get_submodule(name)
        except AttributeError as error:
            raise ModelError(f"no module {name!r} in {type(network).__name__}") from error
    for name in replaced:
        set_submodule(network, name, nn.Identity())
    return replaced


class Bypass(nn.Identity):
    """An identity that takes any number of arguments and returns the first.

    >>> Bypass()("the tokens", mask="a mask")
    'the tokens'
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the first argument."""
        return args[0] if args else next(iter(kwargs.values()))


def bypass(
    network: nn.Module, names: Sequence[str], size: tuple[int, int], model: str
) -> tuple[str, ...]:
    """Replace modules that keep the shape of their input by ``nn.Identity``, in place.

    Args:
        network: The network to change.
        names: Dotted names of the modules. A module inside another of them needs no replacement.
        size: (height, width) of the blank images that test the network.
        model: Name of the network for error messages.

    Returns:
        The names of the replaced modules.

    Raises:
        ModelError: A module does not run, or changes the shape so that the network does not work
            without it. The network stays as it was.
    """
    unique = dict.fromkeys(names)
    outer = [name for name in unique if not any(name.startswith(f"{other}.") for other in unique)]
    originals: dict[str, nn.Module] = {}
    try:
        for name in outer:
            module = network.get_submodule(name)
            _bypass(network, name, size, model)
            originals[name] = module
    except BaseException:
        for name, module in originals.items():
            set_submodule(network, name, module)
        raise
    return tuple(outer)


def _bypass(network: nn.Module, name: str, size: tuple[int, int], model: str) -> None:
    module = network.get_submodule(name)
    calls: list[tuple[str, str]] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        first = args[0] if args else next(iter(kwargs.values()), None)
        calls.append((describe_shapes(first), describe_shapes(output)))

    handle = module.register_forward_hook(record, with_kwargs=True)
    try:
        before = probe(network, size, name=model)
    finally:
        handle.remove()
    if not calls:
        raise ModelError(f"bypass {name}: this module of {model} does not run as a whole")
    set_submodule(network, name, Bypass())
    try:
        after = probe(network, size, name=model)
    except ModelError:
        after = None
    input_shape, output_shape = calls[-1]
    is_tensor = output_shape.startswith("(")
    if after != before or not is_tensor:
        set_submodule(network, name, module)
        raise ModelError(
            f"bypass {name}: it turns {input_shape} into {output_shape}, so {model} does not work "
            "without it; bypass a module that keeps the shape"
        )


def set_submodule(network: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another one, by its dotted name."""
    parent, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(parent), attribute, module)


def reset_timm_classifier(network: nn.Module) -> tuple[str, ...]:
    """Remove the classifiers of a timm model with its own ``reset_classifier(0)``.

    Returns:
        The dotted names of the modules that have become ``nn.Identity``.

    Raises:
        ModelError: The model has no ``reset_classifier``, or keeps a classifier that its
            configuration names.
    """
    reset = getattr(network, "reset_classifier", None)
    if reset is None:
        raise ModelError(f"{type(network).__name__} has no reset_classifier()")
    before = identities(network)
    reset(0)
    for name in _configured_classifiers(network):
        module = _submodule_or_none(network, name)
        if module is not None and any(True for _ in module.parameters()):
            raise ModelError(
                f"{type(network).__name__}: reset_classifier(0) left {name} a "
                f"{type(module).__name__}, expected nn.Identity; this model cannot return "
                "pre-logits"
            )
    return tuple(sorted(identities(network) - before))


def _configured_classifiers(network: nn.Module) -> tuple[str, ...]:
    get: Callable[[str], object] | None = getattr(
        getattr(network, "pretrained_cfg", {}), "get", None
    )
    names = get("classifier") if get is not None else None
    if isinstance(names, str):
        return (names,)
    return tuple(names) if isinstance(names, (tuple, list)) else ()


def _submodule_or_none(network: nn.Module, name: str) -> nn.Module | None:
    try:
        return network.get_submodule(name)
    except AttributeError:
        return None
