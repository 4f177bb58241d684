"""A pretrained network without its classifier, and all that belongs to it."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

from extractor.errors import DeviceError, ModelError, UsageError
from extractor.models.digests import sha256_of_state, versions_of_state
from extractor.models.provenance import Provenance
from extractor.network import heads
from extractor.network.fusion.fuse import fuse, may_fuse
from extractor.network.memory import USABLE, images_that_fit
from extractor.network.module_names import find_modules
from extractor.network.precision import (
    WEIGHT_DTYPES,
    convert,
    input_dtype,
    resolve_precision,
)
from extractor.network.probe import describe_shapes, probe
from extractor.network.taps import POOLED_FEATURES, Output, Taps
from extractor.network.views import ONE_VIEW, Views
from extractor.options import Options, Pooling, parse_pooling
from extractor.preprocess import Preprocess
from extractor.system.devices import device_errors, resolve_device
from extractor.system.float32 import without_autocast
from extractor.version import __version__

__all__ = ["Backbone"]

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
FLAT_LEVELS = (-2.0, 0.0, 2.0)  # normalized pixels: about black, gray and white

_DEFAULT = Options()


class _Known(NamedTuple):
    """Weights of a network when its provenance was checked last.

    Attributes:
        versions: As :func:`~extractor.models.digests.versions_of_state` returns them.
        sha256: Digest of their values if a program changed them; empty before.
    """

    versions: dict[str, int]
    sha256: str = ""


# By network, since several backbones may share one.
_known: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


@dataclass(eq=False)
class Backbone:
    """A network that maps images to embeddings.

    ``nn.Identity`` stands in for every classifier, unless the classifiers are kept.

    :meth:`to`, :meth:`bypass` and :meth:`fold` change the network in place and return the backbone
    itself, as :meth:`torch.nn.Module.to` does. :meth:`at_layers` returns another backbone that
    shares the network, so call it last.

    >>> from extractor import load_backbone
    >>> backbone = load_backbone("torchvision:squeezenet1_0", weights="random", device="cpu")
    >>> backbone(torch.zeros(2, 3, 224, 224)).shape
    torch.Size([2, 512])

    Attributes:
        module: The network in eval mode, on ``device`` and in ``precision``.
        outputs: One output, or several if several layers are embedded at once.
        heads: Dotted names of the classifiers that were replaced by ``nn.Identity``.
        preprocess: Evaluation transform that belongs to the weights.
        provenance: Origin of the network and its weights.
        bypassed: Dotted names of further modules that were replaced by ``nn.Identity``.
        taps: Collects outputs inside the network; None if the network returns its only output.
        device: Device of the network.
        precision: Precision of the computation, see :meth:`to`.
        least_cosine: Least cosine similarity to embeddings in float32; None if not measured.
        is_compiled: Whether ``torch.compile`` compiled the network.
        folded: Normalizations and activations that became part of convolutions, see :meth:`fold`.
        kept_heads: Dotted names of the classifiers, if they were kept.
        evaluations: Published evaluation transforms, if there are two: at the size of training and
            at the size of tests.
        views: Views of an image whose embeddings are averaged.
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
    kept_heads: tuple[str, ...] = ()
    evaluations: tuple[Preprocess, ...] = ()
    views: Views = ONE_VIEW

    def __post_init__(self) -> None:
        if not self.outputs or (self.taps is None and len(self.outputs) != 1):
            raise ValueError(f"got {len(self.outputs)} outputs without taps, expected one")
        if self.views != ONE_VIEW and any(len(output.shape) > 1 for output in self.outputs):
            raise UsageError(
                "pool: maps and tokens differ from view to view; leave out augment and scales, or "
                "pool the layer"
            )
        if self.module in _known:  # a program may be training it
            return
        self.module.eval()
        for parameter in self.module.parameters():  # TorchScript modules lack requires_grad_
            parameter.requires_grad_(False)
        self._accept_weights()

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
        """Make a backbone from a network that neither timm nor torchvision knows.

        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 16), nn.Linear(16, 10))
        >>> Backbone.from_module(network, head="2", preprocess=Preprocess.standard(8)).dim
        16

        Args:
            module: Network that maps ``(B, 3, H, W)`` normalized float pixels to class scores or
                embeddings. It is changed in place.
            head: Dotted names of its classifiers, which become ``nn.Identity``; None for none.
            preprocess: Evaluation transform that it was trained for.
            name: Name in messages and the manifest; by default the name of its class.
            device: Device, as for :func:`extractor.load_backbone`.
            precision: Precision, as for :func:`extractor.load_backbone`.

        Raises:
            ModelError: There is no such head, or the network returns no vector without it.
            DeviceError: This machine does not have the device.
            UsageError: An argument has the wrong type or is out of range.
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
                "head: TorchScript modules cannot be changed; pass the module it was made from"
            )
        target, numbers = resolve_device(device), resolve_precision(precision)
        model = f"module:{name or type(module).__name__}"
        digest = sha256_of_state(module.state_dict())
        shape = _without_heads(module, names, preprocess, model)
        provenance = Provenance(model, "module", __version__, "given", "", digest)
        _known.pop(module, None)  # it may have been passed in before, and trained since
        return cls(module, (Output((shape[0],)),), names, preprocess, provenance).to(
            target, numbers
        )

    def _accept_weights(self, sha256: str = "") -> None:
        """Count the weights as they are now as those of the provenance."""
        _known[self.module] = _Known(versions_of_state(self.module), sha256)

    def _refresh_provenance(self) -> None:
        """Correct the provenance if a program trained the network, or loaded other weights.

        Then the weights count as given, and the SHA-256 is that of their values.
        """
        origin, known = self.provenance, _known.get(self.module)
        if known is None:  # it was pickled
            self._accept_weights()
        elif known.versions != versions_of_state(self.module):
            log.warning("%s: its weights changed since it was loaded; they count as given", origin)
            self._accept_weights(sha256_of_state(self.module.state_dict()))
        digest = _known[self.module].sha256
        if digest not in ("", origin.sha256):
            self.provenance = Provenance(
                *(origin.model, origin.library, origin.library_version, "given", "", digest),
                code=origin.code,
            )

    @property
    def dim(self) -> int:
        """Length of one embedding."""
        return self._only.dim

    @property
    def size_text(self) -> str:
        """Image size in words, with the published sizes that are not in use."""
        words = ("training size", "test size")
        sizes = [self.preprocess.size_text]
        if self.views.count > 1:
            sizes.append(f"mean of {self.views.count} views")
        for name, published in zip(words, self.evaluations, strict=False):
            if published.size_text != self.preprocess.size_text:
                sizes.append(f"{name} {published.size_text}")
        return "; ".join(sizes)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the pixels that the network takes; :meth:`embed` converts them."""
        return input_dtype(self.precision)

    @property
    def _only(self) -> Output:
        if len(self.outputs) != 1:
            layers = ", ".join(output.layer for output in self.outputs)
            raise UsageError(f"this backbone has {len(self.outputs)} outputs ({layers}); use embed")
        return self.outputs[0]

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embed a batch of pixels.

        Args:
            pixels: ``(B, 3, H, W)`` floating point, RGB, normalized as ``preprocess`` says.

        Returns:
            ``(B, dim)`` float32 on the backbone's device; ``(B, channels, height, width)`` or
            ``(B, tokens, channels)`` for a layer that is not pooled.

        Raises:
            UsageError: The pixels have another shape or type, the backbone has several outputs, or
                the network is in training mode.
            ModelError: The network returned something other than a vector per image.
        """
        self._only  # noqa: B018  (raises before anything is computed)
        return self.embed(pixels)[0]

    def embed(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Embed a batch of pixels in one forward pass; return a tensor for each output.

        There is one pass for each of several :attr:`views`, and the result is their mean.

        Args:
            pixels: ``(B, 3, H, W)`` floating point, RGB, normalized as ``preprocess`` says.

        Raises:
            UsageError: The pixels have another shape or type, or the network is in training mode.
            ModelError: The network returned other shapes than when it was tried.
        """
        _check_pixels(pixels)
        self._check_mode()
        pixels = pixels.to(self.device)
        # Not inference mode, whose tensors a layer that is being trained cannot take.
        with torch.no_grad(), without_autocast(self.device):
            if self.views.count == 1:
                return self._embed_view(*self.views.of(pixels))
            sums: list[torch.Tensor] = []
            for view in self.views.of(pixels):
                outputs = self._embed_view(view)
                sums = [a + b for a, b in zip(sums, outputs, strict=True)] if sums else [*outputs]
            return tuple(each / self.views.count for each in sums)

    def _embed_view(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pixels = pixels.to(self.dtype)
        if self.taps is not None:
            tensors: tuple[object, ...] = self.taps(self.module, pixels)
        else:
            tensors = (_vector(self.module(pixels), self.outputs[0]),)
        embeddings = []
        for tensor, output in zip(tensors, self.outputs, strict=True):
            expected = (len(pixels), *output.shape)
            if not isinstance(tensor, torch.Tensor) or tensor.shape != expected:
                raise ModelError(
                    f"{self.provenance.model} returned {describe_shapes(tensor)}, expected "
                    f"{expected} as for blank images, for its {output.definition}"
                )
            embeddings.append(tensor.float())
        return tuple(embeddings)

    def at_layers(self, layers: Sequence[str], pool: str | Pooling = _DEFAULT.pool) -> Backbone:
        """Return a backbone that shares the network and embeds with the outputs of inner layers.

        Modules after the last of these layers are not computed.

        Args:
            layers: Dotted names of modules, globs of them (``*`` matches no dot, ``**`` does), or
                negative block numbers, -1 for the last.
            pool: ``avg``, ``max``, ``gem``, ``gem:POWER``, ``cls``, ``avg+max`` or ``none``.

        Raises:
            ModelError: There is no such layer, it does not run, or it returns no tensor.
            UsageError: The layer does not allow this pooling, or the network is in training mode.
        """
        if isinstance(layers, str) or not layers:
            raise UsageError(f"layers: got {layers!r}, expected a list of names of modules")
        self._check_not_folded("layers")
        self._check_mode()
        self._refresh_provenance()
        names = [name for wanted in layers for name in find_modules(self.module, wanted)]
        self._warn_of_heads(names)
        pooling = parse_pooling(pool) if isinstance(pool, str) else pool
        size = self.preprocess.input_size
        with device_errors(self.device):
            taps = Taps(
                self.module, tuple(dict.fromkeys(names)), pooling, size, self.provenance.model
            )
        return replace(self, taps=taps, outputs=taps.outputs)

    def _warn_of_heads(self, layers: Sequence[str]) -> None:
        """Warn of layers that are a replaced classifier, or hold or held one."""
        affected = [
            layer
            for layer in dict.fromkeys(layers)
            if any(f"{layer}.".startswith(f"{h}.") or h.startswith(f"{layer}.") for h in self.heads)
        ]
        if affected:
            log.warning(
                "layer %s: the classifier %s is replaced by nn.Identity, so this is its input; %s",
                *(", ".join(affected), ", ".join(self.heads)),
                "use --keep-head for its own output"
                if self.provenance.library in ("timm", "torchvision")
                else "keep the classifier for its own output",
            )

    def _check_mode(self) -> None:
        """Check that the network is in eval mode.

        Raises:
            UsageError: It is in training mode, with dropout and statistics of the batch.
        """
        if self.module.training:
            raise UsageError(
                f"{self.provenance.model} is in training mode, in which embeddings are random; "
                "call backbone.module.eval()"
            )

    def _check_not_folded(self, chosen: str) -> None:
        if self.folded:
            raise UsageError(f"choose {chosen} before fold(), which changes the modules")

    def bypass(self, modules: Sequence[str]) -> Backbone:
        """Replace modules by ``nn.Identity``, in place, and return the backbone itself.

        Args:
            modules: Names, globs or block numbers, as for :meth:`at_layers`.

        Raises:
            ModelError: There is no such module, or shapes do not fit without it. The message names
                both shapes.
            UsageError: Layers were chosen before, the network is folded, or it is in training mode.
        """
        if self.taps is not None:
            raise UsageError("bypass modules before layers are chosen, not after")
        self._check_not_folded("bypassed modules")
        self._check_mode()
        self._refresh_provenance()
        names = [name for wanted in modules for name in find_modules(self.module, wanted)]
        size, model = self.preprocess.input_size, self.provenance.model
        with device_errors(self.device):
            replaced = heads.bypass(self.module, names, size, model)
        self.bypassed = (*self.bypassed, *replaced)
        self._accept_weights(_known[self.module].sha256)
        return self

    def images_at_a_time(self, wanted: int, *, reserved_bytes: int = 0) -> int:
        """Return how many images fit in the memory of a CPU at a time, at most ``wanted``.

        Args:
            wanted: Number of images.
            reserved_bytes: Memory that other things will take.

        Raises:
            DeviceError: A single image does not fit.
        """
        if self.device.type != "cpu" or self.is_compiled:
            return wanted
        height, width = max(self.views.sizes(self.preprocess.input_size))
        single = replace(self, views=ONE_VIEW)  # views are computed one after the other
        fit = images_that_fit(single, (height, width), wanted, reserved_bytes=reserved_bytes)
        if not fit.images:
            others = f", the decoded batches {_gib(reserved_bytes)}" if reserved_bytes else ""
            raise DeviceError(
                f"{self.provenance.model}: one image of {height} x {width} pixels needs about "
                f"{_gib(fit.image_bytes)}{others}, and {_gib(fit.free_bytes)} of memory are free, "
                f"of which {USABLE:.0%} may be used; "
                f"try a smaller --image-size{' or --batch-size' if reserved_bytes else ''}"
            )
        return fit.images

    @property
    def may_fold(self) -> bool:
        """Whether :meth:`fold` would try to change the network."""
        return self.precision == "float32" and may_fuse(self.module, self.device)

    def fold(self) -> Backbone:
        """Fold batch normalizations into convolutions, in place, and return the backbone itself.

        The network computes faster. Its embeddings stay the same up to the rounding of float32. On
        a CPU, convolutions also keep their weights packed and apply the activations behind them. A
        network whose control flow depends on the image size is right for the size of
        ``preprocess``. If the network cannot be changed, or is not in float32, nothing happens.

        Call it last. Later changes of a weight's ``data`` have no effect. A hook that is registered
        later sees the output of the fused modules.

        Raises:
            DeviceError: The device is full, busy or broken.
            UsageError: The network is in training mode.
        """
        if not self.may_fold:
            return self
        self._check_mode()
        self._refresh_provenance()
        generator = torch.Generator("cpu").manual_seed(0)
        noise = torch.randn(
            *(3, 3, *self.preprocess.input_size),
            generator=generator,
            dtype=torch.float32,
            device="cpu",
        )
        flat = [torch.full_like(noise[:1], level) for level in FLAT_LEVELS]
        count = self.images_at_a_time(len(flat) + len(noise))
        with device_errors(self.device):
            pixels = torch.cat([*flat, noise])[-count:]
            pixels = pixels.to(self.device, memory_format=torch.channels_last)
            single = replace(self, views=ONE_VIEW)
            compared = None if self.views == ONE_VIEW else self.embed
            self.folded = fuse(self.module, single.embed, pixels, compared=compared)
        self._accept_weights(_known[self.module].sha256)
        return self

    def to(self, device: torch.device | str, precision: str = "float32") -> Backbone:
        """Move the network to a device and a precision, in place, and return the backbone itself.

        Args:
            device: Device to compute on, or its name as for :func:`extractor.load_backbone`.
            precision: ``float32``, ``bfloat16``, ``float16`` or ``mixed``. The last is bfloat16
                except for the first module, depthwise convolutions and normalizations.

        Raises:
            DeviceError: This machine lacks the device, or it is full, busy or broken.
            UsageError: Something else than a device, an unknown precision, or another one than
                ``mixed`` although the precision is ``mixed`` already.
        """
        if isinstance(device, str):
            device = resolve_device(device)
        if not isinstance(device, torch.device):
            raise UsageError(
                f"device: got {device!r:.80}, expected a torch.device or a name such as cuda:0"
            )
        if precision not in WEIGHT_DTYPES:
            raise UsageError(
                f"precision: got {precision!r:.80}, expected one of {', '.join(WEIGHT_DTYPES)}"
            )
        self._refresh_provenance()
        with device_errors(device):
            module = self.module.to(device)  # the same module, moved
            if self.precision != "mixed":
                convert(module, precision)
            elif precision != "mixed":
                raise UsageError("precision: mixed cannot be changed; load the backbone again")
            for parameter in module.parameters():
                # Not Module.to(memory_format=...), which fails for weights with five axes.
                if parameter.ndim == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.device, self.precision = device, precision
        self._accept_weights(_known[self.module].sha256)
        return self


def _check_pixels(pixels: object) -> None:
    """Check the input of a network.

    Raises:
        UsageError: It is no batch of normalized pixels.
    """
    if not isinstance(pixels, torch.Tensor):
        raise UsageError(
            f"pixels: got {type(pixels).__name__}, expected a tensor (B, 3, H, W); for images try "
            "Extractor(backbone)"
        )
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise UsageError(f"pixels: got shape {tuple(pixels.shape)}, expected (B, 3, H, W)")
    if not pixels.is_floating_point():
        raise UsageError(
            f"pixels: got {pixels.dtype}, expected floating point, normalized as "
            "backbone.preprocess says; for images try Extractor(backbone)"
        )


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def _without_heads(
    module: nn.Module, names: Sequence[str], preprocess: Preprocess, model: str
) -> tuple[int, ...]:
    """Remove classifiers, in place, and return the shape of an embedding.

    Raises:
        ModelError: There is no such classifier, or no vector without it. The network stays as it
            was.
    """
    modes = [(each, each.training) for each in module.modules()]
    originals = {name: each for name, each in module.named_modules() if name in names}
    if again := [name for name, each in originals.items() if isinstance(each, nn.Identity)]:
        log.warning(
            "%s: %s is an nn.Identity already; if this network was passed in before, use that "
            "backbone, as the SHA-256 of a network with its head is another one",
            *(model, ", ".join(again)),
        )
    heads.replace_with_identity(module, names)
    try:
        shape = probe(module.eval(), preprocess.input_size, name=model)
        if math.prod(shape) != shape[0]:
            raise ModelError(
                f"{model} returns shape {shape} for an image, expected a vector (dim,); name its "
                "classifier with head=, or embed with one of its layers"
            )
    except BaseException:
        for name, original in originals.items():
            heads.set_submodule(module, name, original)
        for each, is_training in modes:
            each.training = is_training
        raise
    return shape


def _head_names(head: object) -> tuple[str, ...]:
    names = () if head is None else (head,) if isinstance(head, str) else head
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise UsageError(
            f"head: got {head!r:.80}, expected the dotted name of a module, a list of names, or "
            "None"
        )
    return tuple(names)


def _vector(x: object, output: Output) -> object:
    """Reduce a map or tokens to one vector for each image; return anything else as it is."""
    if not isinstance(x, torch.Tensor) or x.ndim < 3:
        return x
    if x.shape[2:].numel() == 1:
        return x.flatten(1)  # a map that was pooled to one position
    if output.definition == POOLED_FEATURES:
        channels = 1 if x.ndim == 4 and x.shape[1] == output.dim else x.ndim - 1
        return x.float().mean([axis for axis in range(1, x.ndim) if axis != channels])
    return x
