"""Checkpoints in any layout that trainers write: read without running code, fitted to a network."""

from __future__ import annotations

import logging
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from extractor.errors import WeightsError
from extractor.models.stand_ins import stand_ins
from extractor.network.prefixes import COUNTERS, USUAL, complete_prefixes, usual_prefix
from extractor.system.torn_files import torn_safetensors
from extractor.text import plural

__all__ = [
    "MisfitError",
    "State",
    "find_prefix",
    "fits",
    "load_into",
    "read_checkpoint",
    "under_prefix",
    "without_counters",
    "without_prefix",
]

log = logging.getLogger(__name__)

KEYS_SHOWN = 5

PICKLE = b"\x80"  # first byte of every pickle of protocol 2 or later
ZIP = b"PK"  # first bytes of what torch.save writes today
TEXT_BYTES = 512  # read from a file to see whether it is text
TEXT_SHOWN = 40

# Depth down to which an error message looks for state dicts in a checkpoint.
KEYS_NESTED = 4

# Where checkpoints keep the state dict, and what they call the averaged copy of it.
STATE_KEYS = ("state_dict", "model", "model_state_dict", "model_state")
EMA_KEYS = ("model_ema", "state_dict_ema", "ema", "ema_state_dict", "model_ema_state_dict")

SAVE_TENSORS = "Save the state dict alone (torch.save(model.state_dict(), ...)) or as .safetensors"


class MisfitError(WeightsError):
    """Weights that do not fit a model.

    Attributes:
        state: The tensors of the file.
        foreign: Whether names and shapes suggest another model. False if only values are wrong.
        advice: What to try, if that is known.
    """

    def __init__(
        self,
        message: str,
        state: Mapping[str, torch.Tensor],
        *,
        foreign: bool = True,
        advice: str = "",
    ) -> None:
        super().__init__(message)
        self.state = state
        self.foreign = foreign
        self.advice = advice

    def __reduce__(self) -> tuple[Any, ...]:
        return WeightsError, (str(self),)  # the tensors stay in this process


class State(dict[str, torch.Tensor]):
    """A state dict that keeps the versions of the modules that wrote it, as torch's own does.

    A few modules (such as MNASNet) use the versions to read old checkpoints.
    """

    def __init__(self, items: Iterable[tuple[str, torch.Tensor]] = ()) -> None:
        super().__init__(items)
        self._metadata: dict[str, dict[str, int]] = {}

    @classmethod
    def of(cls, mapping: Mapping[str, torch.Tensor]) -> State:
        """Copy a mapping of tensors, with its versions if it has any."""
        state = cls(mapping.items())
        state._metadata = dict(getattr(mapping, "_metadata", None) or {})
        return state

    def rename(self, new_name: Callable[[str], str]) -> None:
        """Give every key its new name, in place."""
        renamed = [(new_name(key), value) for key, value in self.items()]
        self.clear()
        self.update(renamed)


# ---------------------------------------------------------------------------------------------
# Files


def read_checkpoint(path: Path, key: str | None = None) -> State:
    """Return the tensors of a ``.safetensors``, ``.pth``, ``.pt``, ``.tar`` or ``.bin`` file.

    The content of the file decides its format, not its name. No code in it runs. A state dict
    inside ``state_dict`` or ``model`` is unwrapped. All tensors are on the CPU.

    Args:
        path: Location of the file.
        key: State dict to take from a checkpoint with several, such as ``model_ema``. Dots lead
            deeper.

    Raises:
        WeightsError: The file is missing, is not a checkpoint, needs code to be read, or has no
            such key.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):  # opening a pipe would wait
        raise WeightsError(f"cannot read weights {path}: not a regular file")
    try:
        with path.open("rb") as file:
            head = file.read(TEXT_BYTES)
    except OSError as error:
        raise WeightsError(f"cannot read weights {path}: {error.strerror}") from error
    try:
        content = _read(path, head)
    except WeightsError:
        raise
    except Exception as error:  # the readers raise whatever a broken archive leads them to
        raise _unreadable(path, head, error) from error
    return _state_dict(content, path, key)


def _read(path: Path, head: bytes) -> object:
    # The format's own mark and not the name: eight bytes of length, then a JSON object.
    marked = head[8:9] == b"{"
    if marked or (path.suffix == ".safetensors" and not head.startswith((ZIP, PICKLE))):
        from safetensors.torch import load_file

        if marked and (torn := torn_safetensors(path)):
            raise _torn(path, torn)
        return load_file(path)
    with stand_ins(), path.open("rb") as file:
        # An open file and not its path: by the name, torch would take it for safetensors again.
        return torch.load(file, map_location="cpu", weights_only=True)


def _unreadable(path: Path, head: bytes, error: Exception) -> WeightsError:
    """Return the error that says what a file is instead of a checkpoint."""
    message = str(error)
    is_unpickling = isinstance(error, pickle.UnpicklingError)
    needed = re.search(r"unsupported (?:global|class):? *(?:GLOBAL )?(\S*)", message, re.I)
    if is_unpickling and needed:
        return WeightsError(
            f"{path} is refused: it holds more than tensors ({needed.group(1)}), and reading it "
            f"would run code that came with the file. {SAVE_TENSORS}"
        )
    if is_unpickling and head[:1] == PICKLE and "nsupported operand" in message:
        return WeightsError(
            f"{path} is refused: it is a pickle of something other than tensors, and reading it "
            f"would run code that came with the file. {SAVE_TENSORS}"
        )
    if not is_unpickling and "torchscript" in message.lower():
        return WeightsError(
            f"{path} is refused: it is a TorchScript archive, which holds code. {SAVE_TENSORS}"
        )
    if head.startswith(ZIP) and not zipfile.is_zipfile(path):
        return _torn(path, "the end of its zip archive is missing, it is truncated or damaged")
    if missing := re.search(r"unexpected EOF, expected (\d+) more bytes", message):
        return _torn(path, f"it is truncated, {int(missing.group(1)):,} bytes are missing")
    if "storage has wrong byte size" in message:
        return _torn(path, "a part of it is damaged or missing")
    kind = "not a checkpoint that can be read"
    if is_unpickling:
        kind += " without running code"
    return WeightsError(
        _text_instead(path, head)
        or f"{path} is {kind} ({_reason(error)}); expected a .pth with a state dict, or "
        ".safetensors"
    )


def _torn(path: Path, problem: str) -> WeightsError:
    return WeightsError(
        f"{path} is not a checkpoint that can be read: {problem}; expected a whole file, copy or "
        "download it again"
    )


def _reason(error: Exception) -> str:
    """Return a reader's message, without torch's advice to read the file by running its code."""
    _, _, detail = str(error).rpartition("WeightsUnpickler error:")
    line = (detail.strip().splitlines() or [""])[0].partition(" Please use")[0]
    if not line or "weights_only" in line:
        return type(error).__name__
    return f"{type(error).__name__}: {line[:200]}"


def _text_instead(path: Path, head: bytes) -> str:
    """Return a message about a file that is text instead of a checkpoint, or an empty string."""
    text = head.decode("utf-8-sig", "replace").lstrip()
    if text.lower().startswith(("<!doctype html", "<html")):
        return f"{path} is a web page, not weights; fetch the file that the page is about"
    if text.startswith("version https://git-lfs"):
        return f"{path} is a Git LFS pointer, not weights; fetch the file with git lfs pull"
    text = text.removesuffix("\ufffd")  # a letter that the limit cut in two
    if text and all((c.isprintable() and c != "\ufffd") or c.isspace() for c in text):
        return (
            f"{path} is not a checkpoint: it is text that begins with {text[:TEXT_SHOWN]!r}; "
            "expected a .pth with a state dict, or .safetensors"
        )
    return ""


# ---------------------------------------------------------------------------------------------
# State dicts inside a checkpoint


def _state_dict(checkpoint: object, path: Path, wanted: str | None) -> State:
    content, taken = checkpoint, wanted or ""
    if wanted is not None:
        content = _get_below(checkpoint, wanted)
        if not isinstance(content, Mapping):
            raise WeightsError(f"{path} holds no state dict under {wanted!r}{_choices(checkpoint)}")
    averaged = [
        name for key in EMA_KEYS for name in _names_below(_get(content, key), _join(taken, key))
    ]
    for key in STATE_KEYS:
        if isinstance(_get(content, key), Mapping):
            content, taken = _get(content, key), _join(taken, key)
            if averaged:
                log.warning(
                    "%s: took %s; it also holds averaged weights, use --weights-key %s for them",
                    *(path, taken, averaged[0]),
                )
    state = State(
        (str(key), value)
        for key, value in (content.items() if isinstance(content, Mapping) else ())
        if isinstance(value, torch.Tensor)
    )
    state._metadata = dict(getattr(content, "_metadata", None) or {})
    if not state:
        below = taken and f" under {taken!r}"
        raise WeightsError(
            f"{path} holds no tensors by name{below}, expected a state dict (or one under "
            f"'state_dict' or 'model'), got {type(content).__name__}"
            f"{_choices(content, taken) or _choices(checkpoint)}"
        )
    return state


def _get(content: object, key: str) -> object:
    return content.get(key) if isinstance(content, Mapping) else None


def _get_below(content: object, name: str) -> object:
    """Return what lies under a dotted name; a key may contain dots itself."""
    if not isinstance(content, Mapping):
        return None
    found = _get(content, name)
    for dot in (index for index, letter in enumerate(name) if letter == "."):
        if found is not None:
            break
        found = _get_below(_get(content, name[:dot]), name[dot + 1 :])
    return found


def _join(above: str, key: str) -> str:
    return f"{above}.{key}" if above else key


def _choices(content: object, above: str = "") -> str:
    """List a checkpoint's state dicts for an error message, as ``--weights-key`` takes them.

    Args:
        content: The checkpoint or a part of it.
        above: Name under which ``content`` lies.
    """
    found = _names_below(content, above)
    return f"; choose one of {_shortened(found)} with --weights-key" if found else ""


def _names_below(content: object, above: str) -> list[str]:
    """Return the dotted names of the state dicts in a checkpoint, the shallowest first."""
    found: list[str] = []
    level = [(above, content)]
    for _ in range(KEYS_NESTED):
        deeper: list[tuple[str, object]] = []
        for name, inner in level:
            if _is_state_dict(inner):
                found.append(name)
            elif isinstance(inner, Mapping):
                # An optimizer's keys are numbers, which no dotted name can lead to.
                named = ((key, value) for key, value in inner.items() if isinstance(key, str))
                deeper += [(_join(name, key), value) for key, value in named]
        level = deeper
    return found


def _is_state_dict(content: object) -> bool:
    """Return whether a mapping holds more than a metric or a counter kept as a tensor."""
    return isinstance(content, Mapping) and any(
        isinstance(value, torch.Tensor) and value.ndim > 0 for value in content.values()
    )


# ---------------------------------------------------------------------------------------------
# Fitting


def under_prefix(state: State, prefix: str, label: str) -> State:
    """Return the tensors below a prefix, without it.

    Args:
        state: Tensors of a checkpoint.
        prefix: What the names of the tensors begin with, such as ``teacher.``.
        label: The file, for the error message.

    Raises:
        WeightsError: No tensor has the prefix.
    """
    found = without_prefix(state, prefix)
    if not found:
        parts = sorted({key.partition(".")[0] + "." for key in state if "." in key})
        raise WeightsError(
            f"{label} has no tensors under {prefix!r}; its names begin with {_shortened(parts)}"
        )
    return found


def without_counters(state: State, label: str) -> State:
    """Return a state dict without the counters that profilers leave, with a warning."""
    counters = [
        key for key, value in state.items() if key.split(".")[-1] in COUNTERS and value.numel() == 1
    ]
    if not counters:
        return state
    log.warning("%s: passed over %s of a profiler", label, plural(len(counters), "counter"))
    kept = State((key, value) for key, value in state.items() if key not in set(counters))
    kept._metadata = state._metadata
    return kept


def find_prefix(
    state: State, expected: Mapping[str, torch.Tensor], removed: tuple[str, ...], label: str
) -> tuple[str, list[str]]:
    """Return the prefix before the names of a network's tensors, and those of further copies.

    Any prefix under which all tensors of the network lie counts, if there is only one of them or
    only one that trainers commonly use. Without such a prefix it is the usual one that yields the
    most expected names.

    Args:
        state: Tensors of a checkpoint.
        expected: Tensors of the network.
        removed: Names of the modules that were removed from the network.
        label: The file and the model, for the error message.

    Raises:
        WeightsError: There are several copies of the network.
    """
    copies = complete_prefixes(state, expected, removed)
    usual = [prefix for prefix in copies if prefix in USUAL and prefix]
    if len(copies) > 1 and len(usual) != 1:
        named = ", ".join(prefix or "no prefix" for prefix in copies)
        raise WeightsError(
            f"{label}: the file holds {len(copies)} copies of this network, under {named}; choose "
            f"one, for example with --weights-prefix {copies[-1]}"
        )
    best = usual[0] if usual else copies[0] if copies else usual_prefix(state, expected)
    return best, [prefix for prefix in copies if prefix != best]


def _without_prefixes(
    state: State, expected: Mapping[str, torch.Tensor], removed: tuple[str, ...], label: str
) -> State:
    """Return a state dict under the names that a network expects, and warn of what is left out."""
    best, others = find_prefix(state, expected, removed, label)
    if not best:
        return state
    if left_out := [key for key in state if not key.startswith(best)]:
        log.warning("took the weights under %r, without %s", best, _shortened(left_out))
    elif best not in USUAL:
        log.warning("took the weights under %r", best)
    if named := [prefix for prefix in others if prefix]:
        log.warning(
            "the file also holds this network under %s; choose with --weights-prefix",
            ", ".join(named),
        )
    if "" in others:
        log.warning(
            "the file also holds this network without a prefix; to use that copy, save it alone"
        )
    return without_prefix(state, best)


def fits(
    state: State, expected: Mapping[str, torch.Tensor], removed: tuple[str, ...], label: str = ""
) -> bool:
    """Return whether a state dict has all names and shapes of a network and no others.

    Raises:
        WeightsError: There are several copies of the network.
    """
    named = without_prefix(state, find_prefix(state, expected, removed, label)[0])
    kept = State((key, value) for key, value in named.items() if not _lies_in(key, removed))
    return not any(keys for _, keys in _wrong_names(kept, expected))


def without_prefix(state: State, prefix: str) -> State:
    """Return the tensors whose names begin with a prefix, without it."""
    named = State((k[len(prefix) :], v) for k, v in state.items() if k.startswith(prefix))
    named._metadata = {
        key[len(prefix) :]: value
        for key, value in state._metadata.items()
        if f"{key}." == prefix or key.startswith(prefix)
    }
    return named


def load_into(
    module: nn.Module, state: Mapping[str, torch.Tensor], *, discarded: Iterable[str], label: str
) -> None:
    """Copy a state dict into a module, key by key and shape by shape.

    Args:
        module: The network without its head.
        state: Tensors by name, with or without a trainer's prefixes.
        discarded: Names of the modules that were removed from the network. Their keys are optional.
        label: The file and the model, for the error message.

    Raises:
        MisfitError: Any other key is missing, unexpected, of another shape, without values, sparse,
            quantized or not finite. The message lists them.
    """
    expected = module.state_dict()
    removed = tuple(discarded)
    state = _without_prefixes(State.of(state), expected, removed, label)
    kept = State((key, value) for key, value in state.items() if not _lies_in(key, removed))
    # A file without versions (.safetensors) is taken to be a recent one.
    kept._metadata = state._metadata or getattr(expected, "_metadata", {})
    names = dict(_wrong_names(kept, expected))
    values = dict(_wrong_values(kept, expected))
    if any(names.values()) or any(values.values()):
        listed = "; ".join(
            f"{len(keys)} {problem}: {_shortened(keys)}"
            for problem, keys in (names | values).items()
            if keys
        )
        message = f"{label}: the weights do not fit. {listed}"
        raise MisfitError(message, state, foreign=any(names.values()))
    module.load_state_dict(kept, strict=False)


def _wrong_names(
    state: State, expected: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, list[str]]]:
    """Yield problems that suggest another model, each with the keys that have it."""
    # A counter that only training reads; checkpoints from before 2018 lack it.
    counters = {key for key in expected if key.endswith(".num_batches_tracked")}
    yield "missing", sorted(expected.keys() - state.keys() - counters)
    yield "unexpected", sorted(state.keys() - expected.keys())
    yield (
        "of another shape",
        [
            f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
            for key in sorted(expected.keys() & state.keys())
            if state[key].shape != expected[key].shape
        ],
    )


def _wrong_values(
    state: State, expected: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, list[str]]]:
    """Yield problems with the values of expected keys, each with the keys that have it."""
    common = sorted(expected.keys() & state.keys())
    yield "without values", [key for key in common if state[key].is_meta]
    yield (
        "sparse",
        [f"{key} {state[key].layout}" for key in common if state[key].layout is not torch.strided],
    )
    # Neither the checks below nor copying can handle anything but plain tensors.
    plain = [key for key in common if not state[key].is_meta and state[key].layout is torch.strided]
    yield (
        "without fractions",
        [
            f"{key} {state[key].dtype}"
            for key in plain
            if expected[key].is_floating_point() and not state[key].is_floating_point()
        ],
    )
    yield (
        "with NaN or infinity",
        [
            key
            for key in plain
            if state[key].is_floating_point() and not state[key].isfinite().all()
        ],
    )


def _lies_in(key: str, modules: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(name + ".") for name in modules)


def _shortened(keys: list[str]) -> str:
    more = f", and {len(keys) - KEYS_SHOWN} more" if len(keys) > KEYS_SHOWN else ""
    return ", ".join(keys[:KEYS_SHOWN]) + more
