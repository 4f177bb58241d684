"""Stand-ins for the objects that trainers keep beside the tensors of a checkpoint.

A pickle names the classes and functions that make its objects. Nothing but tensors is needed, so
none of the named code is looked up, let alone run: an empty object, dictionary or list takes the
place of each. Only names listed here have a stand-in. Any other name is refused.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["stand_ins"]


class _Nothing:
    """Takes the place of any object: ignores how it is made and what it holds."""

    def __new__(cls, *arguments: object, **named: object) -> _Nothing:
        del arguments, named
        return super().__new__(cls)

    def __init__(self, *arguments: object, **named: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _Items:
    """Takes the place of a mapping, which may hold a state dict: keeps its items."""

    def __new__(cls, *arguments: object, **named: object) -> OrderedDict[object, object]:  # type: ignore[misc]
        del cls, arguments, named
        return OrderedDict()


class _Entries:
    """Takes the place of a sequence."""

    def __new__(cls, *arguments: object, **named: object) -> list[object]:  # type: ignore[misc]
        del cls, arguments, named
        return []


# Values that say something about a training run, and the functions by which pickles make them.
# Not even numpy's own functions may be called: they trust a pickle about the layout of memory.
NOTHING = tuple(
    f"{module}.{name}"
    for modules, names in (
        ("numpy.core.multiarray numpy._core.multiarray", "scalar _reconstruct"),
        ("numpy.core.numeric numpy._core.numeric", "_frombuffer"),
        ("numpy", "dtype ndarray bool bool_ float16 float32 float64 int8 int16 int32 int64"),
        ("numpy", "uint8 uint16 uint32 uint64"),
        ("numpy.random._pickle", "__generator_ctor __bit_generator_ctor __randomstate_ctor"),
        ("numpy.random._pcg64", "PCG64"),
        ("numpy.random._mt19937", "MT19937"),
        ("numpy.random.bit_generator", "SeedSequence __pyx_unpickle_SeedSequence"),
        ("pathlib pathlib._local", "Path PosixPath WindowsPath"),
        ("pathlib pathlib._local", "PurePath PurePosixPath PureWindowsPath"),
        ("datetime", "datetime date time timedelta timezone"),
        ("argparse", "Namespace"),
        ("types", "SimpleNamespace"),
        ("uuid", "UUID"),
        ("decimal", "Decimal"),
        ("fractions", "Fraction"),
        ("builtins", "bool bytes dict float frozenset int list object range slice str tuple"),
        ("builtins", "getattr"),
        ("copyreg", "_reconstructor"),
        ("typing", "Any"),
        ("torch.torch_version", "TorchVersion"),
        # Settings of Hydra, and the losses that MMEngine keeps.
        ("omegaconf.base", "Metadata ContainerMetadata"),
        ("omegaconf.dictconfig", "DictConfig"),
        ("omegaconf.listconfig", "ListConfig"),
        ("omegaconf.nodes", "AnyNode BooleanNode FloatNode IntegerNode StringNode"),
        ("mmengine.logging.history_buffer", "HistoryBuffer"),
    )
    for module in modules.split()
    for name in names.split()
)
ITEMS = (
    "collections.defaultdict",
    "addict.addict.Dict",
    "easydict.EasyDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "ml_collections.config_dict.config_dict.ConfigDict",
    "mmcv.utils.config.ConfigDict",
    "mmengine.config.config.ConfigDict",
    "yacs.config.CfgNode",
    "fvcore.common.config.CfgNode",
    "detectron2.config.config.CfgNode",
)
ENTRIES = ("collections.deque",)


def _make(name: str, base: type) -> type:
    """Return a class that torch finds under a name: its module and its own name spell it."""
    module, _, own = name.rpartition(".")
    return type(own, (base,), {"__module__": module})


_STAND_INS: list[Any] = [
    _make(name, base)
    for base, names in ((_Nothing, NOTHING), (_Items, ITEMS), (_Entries, ENTRIES))
    for name in names
]
_LOCK = threading.Lock()


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Make ``torch.load(..., weights_only=True)`` accept the listed names, one thread at a time.

    The allowed names are a setting of the whole process. What a caller allowed stays allowed.
    """
    with _LOCK:
        # torch 2.4 has only the function that adds names for good; they stay harmless there.
        allowed = getattr(torch.serialization, "safe_globals", None)
        if allowed is None:
            torch.serialization.add_safe_globals(_STAND_INS)
            yield
        else:
            with allowed(_STAND_INS):
                yield
