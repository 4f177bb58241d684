"""Weights: found in the caches that the libraries use, fetched, read without running any code."""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

import torch
from torch import nn

from extractor.errors import WeightsError

__all__ = [
    "WeightsFile",
    "find_hub_file",
    "find_url_file",
    "load_into",
    "read_checkpoint",
    "seeded",
    "sha256_of_file",
    "sha256_of_state",
]

log = logging.getLogger(__name__)

# How long a server may take to say anything before it counts as out of reach.
PROBE_SECONDS = 3.0

KEYS_SHOWN = 5


@dataclass(frozen=True)
class WeightsFile:
    """A weights file on this machine, and where it came from; a file of the user's has but a path.

    Attributes:
        url: address that it was fetched from.
        tag: the library's name of these weights.
        revision: commit of the hub's repository.
    """

    path: Path
    url: str = ""
    tag: str = ""
    revision: str = ""


# ---------------------------------------------------------------------------------------------
# Finding


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
    from huggingface_hub.errors import EntryNotFoundError

    repository, _, revision = repository.partition("@")
    which = revision or None
    names = list(filenames)
    for name in names:
        cached = huggingface_hub.try_to_load_from_cache(repository, name, revision=which)
        if isinstance(cached, str):
            return _hub_file(repository, Path(cached), tag)

    folder = Path(constants.HF_HUB_CACHE) / ("models--" + repository.replace("/", "--"))
    fetch = f"hf download {repository} {names[0]}"
    if constants.HF_HUB_OFFLINE:
        _not_here(how, f"{folder} (HF_HUB_OFFLINE is set)", fetch, folder)
    if not _reachable(constants.ENDPOINT):
        _not_here(how, f"{folder}, and {constants.ENDPOINT} cannot be reached", fetch, folder)
    log.info("fetching %s from %s", repository, constants.ENDPOINT)
    for name in names:
        try:
            fetched = huggingface_hub.hf_hub_download(repository, name, revision=which)
            return _hub_file(repository, Path(fetched), tag)
        except EntryNotFoundError:
            continue
        except Exception as error:
            _not_here(how, f"{folder}; {constants.ENDPOINT} answered: {error}", fetch, folder)
    raise WeightsError(f"{how}: {repository} has none of {', '.join(names)}; use --weights FILE")


def find_url_file(url: str, *, tag: str, how: str) -> WeightsFile:
    """The file of an address in torch's cache (``TORCH_HOME/hub/checkpoints``), else fetched to it.

    Raises:
        WeightsError: neither in the cache nor within reach, within :data:`PROBE_SECONDS`.
    """
    name = Path(urlsplit(url).path).name
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
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


def _hub_file(repository: str, path: Path, tag: str) -> WeightsFile:
    # The cache is laid out as .../snapshots/<commit>/<file>.
    return WeightsFile(path, f"hf-hub:{repository}/{path.name}", tag, path.parent.name)


def _not_here(how: str, looked: str, fetch: str, folder: Path) -> NoReturn:
    raise WeightsError(
        f"{how}: the weights are not on this machine. Looked in {looked}. Either fetch them on a "
        f"machine with network (`{fetch}`) and copy them to {folder}, or name a file of your own "
        "with --weights FILE, or try things out with --weights random"
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


def read_checkpoint(path: Path) -> State:
    """The tensors of a ``.safetensors`` or ``.pth`` file on the CPU; no code in it is run.

    A state dict inside ``state_dict`` or ``model`` is unwrapped, and the prefix ``module.`` of
    ``DistributedDataParallel`` dropped.

    Raises:
        WeightsError: no such file, no checkpoint, or one that needs code to be read.
    """
    try:
        path.open("rb").close()
    except OSError as error:
        raise WeightsError(f"cannot read weights {path}: {error.strerror}") from error
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: object = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if re.search("unsupported (global|class)", str(error), re.IGNORECASE):
            raise WeightsError(
                f"{path} is refused: it holds more than tensors, and reading it would run code "
                "that came with the file. Save the state dict alone "
                "(torch.save(model.state_dict(), ...)) or as .safetensors"
            ) from error
        raise WeightsError(
            f"{path} is no checkpoint that can be read without running code ({_reason(error)}); "
            "expected a .pth with a state dict, or .safetensors"
        ) from error
    except Exception as error:  # the readers raise whatever a broken archive leads them to
        raise WeightsError(
            f"{path} is no checkpoint that can be read ({_reason(error)}); expected a .pth with a "
            "state dict, or .safetensors"
        ) from error
    return _state_dict(content, path)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


class State(dict[str, torch.Tensor]):
    """A state dict with the versions of the modules that wrote it, as torch's own carries them.

    A few modules (MNASNet is one) read old checkpoints by them and refuse one without.
    """

    _metadata: dict[str, dict[str, int]]

    def rename(self, new_name: Callable[[str], str]) -> None:
        """Give every key its new name, in place."""
        renamed = [(new_name(key), value) for key, value in self.items()]
        self.clear()
        self.update(renamed)


def _state_dict(content: object, path: Path) -> State:
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    state = State(
        (str(key).removeprefix("module."), value)
        for key, value in (content.items() if isinstance(content, Mapping) else ())
        if isinstance(value, torch.Tensor)
    )
    versions = getattr(content, "_metadata", None) or {}
    state._metadata = {
        "" if key == "module" else key.removeprefix("module."): value
        for key, value in versions.items()
    }
    if not state:
        raise WeightsError(
            f"{path} holds no tensors by name, expected a state dict (or one under 'state_dict' or "
            f"'model'), got {type(content).__name__}"
        )
    return state


def load_into(
    module: nn.Module, state: Mapping[str, torch.Tensor], *, discarded: Iterable[str], how: str
) -> None:
    """Copy a state dict into a module, key by key and shape by shape.

    Args:
        module: the network without its head.
        discarded: names of the modules that were removed from it; their keys may be there or not.
        how: what is loaded into what, for the error message.

    Raises:
        WeightsError: any other key is missing, unexpected, of another shape, quantised or not
            finite; lists them.
    """
    expected = module.state_dict()
    removed = tuple(discarded)
    given = State((key, value) for key, value in state.items() if not _lies_in(key, removed))
    # A file that does not know its versions (.safetensors) is taken to be of today.
    given._metadata = getattr(state, "_metadata", None) or getattr(expected, "_metadata", {})
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
    integers = [
        f"{key} {given[key].dtype}"
        for key in both
        if expected[key].is_floating_point() and not given[key].is_floating_point()
    ]
    broken = [
        key for key in both if given[key].is_floating_point() and not given[key].isfinite().all()
    ]
    parts = (
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape", misshapen),
        ("without fractions", integers),
        ("with NaN or infinity", broken),
    )
    if any(keys for _, keys in parts):
        told = "; ".join(f"{len(keys)} {what}: {_some(keys)}" for what, keys in parts if keys)
        raise WeightsError(
            f"{how}: the weights do not fit. {told}. Check that they were made for this model"
        )
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
