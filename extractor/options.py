"""What a run can be told; every default lives here and nowhere else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral

from extractor.errors import UsageError

__all__ = ["DEFAULT_MODEL", "DTYPES", "PRECISIONS", "Options", "default_batch_size", "default_out"]

DEFAULT_MODEL = "resnet50"
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
DTYPES = ("float32", "float16")

# Far beyond what gains anything; a typing error should not take the machine down.
MAX_BATCH_SIZE = 65_536
MAX_WORKERS = 1_024
MAX_SHARDS = 100_000  # five digits in a shard's name, so that name order is row order


@dataclass(frozen=True)
class Options:
    """Everything that a run can be told beside the images, the model and the place of the store.

    Attributes:
        weights: ``default``, ``random``, a tag of the library, or a ``.pth``/``.safetensors`` file.
        seed: of the random weights; without meaning for any others.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        precision: of the computation; ``auto`` is float32.
        dtype: of the stored embeddings, ``float32`` or ``float16``.
        normalize: scale every embedding to unit Euclidean length.
        batch_size: images in a forward pass; None chooses by device.
        workers: decoding threads; None means one for each core that the process may use.
        shard_images: images, failed ones included, that one shard of the store answers for.
        overwrite: replace the store that is already there, once the new one is complete.

    Raises:
        UsageError: a value out of its range.
    """

    weights: str = "default"
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    dtype: str = "float32"
    normalize: bool = False
    batch_size: int | None = None
    workers: int | None = None
    shard_images: int = 65_536
    overwrite: bool = False

    def __post_init__(self) -> None:
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("dtype", self.dtype, DTYPES)
        _within("seed", self.seed, 0, 2**63 - 1)
        _within("batch size", self.batch_size, 1, MAX_BATCH_SIZE)
        _within("number of workers", self.workers, 1, MAX_WORKERS)
        _within("number of images in a shard", self.shard_images, 1, 2**63 - 1)
        if not self.weights:
            raise UsageError("weights: got an empty name; try default, random, a tag or a file")


def default_batch_size(device_type: str) -> int:
    """Images in one forward pass where nothing else is asked for.

    On a CPU larger batches gain nothing once every core is busy and cost memory and a longer
    padded tail; a GPU needs more of them to fill its multiprocessors.
    """
    return 32 if device_type == "cpu" else 128


def default_out(model: str) -> str:
    """The folder of the store for a model's name as it was typed: ``features/<model>``.

    >>> default_out("torchvision:resnet50")
    'features/torchvision-resnet50'
    """
    return "features/" + model.replace(":", "-").replace("/", "-")


def check_failure_rate(rate: float) -> float:
    """The share of failed images that a caller accepts, from 0 to 1, checked."""
    if not (math.isfinite(rate) and 0 <= rate <= 1):
        raise UsageError(f"failure rate: got {rate}, expected a share from 0 to 1, such as 0.01")
    return rate


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{name}: got {value!r}, expected one of {', '.join(allowed)}")


def _within(name: str, value: object, least: int, most: int) -> None:
    if value is None:
        return
    if not isinstance(value, Integral) or not least <= int(value) <= most:
        raise UsageError(f"{name}: got {value!r}, expected a whole number from {least} to {most}")
