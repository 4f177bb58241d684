"""A pretrained network without its classifier, and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from extractor.devices import device_errors
from extractor.errors import ModelError, UsageError
from extractor.preprocess import Preprocess

__all__ = ["Backbone", "Provenance"]

CPU = torch.device("cpu")

# The embedding is what the last classification layer would have seen.
DEFINITION = "pre-logits"


@dataclass(frozen=True)
class Provenance:
    """Where a backbone comes from, down to the bytes of its weights.

    Attributes:
        model: full name, ``timm:resnet50`` or ``torchvision:resnet50``.
        library, library_version: that built the network.
        weights: ``hub``, ``file`` or ``random``.
        tag: the library's name of the weights, such as ``a1_in1k``; else empty.
        sha256: of the weights file; for random weights of their values.
        source: address of the weights, or the name of a local file; empty for random ones.
        revision: commit of the hub's repository, where there is one.
        seed: of random weights, None for all others.
        definition: what of the network is taken as the embedding.
    """

    model: str
    library: str
    library_version: str
    weights: str
    tag: str
    sha256: str
    source: str = ""
    revision: str = ""
    seed: int | None = None
    definition: str = DEFINITION

    def __str__(self) -> str:
        what = self.tag or (f"seed {self.seed}" if self.weights == "random" else self.source)
        return f"{self.model} ({self.weights} weights {what}, sha256 {self.sha256[:12]})"


@dataclass(frozen=True, eq=False)
class Backbone:
    """A network that maps images to embeddings, every classifier of which is ``nn.Identity``.

    >>> from extractor import load_backbone
    >>> backbone = load_backbone("torchvision:squeezenet1_0", weights="random", device="cpu")
    >>> backbone(torch.zeros(2, 3, 224, 224)).shape
    torch.Size([2, 512])

    Attributes:
        module: the network in eval mode, on ``device`` and in ``dtype``.
        dim: numbers in one embedding.
        heads: dotted names of the modules that are ``nn.Identity`` now.
        preprocess: the evaluation transform that belongs to these weights.
        provenance: where network and weights come from.
    """

    module: nn.Module
    dim: int
    heads: tuple[str, ...]
    preprocess: Preprocess
    provenance: Provenance
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"dim: got {self.dim}, expected a positive number")
        self.module.eval().requires_grad_(False)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embed normalised pixels.

        Args:
            pixels: ``(B, 3, H, W)`` floating point, RGB, normalised as ``preprocess`` says.

        Returns:
            ``(B, dim)`` float32 on the backbone's device.

        Raises:
            UsageError: pixels of another shape.
            ModelError: the network gave something that is no vector for each image.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise UsageError(f"pixels: got shape {tuple(pixels.shape)}, expected (B, 3, H, W)")
        with torch.inference_mode():
            output = self.module(pixels.to(self.device, self.dtype))
        if isinstance(output, torch.Tensor) and output.shape[2:] == (1, 1):
            output = output.flatten(1)  # a pooled map
        if not isinstance(output, torch.Tensor) or output.shape != (len(pixels), self.dim):
            got = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise ModelError(
                f"{self.provenance.model} gave {got}, expected {(len(pixels), self.dim)}; its "
                "pre-logits are not a vector for each image"
            )
        return output.float()

    def to(self, device: torch.device, dtype: torch.dtype) -> Backbone:
        """The backbone on a device and in a precision; the module itself is moved, not copied.

        Raises:
            DeviceError: the device is full, busy or broken.
        """
        with device_errors(device):
            module = self.module.to(device, dtype).to(memory_format=torch.channels_last)
        return replace(self, module=module, device=device, dtype=dtype)
