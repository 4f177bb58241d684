"""Sides of ``throughput.py``: what one process measures, alone on the machine.

Every side takes the same task, whose fields are the options of ``throughput.py``, and returns a
dictionary of figures. Each library under comparison is imported in its own side only, so the others
neither need it nor pay for it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from unittest import mock

import torch

from extractor.options import default_batch_size
from extractor.system.cpu import available_cores
from extractor.system.devices import resolve_device

if TYPE_CHECKING:
    from extractor import Backbone, Preprocess
    from extractor.images.listing import ImageList
    from extractor.loading.batch import Batch

Task: TypeAlias = argparse.Namespace
Figures: TypeAlias = "dict[str, Any]"

FIDELITY_IMAGES = 128
# Batches in one pass of a GPU, which the batches of so few images would end too soon.
GPU_BATCHES = 8
MIN_PASSES, MIN_SECONDS = 3, 3.0
RECIPE_BATCH, RECIPE_WORKERS = 32, 2


class NotHereError(Exception):
    """A library does not support the task: not a failure, and no reason to retry."""


def measure(task: Task) -> Figures:
    """Return the figures of one side, or ``reason`` if there are none."""
    try:
        figures = SIDES[task.side](task)
    except NotHereError as error:
        return {"reason": str(error)}
    except Exception as error:  # libraries raise all kinds
        return {"reason": f"failed: {_few_words(error)}"}
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {**figures, "peak_mib": peak / 2**20}


def _few_words(error: Exception) -> str:
    """Return an error's message in short, without lines that only introduce the next one."""
    lines = (line.strip() for line in str(error).splitlines())
    message = next((line for line in lines if line and not line.endswith(":")), "")
    return textwrap.shorten(message or type(error).__name__, 90, placeholder=" ...")


def measure_machine(task: Task) -> Figures:
    """Return the device, the name of the GPU, and the number of cores."""
    device = resolve_device(task.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {"device": str(device), "gpu": name, "cores": available_cores()}


# ---------------------------------------------------------------------------------------------
# The parts of a run


def measure_decode(task: Task) -> Figures:
    """Measure decoding alone, with all cores, or with ``task.workers`` threads."""
    from extractor.images.listing import list_images

    torch.set_num_threads(1)  # one core per decoding thread
    images, preprocess, device = list_images(task.images), _preprocess(task), _device(task)
    first = range(min(len(images), default_batch_size(device.type)))
    workers = getattr(task, "workers", None) or available_cores()
    for batch in _decoded(images, first, preprocess, device, workers):  # load the decoders
        batch.release()
    started = time.perf_counter()
    for batch in _decoded(images, range(len(images)), preprocess, device, workers):
        batch.release()
    return _rate(len(images), time.perf_counter() - started)


def _preprocess(task: Task) -> Preprocess:
    from extractor import load_backbone

    return load_backbone(task.model, weights=task.weights, device="cpu").preprocess


def _decoded(
    images: ImageList,
    indexes: Sequence[int],
    preprocess: Preprocess,
    device: torch.device,
    workers: int,
) -> Iterator[Batch]:
    """Decode the images at ``indexes`` as a run does."""
    from extractor.loading.loader import BatchLoader
    from extractor.loading.options import LoaderOptions

    size = default_batch_size(device.type)
    batches = (
        [images.full_path(index) for index in indexes[start : start + size]]
        for start in range(0, len(indexes), size)
    )
    with BatchLoader(
        batches,
        [preprocess],
        LoaderOptions(batch_size=size, workers=workers, pin=device.type == "cuda"),
    ) as loader:
        yield from loader


def measure_model(task: Task) -> Figures:
    """Measure the model alone in one configuration, on decoded and normalized images.

    Its embeddings are compared with those in the file ``task.reference``, which the first
    configuration writes: those of the network as its library builds it, in float32.
    """
    from extractor import load_backbone
    from extractor.compute.tune import compiled

    torch.backends.cudnn.allow_tf32 = False  # as in a run, where float32 means float32
    backbone = load_backbone(task.model, weights=task.weights, device=task.device)
    device = backbone.device
    batches, is_image = _inputs(task, backbone)
    reference = Path(task.reference)
    if not reference.exists():
        torch.save(torch.cat([backbone(batch).cpu() for batch in batches]), reference)
    backbone = backbone.fold().to(device, task.precision)
    batches = [batch.to(backbone.dtype) for batch in batches]
    if task.compiled:
        backbone = compiled(backbone)
    rows: list[torch.Tensor] = []
    first_seconds = _seconds(device, lambda: rows.append(backbone(batches[0]).cpu()))
    rows += [backbone(batch).cpu() for batch in batches[1:]]
    least_cosine = _least_cosine(torch.cat(rows)[is_image], torch.load(reference)[is_image])
    seconds: list[float] = []
    while len(seconds) < MIN_PASSES or sum(seconds) < MIN_SECONDS:
        seconds.append(_seconds(device, lambda: _embed_all(backbone, batches)))
    return {
        **_rate(sum(map(len, batches)), statistics.median(seconds)),
        "least_cosine": least_cosine,
        "compile_seconds": first_seconds if task.compiled else None,
    }


def _inputs(task: Task, backbone: Backbone) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return full batches in the device's memory, and which of their rows are images."""
    from extractor.images.listing import list_images
    from extractor.images.types import ImageInfo

    images = list_images(task.images)
    preprocess, device = backbone.preprocess, backbone.device
    mean = torch.tensor(preprocess.mean).view(1, 3, 1, 1)
    std = torch.tensor(preprocess.std).view(1, 3, 1, 1)
    batches: list[torch.Tensor] = []
    is_image: list[bool] = []
    indexes = range(min(len(images), FIDELITY_IMAGES))
    for batch in _decoded(images, indexes, preprocess, device, available_cores()):
        (uint8,) = batch.pictures
        pixels = uint8.permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std)
        batches.append(pixels.to(device, backbone.dtype))
        padding = [None] * (len(uint8) - len(batch.outcomes))
        is_image += [isinstance(outcome, ImageInfo) for outcome in (*batch.outcomes, *padding)]
        batch.release()
    if device.type != "cpu":
        batches = list(itertools.islice(itertools.cycle(batches), GPU_BATCHES))
        is_image = [*is_image, *[False] * (sum(map(len, batches)) - len(is_image))]
    return batches, torch.tensor(is_image)


def _embed_all(backbone: Backbone, batches: Iterable[torch.Tensor]) -> None:
    for batch in batches:
        backbone(batch)


def _least_cosine(embeddings: torch.Tensor, exact: torch.Tensor) -> float:
    cosines = torch.cosine_similarity(embeddings.double(), exact.double())
    cosines[(embeddings == exact).all(1)] = 1.0  # also where both are zero
    return float(cosines.nan_to_num(-1.0).min())


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    _synchronize(device)
    started = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _rate(images: int, seconds: float) -> Figures:
    return {"images": images, "images_per_second": images / seconds}


def _device(task: Task) -> torch.device:
    return resolve_device(task.device)


# ---------------------------------------------------------------------------------------------
# Whole runs


def measure_extract(task: Task) -> Figures:
    """Measure ``extract`` with its defaults."""
    from extractor.api import extract

    settings = {} if task.compile is None else {"compile": task.compile}
    with tempfile.TemporaryDirectory() as folder:
        report = extract(
            task.images,
            task.model,
            folder,
            weights=task.weights,
            device=task.device,
            precision=task.precision,
            **settings,
        )
    return {
        "images": report.images,
        "images_per_second": report.images_per_second,
        "failed_images": report.failed,
        "precision": report.precision,
    }


def measure_recipe(task: Task) -> Figures:
    """Measure ImageFolder, DataLoader with two workers, PIL, ``torch.no_grad``, float32."""
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    from extractor import load_backbone

    backbone = load_backbone(task.model, weights=task.weights, device=task.device)
    preprocess = backbone.preprocess
    filters = transforms.InterpolationMode
    size = preprocess.resize_size[0] if preprocess.resize == "shortest" else preprocess.resize_size
    transform = transforms.Compose(
        [
            transforms.Resize(size, interpolation=filters(preprocess.interpolation)),
            transforms.CenterCrop(preprocess.input_size),
            transforms.ToTensor(),
            transforms.Normalize(preprocess.mean, preprocess.std),
        ]
    )
    module = backbone.module.to(memory_format=torch.contiguous_format)
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(os.path.abspath(task.images), Path(folder) / "all")
        loader = DataLoader(
            ImageFolder(folder, transform),
            batch_size=RECIPE_BATCH,
            num_workers=RECIPE_WORKERS,
            pin_memory=backbone.device.type == "cuda",
        )
        with torch.no_grad():
            return _run(lambda: (module(pixels.to(backbone.device)).cpu() for pixels, _ in loader))


def measure_timm(task: Task) -> Figures:
    """Measure timm's own data set, loader and network, channels last, float32."""
    return _run_timm(task, torch.float32)


def measure_timm_tuned(task: Task) -> Figures:
    """Measure the same with the network and its input in half precision."""
    return _run_timm(task, torch.bfloat16 if _device(task).type == "cpu" else torch.float16)


def _run_timm(task: Task, dtype: torch.dtype) -> Figures:
    from timm.data import ImageDataset, create_loader, resolve_model_data_config

    device = _device(task)
    network = _timm_network(task).eval().to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    config = resolve_model_data_config(network)
    loader = create_loader(
        ImageDataset(task.images),
        input_size=config["input_size"],
        batch_size=default_batch_size(device.type),
        is_training=False,
        use_prefetcher=device.type == "cuda",
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        num_workers=available_cores(),
        pin_memory=device.type == "cuda",
        img_dtype=dtype,
        device=device,
    )

    def embeddings() -> Iterator[torch.Tensor]:
        for pixels, _ in loader:
            pixels = pixels.to(device, dtype).contiguous(memory_format=torch.channels_last)
            yield network(pixels).float()

    with torch.inference_mode():
        return _run(embeddings)


def _timm_network(task: Task) -> torch.nn.Module:
    """Return the model as timm builds it, with the weights of the task."""
    import timm

    name, weights = _timm_name(task), task.weights
    if weights not in ("default", "random") and not os.path.isfile(weights):
        name = f"{name}.{weights}"
    overlay = {"file": weights} if os.path.isfile(weights) else None
    return timm.create_model(
        name, pretrained=weights != "random", num_classes=0, pretrained_cfg_overlay=overlay
    )


def _timm_name(task: Task) -> str:
    import timm

    name = task.model.removeprefix("timm:")
    if name.startswith("torchvision:") or not (":" in name or timm.is_model(name)):
        raise NotHereError("not a model of timm")
    return name


def measure_img2vec(task: Task) -> Figures:
    """Measure img2vec_pytorch on lists of PIL images.

    Its weights are random, which does not change the rate: it has no way to load them offline.
    """
    from img2vec_pytorch import Img2Vec
    from PIL import Image
    from torchvision import models
    from torchvision.models import WeightsEnum

    from extractor.images.listing import list_images

    name = task.model.rpartition(":")[2].partition(".")[0]
    try:
        network = models.get_model(f"{name}_bn" if name.startswith("vgg") else name, weights=None)
        state = network.state_dict()
        with mock.patch.object(WeightsEnum, "get_state_dict", return_value=state):
            embed = Img2Vec(cuda=_device(task).type == "cuda", model=name)
    except (KeyError, ValueError) as error:
        raise NotHereError("does not have this model") from error
    images = list_images(task.images)
    paths = [os.fsdecode(images.full_path(index)) for index in range(len(images))]

    def embeddings() -> Iterator[torch.Tensor]:
        for start in range(0, len(paths), RECIPE_BATCH):
            part = paths[start : start + RECIPE_BATCH]
            yield embed.get_vec([Image.open(path).convert("RGB") for path in part], tensor=True)

    return _run(embeddings)


def measure_transformers(task: Task) -> Figures:
    """Measure the pipeline of transformers, around timm's model with random weights."""
    from transformers import (
        TimmWrapperConfig,
        TimmWrapperImageProcessor,
        TimmWrapperModel,
        pipeline,
    )

    from extractor.images.listing import list_images

    network = TimmWrapperModel(TimmWrapperConfig(architecture=_timm_name(task))).eval()
    embed = pipeline(
        "image-feature-extraction",
        model=network,
        image_processor=TimmWrapperImageProcessor(network.timm_model.pretrained_cfg),
        device=_device(task),
    )
    images = list_images(task.images)
    paths = [os.fsdecode(images.full_path(index)) for index in range(len(images))]
    return _run(
        lambda: embed(
            paths,
            batch_size=RECIPE_BATCH,
            num_workers=available_cores(),
            pool=True,
            return_tensors=True,
        )
    )


def _run(embeddings: Callable[[], Iterable[torch.Tensor]]) -> Figures:
    """Return the rate from the start of the first batch to a file with all embeddings."""
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        rows = torch.cat(list(embeddings())).cpu().numpy()
        np.save(Path(folder) / "features.npy", rows)
        return _rate(len(rows), time.perf_counter() - started)


SIDES: dict[str, Callable[[Task], Figures]] = {
    "machine": measure_machine,
    "decode": measure_decode,
    "model": measure_model,
    "extract": measure_extract,
    "common-recipe": measure_recipe,
    "timm": measure_timm,
    "timm-tuned": measure_timm_tuned,
    "img2vec_pytorch": measure_img2vec,
    "transformers": measure_transformers,
}
