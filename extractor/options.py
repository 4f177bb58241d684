"""The options of a run: type, default, flag, help text and bounds of each in one place.

The command's parser, the signatures of the library and ``docs/cli.md`` follow from the fields of
:class:`Options`.
"""

from __future__ import annotations

import difflib
import inspect
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

from extractor.errors import UsageError
from extractor.flags import SCOPES, Flag, Option, Scope, option, options_in
from extractor.preprocess import (
    MAX_CROP_PCT,
    Fit,
    GrayBits,
    Interpolation,
    PixelChanges,
    check_gray_bits,
    parse_gray_bits,
    plain_numbers,
)

__all__ = [
    "DEFAULT_MODEL",
    "GROUPS",
    "SERVING",
    "Options",
    "Pooling",
    "default_batch_size",
    "is_open_layer",
    "parse_pooling",
    "signature_with_options",
]

DEFAULT_MODEL = "resnet50"
DEFAULT_OUT = "features"
POOLS = ("avg", "max", "gem", "cls", "avg+max", "none")
GEM_POWER = 3.0  # of Radenovic et al., Fine-tuning CNN Image Retrieval with No Human Annotation

Precision = Literal["auto", "float32", "bfloat16", "float16", "mixed"]
Compile = Literal["auto", "on", "off"]
Fuse = Literal["auto", "off"]
Dtype = Literal["float32", "float16"]
Augment = Literal["flip"]
Decode = Literal["scaled", "exact", "gpu"]
Check = Literal["stat", "content"]
Engine = Literal["local", "ray"]

# Far beyond what any machine gains from; a typo should not take the machine down.
MAX_BATCH_SIZE = 65_536
MAX_WORKERS = 1_024
MAX_IMAGE_SIZE = 16_384
MAX_SECONDS = 1e6
LEAST_SCALE, MAX_SCALE = 0.1, 4.0
MAX_SCALES = 8
MAX_INTEGER = 2**63 - 1

MAX_PIXELS = 200_000_000  # default limit for one image before it is resized
# Options of Extractor.for_store: they change no rows. A store decides all others.
SERVING = ("batch_size", "workers", "threads", "max_pixels", "image_timeout")

DECODE: Decode = get_args(Decode)[0]

INPUT = "input and output"
MODEL = "model"
EMBEDDING = "embedding"
PIXELS = "pixels"
COMPUTE = "computation"
UPDATE = "existing stores"
LIMITS = "undecodable images"
RUN = "run"
GROUPS = (INPUT, MODEL, EMBEDDING, PIXELS, COMPUTE, UPDATE, LIMITS, RUN)


@dataclass(frozen=True)
class Pooling:
    """A way to turn the positions of a feature map, or its tokens, into one vector.

    Attributes:
        kind: One of :data:`POOLS`.
        power: Exponent of the generalized mean; ignored by the other kinds.
    """

    kind: str
    power: float = GEM_POWER

    def __str__(self) -> str:
        return f"gem:{self.power:g}" if self.kind == "gem" else self.kind


def parse_pooling(text: str) -> Pooling:
    """Return the pooling written as ``avg``, ``max``, ``gem``, ``gem:POWER``, ``cls`` and so on.

    Raises:
        UsageError: The text names no pooling.
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


def parse_devices(text: str) -> tuple[int, ...] | Literal["all", "cpu"]:
    """Return the indices of the GPUs written as ``0,1,3``, or ``all`` or ``cpu``.

    Raises:
        UsageError: The text has another form, or names a GPU twice.
    """
    if text in ("all", "cpu"):
        return "all" if text == "all" else "cpu"
    names = [name.strip() for name in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,4}", name) for name in names):
        raise UsageError(f"devices: got {text!r}, expected all, cpu or numbers of GPUs as in 0,1,3")
    numbers = tuple(map(int, names))
    twice = sorted({number for number in numbers if numbers.count(number) > 1})
    if twice:
        raise UsageError(
            f"devices: got GPU {twice[0]} more than once; for several processes on each GPU try "
            "--processes"
        )
    return numbers


def parse_part(text: str) -> tuple[int, int] | Literal["auto"]:
    """Return the part written as ``3/16``, from 1, and the number of parts; or ``auto``.

    Raises:
        UsageError: The text has another form, or there is no such part.
    """
    if text == "auto":
        return "auto"
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if not found:
        raise UsageError(f"part: got {text!r}, expected K/N such as 3/16, or auto")
    number, count = map(int, found.groups())
    if not count:
        raise UsageError(f"part: got {text}, expected at least one part, such as 1/1")
    if not 1 <= number <= count:
        raise UsageError(f"part: got {text}, expected a part from 1/{count} to {count}/{count}")
    return number, count


def parse_image_size(text: str) -> int | tuple[int, int]:
    """Return the image size written as ``N`` or ``HEIGHTxWIDTH``.

    Raises:
        ValueError: The text has another form.
    """
    if not re.fullmatch(r"\d+(x\d+)?", text):
        raise ValueError(f"got {text!r}, expected N or HEIGHTxWIDTH, in pixels")
    height, by, width = text.partition("x")
    return (int(height), int(width)) if by else int(height)


def parse_rgb(text: str) -> tuple[float, float, float]:
    """Return the three numbers written as ``R,G,B``.

    Raises:
        ValueError: The text has another form.
    """
    try:
        red, green, blue = (float(number) for number in text.split(","))
    except ValueError as error:
        raise ValueError(
            f"got {text!r}, expected three numbers such as 0.485,0.456,0.406"
        ) from error
    return red, green, blue


def parse_scales(text: str) -> tuple[float, ...]:
    """Return the factors written as ``1,0.71``.

    Raises:
        ValueError: The text has another form.
    """
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise ValueError(f"got {text!r}, expected numbers such as 1,0.71") from None


def _check_scales(scales: object) -> tuple[float, ...] | None:
    """Return the scales as floats, the largest first; None if there is nothing but 1.

    Raises:
        UsageError: They are no different numbers, or out of range.
    """
    if scales is None:
        return None
    if not isinstance(scales, (tuple, list)) or not 1 <= len(scales) <= MAX_SCALES:
        raise UsageError(
            f"scales: got {scales!r}, expected 1 to {MAX_SCALES} numbers such as (1, 0.71)"
        )
    for scale in scales:
        is_number = isinstance(scale, Real) and not isinstance(scale, bool)
        if not is_number or not LEAST_SCALE <= scale <= MAX_SCALE:
            raise UsageError(
                f"scales: got {scale!r}, expected numbers from {LEAST_SCALE:g} to {MAX_SCALE:g}, "
                "such as 1,0.71"
            )
    factors = tuple(sorted(map(float, scales), reverse=True))
    twice = [f"{scale:g}" for scale in sorted(set(factors)) if factors.count(scale) > 1]
    if twice:
        raise UsageError(f"scales: got {twice[0]} more than once, expected each only once")
    return None if factors == (1.0,) else factors


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything a caller can choose about a run, except the images, the model and the output.

    ``docs/cli.md`` lists the options with their flags, environment variables and defaults.

    >>> Options(layers=["layer3"], pool="gem", normalize=True).batch_size is None
    True

    Raises:
        UsageError: A value is out of range, or two options contradict each other.
    """

    weights: str = option(
        "default",
        Flag(
            "--weights",
            "default, random, a tag of the library, a file, or hf-hub:ORG/NAME",
            MODEL,
            metavar="WEIGHTS",
            takes_path=True,
            scope="backbone",
        ),
    )
    weights_key: str | None = option(
        None,
        Flag(
            "--weights-key",
            "state dict to load from a checkpoint that holds several, such as model_ema; "
            "dots lead to nested ones",
            MODEL,
            metavar="KEY",
            advanced=True,
            unset="state_dict or model",
            scope="backbone",
        ),
    )
    weights_prefix: str | None = option(
        None,
        Flag(
            "--weights-prefix",
            "take only the tensors whose names begin with this, such as teacher., and drop it",
            MODEL,
            metavar="PREFIX",
            advanced=True,
            unset="found by itself if there is one copy of the network",
            scope="backbone",
        ),
    )
    seed: int = option(
        0,
        Flag(
            "--seed",
            "seed of random weights and of random numbers in a FILE.py:FUNCTION",
            MODEL,
            metavar="N",
            advanced=True,
            minimum=0,
            maximum=MAX_INTEGER,
            scope="backbone",
        ),
    )
    bypass: Sequence[str] = option(
        (),
        Flag(
            "--bypass",
            "replace a module with nn.Identity to see what it contributes: a dotted name, a glob, "
            "or a negative block number; repeatable",
            MODEL,
            metavar="MODULE",
            advanced=True,
            scope="backbone",
        ),
    )
    layers: Sequence[str] = option(
        (),
        Flag(
            "--layer",
            "use the output of this module instead of the pre-logits: a dotted name, a glob, or a "
            "negative block number; repeat it to fill several stores",
            EMBEDDING,
            metavar="LAYER",
            scope="backbone",
        ),
    )
    pool: str = option(
        "avg",
        Flag(
            "--pool",
            f"pooling of a layer's positions into one vector: {', '.join(POOLS)} or gem:POWER",
            EMBEDDING,
            metavar="POOL",
            scope="backbone",
        ),
    )
    keep_head: bool = option(
        False,
        Flag(
            "--keep-head",
            "keep the classifier and use its output, such as logits or CLIP's projected vector",
            EMBEDDING,
            advanced=True,
            scope="backbone",
        ),
    )
    augment: Augment | None = option(
        None,
        Flag(
            "--augment",
            "flip takes the mean of the embeddings of an image and of its mirror image",
            EMBEDDING,
            advanced=True,
            unset="the image alone",
            scope="backbone",
        ),
    )
    scales: tuple[float, ...] | None = option(
        None,
        Flag(
            "--scales",
            "take the mean of the embeddings of an image resized by each of these factors, such as "
            "1,0.71; for models that accept several sizes",
            EMBEDDING,
            metavar="FACTORS",
            advanced=True,
            parse=parse_scales,
            unset="1",
            scope="backbone",
        ),
    )
    normalize: bool = option(
        False,
        Flag(
            "--normalize",
            "scale every embedding to unit Euclidean length",
            EMBEDDING,
            scope="images",
        ),
    )
    concat: bool = option(
        False,
        Flag(
            "--concat",
            "join several layers into one vector",
            EMBEDDING,
            advanced=True,
            scope="images",
        ),
    )
    dtype: Dtype = option(
        "float32",
        Flag(
            "--dtype",
            "number format of the stored embeddings",
            EMBEDDING,
            advanced=True,
        ),
    )
    image_size: int | tuple[int, int] | None = option(
        None,
        Flag(
            "--image-size",
            "size of the model's input in pixels: N or HEIGHTxWIDTH",
            PIXELS,
            metavar="N",
            advanced=True,
            parse=parse_image_size,
            unset="the model's own",
            scope="backbone",
        ),
    )
    test_size: bool = option(
        False,
        Flag(
            "--test-size",
            "use the size and crop that timm tests the weights with, where they differ from those "
            "of training",
            PIXELS,
            advanced=True,
            scope="backbone",
        ),
    )
    crop_pct: float | None = option(
        None,
        Flag(
            "--crop-pct",
            "fraction of the resized image kept by the center crop",
            PIXELS,
            metavar="FRACTION",
            advanced=True,
            above=0,
            maximum=MAX_CROP_PCT,
            unset="the model's own",
            scope="backbone",
        ),
    )
    resize: Fit | None = option(
        None,
        Flag(
            "--resize",
            "fit an image into the model's input: crop what does not fit, pad with the mean color, "
            "or squash it",
            PIXELS,
            advanced=True,
            unset="the model's own",
            scope="backbone",
        ),
    )
    interpolation: Interpolation | None = option(
        None,
        Flag(
            "--interpolation",
            "filter that resizes images",
            PIXELS,
            advanced=True,
            unset="the model's own",
            scope="backbone",
        ),
    )
    mean: tuple[float, float, float] | None = option(
        None,
        Flag(
            "--mean",
            "mean of each color channel, for pixels from 0 to 1",
            PIXELS,
            metavar="R,G,B",
            advanced=True,
            parse=parse_rgb,
            unset="the model's own",
            scope="backbone",
        ),
    )
    std: tuple[float, float, float] | None = option(
        None,
        Flag(
            "--std",
            "standard deviation of each color channel, for pixels from 0 to 1",
            PIXELS,
            metavar="R,G,B",
            advanced=True,
            parse=parse_rgb,
            unset="the model's own",
            scope="backbone",
        ),
    )
    gray_bits: GrayBits | None = option(
        None,
        Flag(
            "--gray-bits",
            "bits used by 16-bit grayscale images, from 8 to 16; minmax stretches each image from "
            "black to white",
            PIXELS,
            metavar="N",
            advanced=True,
            parse=parse_gray_bits,
            unset="16, the full range",
            scope="backbone",
        ),
    )
    device: str = option(
        "auto",
        Flag(
            "--device",
            "cpu, cuda, cuda:N, mps, or auto, which takes a GPU if there is one",
            COMPUTE,
            metavar="DEVICE",
            scope="backbone",
        ),
    )
    devices: str | None = option(
        None,
        Flag(
            "--devices",
            "GPUs that share the run: all, or numbers such as 0,1,3; cpu for none",
            COMPUTE,
            metavar="LIST",
            advanced=True,
            unset="one, as --device says",
        ),
    )
    processes: int | None = option(
        None,
        Flag(
            "--processes",
            "number of processes on each device, which share the cores",
            COMPUTE,
            metavar="N",
            advanced=True,
            minimum=1,
            maximum=MAX_WORKERS,
            unset="as many as the cores and the number of images are worth",
        ),
    )
    precision: Precision = option(
        "auto",
        Flag(
            "--precision",
            "precision of the model: mixed is bfloat16 with sensitive layers in float32, auto the "
            "fastest within a cosine of 0.999 of float32 on a sample",
            COMPUTE,
            scope="backbone",
        ),
    )
    batch_size: int | None = option(
        None,
        Flag(
            "-b/--batch-size",
            "images in one forward pass",
            COMPUTE,
            metavar="N",
            minimum=1,
            maximum=MAX_BATCH_SIZE,
            unset="that of the store, else depends on the device",
            scope="images",
        ),
    )
    workers: int | None = option(
        None,
        Flag(
            "-j/--workers",
            "number of decoding threads",
            COMPUTE,
            metavar="N",
            minimum=1,
            maximum=MAX_WORKERS,
            unset="one per core, at most 8",
            scope="images",
        ),
    )
    threads: int | None = option(
        None,
        Flag(
            "--threads",
            "number of threads that compute the model on a CPU",
            COMPUTE,
            metavar="N",
            advanced=True,
            minimum=1,
            maximum=MAX_WORKERS,
            unset="torch's own number, at most one per core",
            scope="images",
        ),
    )
    compile: Compile = option(
        "auto",
        Flag(
            "--compile",
            "compile the model with torch.compile; auto does so if there are enough images to "
            "repay the time",
            COMPUTE,
            advanced=True,
        ),
    )
    fuse: Fuse = option(
        "auto",
        Flag(
            "--fuse",
            "fuse batch normalizations and activations into convolutions on a CPU",
            COMPUTE,
            advanced=True,
            scope="images",
        ),
    )
    decode: Decode = option(
        DECODE,
        Flag(
            "--decode",
            "scaled decodes large JPEGs at 1/2, 1/4 or 1/8 of their size, exact decodes every "
            "pixel, gpu (experimental) decodes plain JPEGs on the CUDA device",
            COMPUTE,
            advanced=True,
            scope="images",
        ),
    )
    exclude: Sequence[str] = option(
        (),
        Flag(
            "--exclude",
            "leave out files and folders that match a glob: a name at any depth, or a path with "
            "slashes from the root of the images; repeatable",
            INPUT,
            metavar="GLOB",
        ),
    )
    overwrite: bool = option(
        False,
        Flag(
            "--overwrite",
            "compute everything again and replace the store when the new one is complete",
            INPUT,
        ),
    )
    keep_order: bool = option(
        False,
        Flag(
            "--keep-order",
            "also write the row number of each line of --list, as list_rows.npy; -1 if it has none",
            INPUT,
            advanced=True,
        ),
    )
    shard_images: int | None = option(
        None,
        Flag(
            "--shard-images",
            "number of images per .npy file, failed ones included",
            INPUT,
            metavar="N",
            advanced=True,
            minimum=1,
            maximum=MAX_INTEGER,
            unset="that of an existing store; for a new one 1024 to 65536, by the number of images",
        ),
    )
    check: Check = option(
        "stat",
        Flag(
            "--check",
            "detect changed images by size and modification time (stat) or by SHA-256 (content)",
            UPDATE,
            advanced=True,
        ),
    )
    keep_missing: bool = option(
        False,
        Flag(
            "--keep-missing",
            "keep the rows of images that no longer exist",
            UPDATE,
            advanced=True,
        ),
    )
    retire: bool = option(
        False,
        Flag(
            "--retire",
            "retire the rows of images that are gone from the disk, however many there are",
            UPDATE,
            advanced=True,
        ),
    )
    retry_failed: bool = option(
        False,
        Flag(
            "--retry-failed",
            "try images again that failed before, even if they are unchanged",
            UPDATE,
            advanced=True,
        ),
    )
    new_root: bool = option(
        False,
        Flag(
            "--new-root",
            "extend a store although most of its images are not unchanged in the folder that holds "
            "the images now; not needed if 90 percent of them are",
            UPDATE,
            advanced=True,
        ),
    )
    max_pixels: int = option(
        MAX_PIXELS,
        Flag(
            "--max-pixels",
            "reject images with more pixels than this; also bounds what all threads decode at once",
            LIMITS,
            metavar="N",
            advanced=True,
            scope="images",
            minimum=1,
            maximum=MAX_INTEGER,
        ),
    )
    image_timeout: float = option(
        60.0,
        Flag(
            "--image-timeout",
            "give up decoding an image after this many seconds",
            LIMITS,
            metavar="SECONDS",
            advanced=True,
            scope="images",
            above=0,
            maximum=MAX_SECONDS,
        ),
    )
    max_failure_rate: float = option(
        0.0,
        Flag(
            "--max-failure-rate",
            "exit with 0 as long as at most this fraction of the images failed, from 0 to 1",
            LIMITS,
            metavar="FRACTION",
            advanced=True,
            minimum=0,
            maximum=1,
        ),
    )
    lock: bool = option(
        True,
        Flag(
            "--no-lock",
            "write to a file system without file locks; make sure that no second run writes there",
            RUN,
            advanced=True,
        ),
    )
    profile: str | None = option(
        None,
        Flag(
            "--profile",
            "write a trace of all threads to this file, for chrome://tracing or Perfetto",
            RUN,
            metavar="FILE",
            advanced=True,
            takes_path=True,
        ),
    )

    part: str | None = option(
        None,
        Flag(
            "--part",
            "compute one part of the run, such as 3/16, while other jobs compute the others; auto "
            "asks Slurm, torchrun or Kubernetes which one",
            RUN,
            metavar="K/N",
            advanced=True,
            unset="all of it",
        ),
    )
    engine: Engine = option(
        "local",
        Flag(
            "--engine",
            "where the workers run: on this machine, or on the nodes of a Ray cluster",
            RUN,
            advanced=True,
        ),
    )
    address: str | None = option(
        None,
        Flag(
            "--address",
            "address of the Ray cluster, as HOST:PORT; auto finds the one that this machine is in",
            RUN,
            metavar="HOST:PORT",
            advanced=True,
            unset="RAY_ADDRESS, else auto",
        ),
    )

    def __post_init__(self) -> None:
        declared = options_in(Options)
        for name in declared:
            if declared[name].flag.takes_path and isinstance(getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(getattr(self, name)))
            declared[name].check(getattr(self, name))
            if declared[name].type is int and getattr(self, name) is not None:
                object.__setattr__(self, name, int(getattr(self, name)))  # of numpy, too
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            raise UsageError(
                f"device: got {self.device!r}, expected auto, cpu, cuda, cuda:N or mps"
            )
        if self.profile is not None:
            if not self.profile or os.path.isdir(self.profile):
                raise UsageError(f"profile: got {self.profile!r}, expected the name of a file")
            if not os.path.isdir(os.path.dirname(self.profile) or "."):
                raise UsageError(f"profile: there is no folder for the file {self.profile!r}")
        if not self.weights:
            raise UsageError("weights: got an empty name; try default, random, a tag or a file")
        if self.weights_key == "":
            raise UsageError("weights key: got an empty name; try model_ema")
        if self.weights_prefix is not None:
            if not self.weights_prefix.strip("."):
                raise UsageError("weights prefix: got an empty one; try teacher., or leave it out")
            object.__setattr__(self, "weights_prefix", self.weights_prefix.rstrip(".") + ".")
        self._check_layers()
        self._check_pixels()
        self._check_workers()

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, object], *, scope: Scope = "run") -> Options:
        """Return the options given as keyword arguments of :func:`extractor.extract`.

        Args:
            arguments: Option names and values, as in
                :class:`extractor.option_arguments.OptionArguments`.
            scope: The function that takes them; rejects options that it has no use for.

        Raises:
            TypeError: No option has such a name; suggests one that does.
            UsageError: As :class:`Options`.
        """
        known = [name for name, each in options_in(cls).items() if each.is_in(scope)]
        for name in arguments:
            if name in known:
                continue
            if name in options_in(cls):
                taker = SCOPES[options_in(cls)[name].flag.scope]
                raise TypeError(f"option {name!r} does not apply here, but to {taker}")
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"got an unexpected option {name!r}{hint}")
        values: Any = arguments
        return cls(**values)

    def _check_layers(self) -> None:
        if isinstance(self.exclude, str) or not all(isinstance(e, str) for e in self.exclude):
            raise UsageError(f"exclude: got {self.exclude!r}, expected a list of patterns")
        for name, modules in (("layers", self.layers), ("bypass", self.bypass)):
            is_list = isinstance(modules, Sequence) and not isinstance(modules, str)
            if not is_list or not all(isinstance(each, str) and each for each in modules):
                raise UsageError(f"{name}: got {modules!r}, expected a list of module names")
        kind = parse_pooling(self.pool).kind
        if not self.layers and self.pool != "avg":
            raise UsageError(f"pool: {self.pool} pools a layer; name one, such as --layer layer4")
        object.__setattr__(self, "scales", _check_scales(self.scales))
        if kind == "none" and (self.augment or self.scales):
            raise UsageError(
                "pool: none keeps positions, which differ from view to view; leave out --augment "
                "and --scales, or choose another --pool"
            )
        if len(set(self.layers)) < len(self.layers):
            raise UsageError(f"layers: got {', '.join(self.layers)}, expected each only once")
        if self.concat and len(self.layers) < 2 and not any(map(is_open_layer, self.layers)):
            raise UsageError("concat: joins several layers; name more than one with --layer")
        if kind == "none" and (self.concat or self.normalize):
            raise UsageError(
                "pool: none keeps maps or tokens, which can be neither joined nor scaled to unit "
                "length; leave out --concat and --normalize"
            )

    def _check_workers(self) -> None:
        devices = None if self.devices is None else parse_devices(self.devices)
        if self.part is not None:
            parse_part(self.part)
        is_ray = self.engine == "ray"
        several = (self.processes or 1) > 1 or is_ray
        several = several or (isinstance(devices, tuple) and len(devices) > 1)
        if devices is not None and self.device != "auto":
            raise UsageError(
                f"devices: got {self.devices} with device {self.device}; leave out one of "
                "--devices and --device"
            )
        if devices is not None and is_ray:
            raise UsageError(
                "devices: the Ray cluster assigns GPUs to workers; leave out --devices, or choose "
                "their kind with --device cuda or --device cpu"
            )
        if self.address is not None and not is_ray:
            raise UsageError(
                "address: applies to --engine ray only; add it, or leave out --address"
            )
        if self.address is not None and not re.fullmatch(r"auto|[^\s/]+:\d{1,5}", self.address):
            raise UsageError(
                f"address: got {self.address!r}, expected auto or HOST:PORT such as 10.0.0.1:6379"
            )
        if self.part is not None and is_ray:
            raise UsageError(
                "part: the Ray cluster shares out the whole run; leave out --part or --engine ray"
            )
        if self.part is not None and not self.lock:
            raise UsageError("part: parts need file locks to share a store; leave out --no-lock")
        if self.profile is not None and several:
            raise UsageError(
                "profile: traces one process; leave out --profile, or run one with --processes 1 "
                "on one device"
            )

    def _check_pixels(self) -> None:
        if self.test_size and (self.image_size is not None or self.crop_pct is not None):
            raise UsageError(
                "test size: it sets the image size and the crop; leave out --test-size, or "
                "--image-size and --crop-pct"
            )
        size = self._image_size()
        if size is not None:
            is_pair = isinstance(self.image_size, (tuple, list))
            object.__setattr__(self, "image_size", size if is_pair else size[0])
        if self.gray_bits is not None:
            object.__setattr__(self, "gray_bits", check_gray_bits(self.gray_bits))
        for name, values in (
            ("mean", plain_numbers(self.mean)),
            ("std", plain_numbers(self.std)),
        ):
            if values is None:
                continue
            if not isinstance(values, tuple) or len(values) != 3:
                raise UsageError(f"{name}: got {values!r}, expected three numbers (R, G, B)")
            least, most = (0.0, 1.0) if name == "mean" else (1e-6, 2.0)
            for value in values:
                if not (isinstance(value, (int, float)) and least <= value <= most):
                    raise UsageError(
                        f"{name}: got {values!r}, expected three "
                        f"{'positive ' if name == 'std' else ''}numbers for pixels of 0 to 1"
                    )
            object.__setattr__(self, name, values)

    def _image_size(self) -> tuple[int, int] | None:
        if self.image_size is None:
            return None
        size = self.image_size
        edges = size if isinstance(size, (tuple, list)) else (size, size)
        for edge in edges:
            _EDGE.check(edge)
        if len(edges) != 2:
            raise UsageError(f"image size: got {size!r}, expected a number or (height, width)")
        return int(edges[0]), int(edges[1])

    @property
    def pixel_changes(self) -> PixelChanges:
        """Requested differences from the model's own evaluation transform."""
        return PixelChanges(
            self._image_size(),
            self.crop_pct,
            self.interpolation,
            self.mean and (self.mean[0], self.mean[1], self.mean[2]),
            self.std and (self.std[0], self.std[1], self.std[2]),
            self.resize,
            self.gray_bits,
        )

    @property
    def pooling(self) -> Pooling:
        """The value of :attr:`pool`, parsed."""
        return parse_pooling(self.pool)


_EDGE = Option(
    "image_size",
    "int",
    int,
    None,
    Flag("--image-size", "", PIXELS, minimum=1, maximum=MAX_IMAGE_SIZE),
)


def signature_with_options(
    function: Callable[..., object], *, scope: Scope = "run"
) -> inspect.Signature:
    """Return a function's signature with its ``**options`` spelled out, for ``help()``.

    Args:
        function: Takes the options as ``**options``.
        scope: The function's, which leaves out options that it has no use for.
    """
    signature = inspect.signature(function)
    own = [each for each in signature.parameters.values() if each.kind != each.VAR_KEYWORD]
    chosen = [
        inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=each.default,
            annotation=each.annotation,
        )
        for each in options_in(Options).values()
        if each.is_in(scope)
    ]
    return signature.replace(parameters=[*own, *chosen])


def default_batch_size(device_type: str) -> int:
    """Return the default number of images in one forward pass.

    On a CPU, larger batches gain nothing once every core is busy, and they cost memory and a
    longer padded tail. A GPU needs more images to fill its multiprocessors.
    """
    return 32 if device_type == "cpu" else 128


def is_open_layer(layer: str) -> bool:
    """Return whether a layer is a glob or a block number, which only the network can resolve."""
    return re.search(r"[*?\[]|^-\d", layer) is not None
