"""What a run can be told; every default lives here and nowhere else."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

from extractor.errors import UsageError
from extractor.preprocess import FITS, INTERPOLATIONS, MAX_CROP_PCT, PixelChanges

__all__ = [
    "COMPILES",
    "DEFAULT_MODEL",
    "DTYPES",
    "POOLS",
    "PRECISIONS",
    "Options",
    "Pooling",
    "default_batch_size",
    "join_names",
    "parse_pooling",
    "planned_stores",
    "split_model",
    "split_names",
    "store_folders",
    "store_name",
]

DEFAULT_MODEL = "resnet50"
DEFAULT_OUT = "features"
COMPILES = ("auto", "on", "off")
PRECISIONS = ("auto", "float32", "bfloat16", "float16", "mixed")
DTYPES = ("float32", "float16")
POOLS = ("avg", "max", "gem", "cls", "avg+max", "none")
GEM_POWER = 3.0  # of Radenovic et al., Fine-tuning CNN Image Retrieval with No Human Annotation

# Far beyond what gains anything; a typing error should not take the machine down.
MAX_BATCH_SIZE = 65_536
MAX_WORKERS = 1_024
MAX_PIXELS = 200_000_000  # of an image before it is resized
CHECKS = ("stat", "content")
DECODES = ("scaled", "exact", "gpu")
DECODE = DECODES[0]
MAX_IMAGE_SIZE = 16_384
MAX_SECONDS = 1e6


@dataclass(frozen=True)
class Pooling:
    """How the positions of a map, or its tokens, become one vector.

    Attributes:
        kind: one of :data:`POOLS`.
        power: of the generalised mean; of no meaning to the others.
    """

    kind: str
    power: float = GEM_POWER

    def __str__(self) -> str:
        return f"gem:{self.power:g}" if self.kind == "gem" else self.kind


def parse_pooling(text: str) -> Pooling:
    """The pooling that is written ``avg``, ``max``, ``gem``, ``gem:POWER``, ``cls`` and so on.

    Raises:
        UsageError: none of them.
    """
    kind, colon, power = text.partition(":")
    try:
        if kind in POOLS and not colon:
            return Pooling(kind)
        if kind == "gem" and 0 < float(power) < math.inf:
            return Pooling(kind, float(power))
    except ValueError:
        pass
    raise UsageError(
        f"pool: got {text!r}, expected one of {', '.join(POOLS)}, or gem:POWER such as gem:4"
    )


@dataclass(frozen=True)
class Options:
    """Everything that a run can be told beside the images, the model and the place of the store.

    Attributes:
        weights: ``default``, ``random``, a tag of the library, a file, or ``hf-hub:ORG/NAME``.
        weights_key: which of several state dicts in a checkpoint, such as ``model_ema``; dots lead
            deeper. None takes ``state_dict`` or ``model``.
        layers: names of modules whose outputs are the embeddings, globs of such, or negative
            numbers of blocks; without any it is the pre-logits vector.
        pool: how the positions of a layer become one vector, see :func:`parse_pooling`.
        concat: make one vector of several layers.
        bypass: modules, named as layers are, that get an ``nn.Identity`` in their place.
        image_size: of the model's input in pixels, one number or (height, width).
        crop_pct, interpolation, mean, std: see :class:`extractor.preprocess.PixelChanges`.
        resize: ``crop``, ``pad`` or ``squash``, its ``fit``.
        seed: of the random weights; without meaning for any others.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        precision: of the computation: ``float32``, ``bfloat16``, ``float16``, or ``mixed``, which
            is bfloat16 with the sensitive layers in float32; ``auto`` is that of the rows that are
            there, else the fastest that keeps a cosine of 0.999 to float32 with these weights.
        compile: ``on`` compiles the network, ``auto`` where there are images enough to repay it.
        dtype: of the stored embeddings, ``float32`` or ``float16``.
        normalize: scale every embedding to unit Euclidean length.
        batch_size: images in a forward pass; None chooses by device.
        workers: decoding threads; None means one for each core that the process may use.
        threads: that torch computes with on a CPU; None is its own number, at most one a core.
        shard_images: images, failed ones included, that one shard of the store answers for.
        overwrite: compute all anew, and replace the store that is there once that is complete.
        decode: ``scaled`` lets libjpeg decode what is much larger than the model's input at a half,
            a quarter or an eighth of its size; ``exact`` decodes every pixel; ``gpu`` leaves plain
            JPEGs to the CUDA device that computes, and decodes all others exactly.
        check: how images that have rows already are compared with what they were: ``stat``, by
            size and time of modification, or ``content``, by the SHA-256 of their bytes.
        keep_missing: keep the rows of images that are no longer there.
        retry_failed: try images again that failed, although they are unchanged.
        max_pixels: of an image before it is resized; one that declares more fails. It is also what
            all threads decode at a time. Pillow's own limit holds as well; the command raises it.
        image_timeout: seconds after which the decoding of an image is given up.
        max_failure_rate: share of the images that may fail without a word in the exit code.
        lock: refuse to write where no file can be locked, and a second run would go unseen.
        profile: file for a trace of what each thread did when, for chrome://tracing or Perfetto.

    Raises:
        UsageError: a value out of its range.
    """

    weights: str = "default"
    weights_key: str | None = None
    layers: Sequence[str] = ()
    pool: str = "avg"
    concat: bool = False
    bypass: Sequence[str] = ()
    image_size: int | tuple[int, int] | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    resize: str | None = None
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    compile: str = "auto"
    dtype: str = "float32"
    normalize: bool = False
    batch_size: int | None = None
    workers: int | None = None
    threads: int | None = None
    shard_images: int = 65_536
    overwrite: bool = False
    decode: str = DECODE
    check: str = "stat"
    keep_missing: bool = False
    retry_failed: bool = False
    max_pixels: int = MAX_PIXELS
    image_timeout: float = 60.0
    max_failure_rate: float = 0.0
    lock: bool = True
    profile: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            raise UsageError(
                f"device: got {self.device!r}, expected auto, cpu, cuda, cuda:N or mps"
            )
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("compile", self.compile, COMPILES)
        _one_of("dtype", self.dtype, DTYPES)
        _within("seed", self.seed, 0, 2**63 - 1)
        _within("batch size", self.batch_size, 1, MAX_BATCH_SIZE)
        _within("number of workers", self.workers, 1, MAX_WORKERS)
        _within("number of threads", self.threads, 1, MAX_WORKERS)
        _within("number of images in a shard", self.shard_images, 1, 2**63 - 1)
        _one_of("decode", self.decode, DECODES)
        _one_of("check", self.check, CHECKS)
        if self.profile is not None:
            if not self.profile or os.path.isdir(self.profile):
                raise UsageError(f"profile: got {self.profile!r}, expected the name of a file")
            if not os.path.isdir(os.path.dirname(self.profile) or "."):
                raise UsageError(f"profile: there is no folder for the file {self.profile!r}")
        _within("max pixels", self.max_pixels, 1, 2**63 - 1)
        _number_within("image timeout", self.image_timeout, 0, MAX_SECONDS)
        if not (math.isfinite(self.max_failure_rate) and 0 <= self.max_failure_rate <= 1):
            raise UsageError(
                f"failure rate: got {self.max_failure_rate}, expected a share from 0 to 1, such as "
                "0.01"
            )
        if not self.weights:
            raise UsageError("weights: got an empty name; try default, random, a tag or a file")
        if self.weights_key == "":
            raise UsageError("weights key: got an empty name; try model_ema")
        self._check_layers()
        self._check_pixels()

    def _check_layers(self) -> None:
        for what, names in (("layers", self.layers), ("bypass", self.bypass)):
            if isinstance(names, str) or not all(isinstance(name, str) and name for name in names):
                raise UsageError(f"{what}: got {names!r}, expected a list of names of modules")
        kind = parse_pooling(self.pool).kind
        if not self.layers and self.pool != "avg":
            raise UsageError(f"pool: {self.pool} pools a layer; name one, such as --layer layer4")
        if len(set(self.layers)) < len(self.layers):
            raise UsageError(f"layers: got {', '.join(self.layers)}, expected each but once")
        if self.concat and len(self.layers) < 2 and not any(map(_is_open, self.layers)):
            raise UsageError("concat: joins several layers; name more than one with --layer")
        if kind == "none" and (self.concat or self.normalize):
            raise UsageError(
                "pool: none keeps maps or tokens, which can be neither joined nor scaled to unit "
                "length; leave --concat and --normalize out"
            )

    def _check_pixels(self) -> None:
        self._image_size()
        _number_within("crop pct", self.crop_pct, 0, MAX_CROP_PCT)
        if self.interpolation is not None:
            _one_of("interpolation", self.interpolation, INTERPOLATIONS)
        if self.resize is not None:
            _one_of("resize", self.resize, FITS)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is None:
                continue
            if not isinstance(values, (tuple, list)) or len(values) != 3:
                raise UsageError(f"{name}: got {values!r}, expected three numbers (R, G, B)")
            least, most = (0.0, 1.0) if name == "mean" else (1e-6, 2.0)
            for value in values:
                if not (isinstance(value, (int, float)) and least <= value <= most):
                    raise UsageError(
                        f"{name}: got {values!r}, expected three "
                        f"{'positive ' if name == 'std' else ''}numbers for pixels of 0 to 1"
                    )

    def _image_size(self) -> tuple[int, int] | None:
        if self.image_size is None:
            return None
        size = self.image_size
        edges = size if isinstance(size, (tuple, list)) else (size, size)
        for edge in edges:
            _within("image size", edge, 1, MAX_IMAGE_SIZE)
        if len(edges) != 2:
            raise UsageError(f"image size: got {size!r}, expected a number or (height, width)")
        return int(edges[0]), int(edges[1])

    @property
    def pixel_changes(self) -> PixelChanges:
        """What is wanted otherwise than the model's own evaluation transform."""
        return PixelChanges(
            self._image_size(),
            self.crop_pct,
            self.interpolation,
            self.mean and (self.mean[0], self.mean[1], self.mean[2]),
            self.std and (self.std[0], self.std[1], self.std[2]),
            self.resize,
        )

    @property
    def pooling(self) -> Pooling:
        """:attr:`pool`, read."""
        return parse_pooling(self.pool)


def default_batch_size(device_type: str) -> int:
    """Images in one forward pass where nothing else is asked for.

    On a CPU larger batches gain nothing once every core is busy and cost memory and a longer
    padded tail; a GPU needs more of them to fill its multiprocessors.
    """
    return 32 if device_type == "cpu" else 128


def store_name(model: str, layer: str = "") -> str:
    """The name of a store's folder for a model as it was typed, and a layer of it.

    >>> store_name("torchvision:resnet50"), store_name("resnet50", "layer3.1")
    ('torchvision-resnet50', 'resnet50@layer3.1')
    """
    if model.startswith("local-dir:") or re.search(r"\.py:[^:/]*$", model):
        folders, _, model = model.rstrip("/").rpartition("/")
        model = model if folders else model.removeprefix("local-dir:")
    name = re.sub("[:/]", "-", model)
    return f"{name}@{layer}" if layer else name


def join_names(names: Sequence[str]) -> str:
    """One name for what is joined of several."""
    return "+".join(names)


def split_names(joined: str) -> list[str]:
    """What :func:`join_names` joined, of names that hold no plus sign themselves."""
    return joined.split("+")


def split_model(model: str) -> list[str]:
    """The names of the models that ``A+B`` joins; one for all others.

    >>> split_model("resnet50+torchvision:vgg16")
    ['resnet50', 'torchvision:vgg16']
    """
    names: list[str] = []
    for piece in model.split("+"):
        if names and _is_cut_path(names[-1]):
            names[-1] += f"+{piece}"  # the sign stood in the name of a folder
        else:
            names.append(piece)
    return names


def _is_cut_path(name: str) -> bool:
    """Whether a name is the beginning of a path, and the rest stands behind a plus sign."""
    if name.startswith("local-dir:"):
        return not os.path.isdir(name.removeprefix("local-dir:"))
    is_path = os.sep in name and not name.startswith("hf-hub:")
    return is_path and re.search(r"\.py:\w+$", name) is None


def planned_stores(models: Sequence[str], options: Options) -> list[str] | None:
    """Names of the stores that a run will fill; None where only the loaded models can tell."""
    if any(map(_is_open, options.layers)):
        return None
    layers = [join_names(options.layers)] if options.concat else list(options.layers)
    return [store_name(model, layer) for model in models for layer in layers or [""]]


def _is_open(layer: str) -> bool:
    """Whether only the network can tell which modules are meant: a glob, the number of a block."""
    return re.search(r"[*?\[]|^-\d", layer) is not None


def store_folders(out: str | None, names: Sequence[str]) -> list[str]:
    """Where the stores of a run lie: a single one in OUT itself, several each in its own below.

    >>> store_folders(None, ["resnet50"]), store_folders("a", ["x"]), store_folders("a", ["x", "y"])
    (['features/resnet50'], ['a'], ['a/x', 'a/y'])
    """
    if out is not None and len(names) == 1:
        return [out]
    return [f"{DEFAULT_OUT if out is None else out.rstrip('/') or '/'}/{name}" for name in names]


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{name}: got {value!r}, expected one of {', '.join(allowed)}")


def _within(name: str, value: object, least: int, most: int) -> None:
    if value is None:
        return
    if value is True or not isinstance(value, Integral) or not least <= int(value) <= most:
        raise UsageError(f"{name}: got {value!r}, expected a whole number from {least} to {most}")


def _number_within(name: str, value: object, above: float, most: float) -> None:
    if value is not None and not (isinstance(value, (int, float)) and above < value <= most):
        raise UsageError(f"{name}: got {value!r}, expected more than {above} and at most {most}")
