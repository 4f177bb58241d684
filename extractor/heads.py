"""``nn.Identity`` where the classifiers were; nothing is downloaded here."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from extractor.errors import ModelError

__all__ = ["identities", "modules_with_outputs", "replace_with_identity", "reset_timm_classifier"]


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
        parent_name, _, own_name = name.rpartition(".")
        try:
            parent = module.get_submodule(parent_name)
            parent.get_submodule(own_name)
        except AttributeError as error:
            raise ModelError(f"no module {name!r} in {type(module).__name__}") from error
        if not own_name:
            raise ModelError("the whole model cannot be its own head")
        setattr(parent, own_name, nn.Identity())
    return replaced


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
