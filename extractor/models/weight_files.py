"""Files of published weights: found in the caches that the libraries use, or fetched into them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

import torch

from extractor.errors import WeightsError
from extractor.models import lite_weights
from extractor.models.digests import sha256_of_cached_file, sha256_of_file
from extractor.system.network import answers

__all__ = [
    "CONFIG",
    "WeightsFile",
    "cached_hub_file",
    "cached_url_file",
    "digest_in",
    "find_hub_file",
    "find_package_file",
    "find_url_file",
    "hub_filenames",
    "warn_if_renamed",
]

log = logging.getLogger(__name__)

CONFIG = "config.json"  # of timm: the architecture of a model and its evaluation transform

# A server that says nothing for this long counts as unreachable.
PROBE_SECONDS = 3.0

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
        path: Location of the file.
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

    @property
    def named_digest(self) -> str:
        """SHA-256 of the file, or its first digits, as its name in a cache states it; or empty.

        torch's cache keeps the name of the address. The hub's cache names a large file by its
        digest, and a snapshot is a link to it.
        """
        if not self.url:
            return ""
        blob = self.path.resolve()
        if blob.parent.name == "blobs":
            return blob.name if re.fullmatch("[0-9a-f]{64}", blob.name) else ""
        return digest_in(self.url)

    def check(self) -> None:
        """Compare a cached file with the digest in its name.

        Raises:
            WeightsError: It has another content.
        """
        expected = self.named_digest
        if not expected or (found := self.sha256()).startswith(expected):
            return
        raise WeightsError(
            f"{self.path} is not what its name says: got SHA-256 {found[: len(expected)]}, "
            f"expected {expected}. It is damaged, or other weights have its name. Delete it and "
            "download it again; use --weights FILE for weights of your own"
        )

    def sha256(self) -> str:
        """Return the SHA-256 of the file; of a cached file it is computed only once."""
        return sha256_of_cached_file(self.path) if self.url else sha256_of_file(self.path)


# ---------------------------------------------------------------------------------------------
# The hub


def hub_filenames(configured: str | None = None) -> tuple[str, ...]:
    """Return the names that a repository's weights may have, the safe formats first.

    Args:
        configured: Name that the library has for them. Its safe copy comes first, then the name.
    """
    if configured is None:
        return HUB_FILENAMES
    safe = configured.replace("pytorch_model.bin", "model.safetensors")
    return tuple(dict.fromkeys([safe, configured]))


def cached_hub_file(
    repository: str, filenames: Iterable[str], *, tag: str = ""
) -> WeightsFile | None:
    """Return the first of ``filenames`` that the cache has of a hub repository, or None."""
    import huggingface_hub

    repository, _, revision = repository.partition("@")
    for name in filenames:
        cached = huggingface_hub.try_to_load_from_cache(repository, name, revision=revision or None)
        if isinstance(cached, str):
            return _hub_file(repository, Path(cached), tag)
    return None


def find_hub_file(
    repository: str, filenames: Iterable[str], *, tag: str, label: str
) -> WeightsFile:
    """Return the first of ``filenames`` in a repository of the Hugging Face hub.

    A cached file is used as it is, without asking the hub for a newer one. Otherwise it is fetched.

    Args:
        repository: Such as ``timm/resnet50.a1_in1k``, with ``@REVISION`` for a particular one.
        filenames: Names to look for, the preferred one first.
        tag: The library's name for these weights.
        label: Name of the model in error messages.

    Raises:
        WeightsError: Not in the cache, and the hub does not answer within :data:`PROBE_SECONDS`
            or does not have it.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    names = list(filenames)
    try:
        cached = cached_hub_file(repository, names, tag=tag)
    except HFValidationError as error:
        raise WeightsError(
            f"{label}: {repository!r} is not a repository of the hub, expected ORG/NAME"
        ) from error
    if cached is not None:
        return cached
    repository, _, revision = repository.partition("@")
    folder = Path(constants.HF_HUB_CACHE) / ("models--" + repository.replace("/", "--"))
    at = f" --revision {revision}" if revision else ""
    fetch = f"hf download {repository}{at} {names[0]}"
    if constants.HF_HUB_OFFLINE:
        _raise_missing(label, f"{folder} (HF_HUB_OFFLINE is set)", fetch, folder)
    if not _reachable(constants.ENDPOINT):
        looked = f"{folder}, and {constants.ENDPOINT} cannot be reached"
        _raise_missing(label, looked, fetch, folder)
    log.info("fetching %s from %s", repository, constants.ENDPOINT)
    for name in names:
        try:
            fetched = huggingface_hub.hf_hub_download(repository, name, revision=revision or None)
            return _hub_file(repository, Path(fetched), tag)
        except EntryNotFoundError:
            continue
        except Exception as error:
            looked = f"{folder}; {constants.ENDPOINT} answered: {error}"
            _raise_missing(label, looked, fetch, folder)
    raise WeightsError(f"{label}: {repository} has none of {', '.join(names)}; use --weights FILE")


def _hub_file(repository: str, path: Path, tag: str) -> WeightsFile:
    # The cache is laid out as .../snapshots/<commit>/<file>.
    return WeightsFile(path, f"hf-hub:{repository}/{path.name}", tag, path.parent.name)


# ---------------------------------------------------------------------------------------------
# Plain addresses, and packages


def cached_url_file(url: str, *, tag: str = "") -> WeightsFile | None:
    """Return the file of an address in torch's cache (``TORCH_HOME/hub/checkpoints``), or None."""
    path = _cache_path(url)
    return WeightsFile(path, url, tag) if path.is_file() else None


def find_url_file(url: str, *, tag: str, label: str) -> WeightsFile:
    """Return the file of an address, from torch's cache or fetched into it.

    Args:
        url: Address of the file.
        tag: The library's name for these weights.
        label: Name of the model in error messages.

    Raises:
        WeightsError: Not in the cache, and the server does not answer within
            :data:`PROBE_SECONDS` or does not have it.
    """
    path = _cache_path(url)
    name = path.name
    if not path.is_file():
        fetch = f"curl -L -o {name} {url}"
        if not _reachable(url):
            looked = f"{path}, and {urlsplit(url).netloc} cannot be reached"
            _raise_missing(label, looked, fetch, path.parent)
        log.info("fetching %s", url)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), digest_in(url) or None, progress=False)
        except Exception as error:
            _raise_missing(label, f"{path}; {url} answered: {error}", fetch, path.parent)
    return WeightsFile(path, url, tag)


def digest_in(name: str) -> str:
    """Return the first digits of the SHA-256 that a published name ends with, or an empty string.

    >>> digest_in("https://host/resnet50-0676ba61.pth")
    '0676ba61'
    """
    match = re.search(r"-([0-9a-f]{8,})\.", name.rpartition("/")[2])
    return match.group(1) if match else ""


def warn_if_renamed(file: WeightsFile, published: Iterable[str]) -> None:
    """Warn of a user's file that has the name of published weights and another content.

    Args:
        file: File that ``--weights`` names.
        published: Addresses of the model's published weights.
    """
    name = file.path.name
    expected = digest_in(name)
    if file.url or not expected or all(url.rpartition("/")[2] != name for url in published):
        return
    if not (found := file.sha256()).startswith(expected):
        log.warning(
            "%s has the name of published weights but another content (SHA-256 %s, expected %s): "
            "it is damaged, or other weights have its name",
            *(file.path, found[: len(expected)], expected),
        )


def find_package_file(package: lite_weights.LitePackage) -> WeightsFile | None:
    """Return the weights file of an installed package, unchecked, or None if not installed."""
    path = package.locate()
    if path is None:
        return None
    return WeightsFile(path, tag=package.tag, package=package.source)


def _cache_path(url: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(url).path).name


# ---------------------------------------------------------------------------------------------


def _raise_missing(label: str, looked: str, fetch: str, folder: Path) -> NoReturn:
    if fetch.endswith(f" {CONFIG}"):  # no other weights help without it
        raise WeightsError(
            f"{label}: {CONFIG} and the weights are not on this machine. Looked in {looked}. Fetch "
            "the repository on a machine with network "
            f"(`{fetch.removesuffix(f' {CONFIG}')}`) and copy it to {folder}; or name the "
            "architecture with --model, and its weights with --weights"
        )
    is_lite = any(name in label for name in lite_weights.PACKAGES)
    use = "" if is_lite else f" and use --model {lite_weights.MODEL}, which needs no hub"
    raise WeightsError(
        f"{label}: the weights are not on this machine. Looked in {looked}. Try one of these: "
        f"fetch them on a machine with network (`{fetch}`) and copy them to {folder}; "
        f"run `{lite_weights.INSTALL}`{use}; name a file of your own with --weights FILE; "
        "or try things out with --weights random"
    )


def _reachable(url: str) -> bool:
    return answers(url, PROBE_SECONDS)
