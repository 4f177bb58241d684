"""A pretrained network without its classifier, and where it comes from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from extractor.errors import ModelError, UsageError
from extractor.models.digests import sha256_of_state
from extractor.models.provenance import Provenance
from extractor.network import heads
from extractor.network.fusion.fuse import fuse, may_fuse
from extractor.network.fusion.onednn import overwriting
from extractor.network.module_names import find_modules
from extractor.network.precision import convert, input_dtype, resolve_precision
from extractor.network.probe import describe_shapes, probe
from extractor.network.taps import POOLED_FEATURES, Output, Taps
from extractor.options import Options, Pooling, parse_pooling
from extractor.preprocess import Preprocess
from extractor.system.devices import device_errors, resolve_device
from extractor.version import __version__

__all__ = ["Backbone"]

CPU = torch.device("cpu")
FLAT_LEVELS = (-2.0, 0.0, 2.0)  # of normalised pixels: about black, grey and white

_DEFAULT = Options()


@dataclass(frozen=True, eq=False)
class Backbone:
    """A network that maps images to embeddings, every classifier of which is ``nn.Identity``.

    >>> from extractor import load_backbone
    >>> backbone = load_backbone("torchvision:squeezenet1_0", weights="random", device="cpu")
    >>> backbone(torch.zeros(2, 3, 224, 224)).shape
    torch.Size([2, 512])

    Attributes:
        module: the network in eval mode, on ``device`` and in ``precision``.
        outputs: what it gives for each image; one thing, but for several layers at once.
        heads: dotted names of the modules that are ``nn.Identity`` now.
        preprocess: the evaluation transform that belongs to these weights.
        provenance: where network and weights come from.
        bypassed: further modules that have an ``nn.Identity`` in their place.
        taps: takes the outputs from inside the network; None where it returns them itself.
        precision: that it computes in, see :meth:`to`.
        least_cosine: to its embeddings in float32, as far as it was measured for this precision.
        is_compiled: whether ``torch.compile`` made the network faster.
        folded: normalisations and activations that went into convolutions, see :meth:`fold`.
    """

    module: nn.Module
    outputs: tuple[Output, ...]
    heads: tuple[str, ...]
    preprocess: Preprocess
    provenance: Provenance
    bypassed: tuple[str, ...] = ()
    taps: Taps | None = None
    device: torch.device = CPU
    precision: str = "float32"
    least_cosine: float | None = None
    is_compiled: bool = False
    folded: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.outputs or (self.taps is None and len(self.outputs) != 1):
            raise ValueError(f"{len(self.outputs)} outputs of a network without taps")
        self.module.eval()
        for parameter in self.module.parameters():  # not of the module: TorchScript has no such
            parameter.requires_grad_(False)

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        *,
        head: str | Sequence[str] | None,
        preprocess: Preprocess,
        name: str = "",
        device: str = _DEFAULT.device,
        precision: str = _DEFAULT.precision,
    ) -> Backbone:
        """A backbone from a network that neither timm nor torchvision knows.

        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 16), nn.Linear(16, 10))
        >>> Backbone.from_module(network, head="2", preprocess=Preprocess.standard(8)).dim
        16

        Args:
            module: maps ``(B, 3, H, W)`` normalised float pixels to scores of classes, or to
                embeddings already. It is changed in place.
            head: dotted names of its classifiers, which become ``nn.Identity``; None where it has
                none.
            preprocess: the evaluation transform that it was trained for.
            name: for messages and the manifest; the name of its class where none is given.
            device, precision: as for :func:`extractor.load_backbone`.

        Raises:
            ModelError: no such head, or no vector for each image without it.
            DeviceError, UsageError: as :func:`extractor.load_backbone`; UsageError too for an
                argument of another type.
        """
        if not isinstance(module, nn.Module):
            raise UsageError(f"module: got {module!r:.80}, expected a torch.nn.Module")
        if not isinstance(preprocess, Preprocess):
            raise UsageError(
                f"preprocess: got {preprocess!r:.80}, expected a Preprocess; try "
                "Preprocess.standard(224)"
            )
        names = _head_names(head)
        if names and isinstance(module, torch.jit.ScriptModule):
            raise UsageError(
                "head: TorchScript lets nothing be replaced; give the module that it was made of"
            )
        target, numbers = resolve_device(device), resolve_precision(precision)
        model = f"module:{name or type(module).__name__}"
        digest = sha256_of_state(module.state_dict())
        heads.replace_with_identity(module, names)
        module.eval()
        shape = probe(module, preprocess.input_size, name=model)
        if math.prod(shape) != shape[0]:
            raise ModelError(
                f"{model} gives {shape} for an image, expected a vector (dim,); name its "
                "classifier with head=, or take a layer of it"
            )
        provenance = Provenance(model, "module", __version__, "given", "", digest)
        return cls(module, (Output((shape[0],)),), names, preprocess, provenance).to(
            target, numbers
        )

    @property
    def dim(self) -> int:
        """Numbers in one embedding."""
        return self._only.dim

    @property
    def dtype(self) -> torch.dtype:
        """Of the pixels that the network takes; :meth:`embed` sees to it."""
        return input_dtype(self.precision)

    @property
    def _only(self) -> Output:
        if len(self.outputs) != 1:
            layers = ", ".join(output.layer for output in self.outputs)
            raise UsageError(f"this backbone has {len(self.outputs)} outputs ({layers}); use embed")
        return self.outputs[0]

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embed normalised pixels.

        Args:
            pixels: ``(B, 3, H, W)`` floating point, RGB, normalised as ``preprocess`` says.

        Returns:
            ``(B, dim)`` float32 on the backbone's device; ``(B, channels, height, width)`` or
            ``(B, tokens, channels)`` for a layer that is not pooled.

        Raises:
            UsageError: pixels of another shape, or a backbone of several layers.
            ModelError: the network gave something that is no vector for each image.
        """
        self._only  # noqa: B018  (raises before anything is computed)
        return self.embed(pixels)[0]

    def embed(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As calling it, but a tensor for each of :attr:`outputs`, all of one forward pass."""
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise UsageError(f"pixels: got shape {tuple(pixels.shape)}, expected (B, 3, H, W)")
        pixels = pixels.to(self.device, self.dtype)
        with torch.inference_mode(), overwriting(self._is_usual(pixels)):
            if self.taps is not None:
                given: tuple[object, ...] = self.taps(self.module, pixels)
            else:
                given = (_vector(self.module(pixels), self.outputs[0]),)
        embeddings = []
        for tensor, output in zip(given, self.outputs, strict=True):
            expected = (len(pixels), *output.shape)
            if not isinstance(tensor, torch.Tensor) or tensor.shape != expected:
                raise ModelError(
                    f"{self.provenance.model} returned {describe_shapes(tensor)}, expected "
                    f"{expected} as for blank images, for its {output.definition}"
                )
            embeddings.append(tensor.float())
        return tuple(embeddings)

    def _is_usual(self, pixels: torch.Tensor) -> bool:
        """Whether they are like those that a network is folded with, but for their number."""
        is_size = pixels.shape[2:] == self.preprocess.input_size
        return is_size and pixels.is_contiguous(memory_format=torch.channels_last)

    def at_layers(self, layers: Sequence[str], pool: str | Pooling = _DEFAULT.pool) -> Backbone:
        """The same network, embedding with the outputs of inner layers.

        What lies behind the last of them is not computed any more.

        Args:
            layers: dotted names of modules, globs of them (``*`` stays between two dots, ``**``
                does not), or negative numbers of blocks, -1 the last.
            pool: ``avg``, ``max``, ``gem``, ``gem:POWER``, ``cls``, ``avg+max`` or ``none``.

        Raises:
            ModelError: no such layer, one that does not run, or one that gives no tensor.
            UsageError: a pooling that the layer does not allow.
        """
        if isinstance(layers, str) or not layers:
            raise UsageError(f"layers: got {layers!r}, expected a list of names of modules")
        self._check_whole("layers")
        names = [name for wanted in layers for name in find_modules(self.module, wanted)]
        pooling = parse_pooling(pool) if isinstance(pool, str) else pool
        size = self.preprocess.input_size
        with device_errors(self.device):
            taps = Taps(
                self.module, tuple(dict.fromkeys(names)), pooling, size, self.provenance.model
            )
        return replace(self, taps=taps, outputs=taps.outputs)

    def _check_whole(self, what: str) -> None:
        if self.folded:
            raise UsageError(f"choose {what} before a network is folded: it has others now")

    def bypass(self, modules: Sequence[str]) -> Backbone:
        """The same network with ``nn.Identity`` in the place of some modules; changes it in place.

        Args:
            modules: named as layers are, see :meth:`at_layers`.

        Raises:
            ModelError: no such module, or without it the shapes do not fit; names the two shapes.
        """
        if self.taps is not None:
            raise UsageError("bypass modules before layers are chosen, not after")
        self._check_whole("bypassed modules")
        names = [name for wanted in modules for name in find_modules(self.module, wanted)]
        size, model = self.preprocess.input_size, self.provenance.model
        with device_errors(self.device):
            replaced = heads.bypass(self.module, names, size, model)
        return replace(self, bypassed=(*self.bypassed, *replaced))

    @property
    def may_fold(self) -> bool:
        """Whether :meth:`fold` would try something."""
        return self.precision == "float32" and may_fuse(self.module, self.device)

    def fold(self) -> Backbone:
        """The same network with batch normalisations folded into its convolutions, in place.

        On a CPU the convolutions also keep their weights packed, and do the activations and the
        additions behind them. The embeddings stay what they are, up to the rounding of float32; the
        network computes faster; one whose way depends on the size of the images is right for that
        of ``preprocess``. Where it cannot be changed so, or is no longer in float32, nothing
        happens. Do it last: that weights are changed through their ``data`` in place is not seen
        afterwards, and what a hook sees that is registered later may be no tensor, or overwritten.

        Raises:
            DeviceError: the device is full, busy or broken.
        """
        if not self.may_fold:
            return self
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(3, 3, *self.preprocess.input_size, generator=generator)
        flat = [torch.full_like(noise[:1], level) for level in FLAT_LEVELS]
        with device_errors(self.device):
            pixels = torch.cat([*flat, noise])
            pixels = pixels.to(self.device, memory_format=torch.channels_last)
            folded = fuse(self.module, self.embed, pixels)
        return replace(self, folded=folded)

    def to(self, device: torch.device, precision: str = "float32") -> Backbone:
        """The backbone on a device and in a precision; the module itself is moved, not copied.

        Args:
            precision: ``float32``, ``bfloat16``, ``float16``, or ``mixed``, which is bfloat16 but
                for the first module, depthwise convolutions and normalisations.

        Raises:
            DeviceError: the device is full, busy or broken.
        """
        with device_errors(device):
            module = self.module.to(device)
            if self.precision != "mixed":
                convert(module, precision)
            elif precision != "mixed":
                raise UsageError("precision: mixed cannot be changed; load the backbone again")
            for parameter in module.parameters():
                # Not Module.to(memory_format=...), which stumbles over weights of five axes.
                if parameter.ndim == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return replace(self, module=module, device=device, precision=precision)


def _head_names(head: object) -> tuple[str, ...]:
    names = () if head is None else (head,) if isinstance(head, str) else head
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise UsageError(
            f"head: got {head!r:.80}, expected the dotted name of a module, a list of such, or None"
        )
    return tuple(names)


def _vector(given: object, output: Output) -> object:
    """One vector for each image, where a network gives a map or tokens."""
    if not isinstance(given, torch.Tensor) or given.ndim < 3:
        return given
    if given.shape[2:].numel() == 1:
        return given.flatten(1)  # a map that was pooled to one position
    if output.definition == POOLED_FEATURES:
        channels = 1 if given.ndim == 4 and given.shape[1] == output.dim else given.ndim - 1
        return given.float().mean([axis for axis in range(1, given.ndim) if axis != channels])
    return given
