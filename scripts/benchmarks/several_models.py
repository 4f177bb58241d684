"""Measures two backbones in one pass beside the sum of their parts, turn by turn.

    python scripts/benchmarks/several_models.py images/ --models resnet50 mobilenetv3_small_100

The parts are the time of each model alone, on pictures that are decoded already, and the time to
decode every image once, with as many threads as a run has. One pass can be no faster than their sum
on a CPU, where all three share the cores. All are measured in one process, and take turns.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import torch

from extractor.api import extract
from extractor.compute.embed import embed
from extractor.compute.inputs import pictures_of
from extractor.images.listing import ImageList, list_images
from extractor.loading.batch import Batch
from extractor.loading.loader import BatchLoader
from extractor.loading.options import LoaderOptions
from extractor.models.embedding import EmbeddingSpec, load_specs
from extractor.options import Options
from extractor.system.cpu import available_cores
from extractor.system.process_tuning import keep_freed_memory

BATCH = 32


def batches_of(images: ImageList) -> Iterator[list[bytes]]:
    for start in range(0, len(images), BATCH):
        stop = min(start + BATCH, len(images))
        yield [images.full_path(place) for place in range(start, stop)]


def decode(images: ImageList, specs: list[EmbeddingSpec]) -> list[Batch]:
    """Decode every image once into all pictures, and keep the last batches."""
    pictures = pictures_of(specs)
    with BatchLoader(
        batches_of(images), pictures, LoaderOptions(batch_size=BATCH, workers=available_cores())
    ) as loader:
        last = []
        for batch in loader:
            last = [batch]
            batch.release()
    return last


def compute(images: ImageList, spec: EmbeddingSpec) -> None:
    """The model alone, on as many batches as the images make."""
    (batch,) = decode_one(images, spec)
    batch.release = lambda: None  # type: ignore[method-assign]
    count = -(-len(images) // BATCH)
    for _ in embed([spec], [batch] * count, normalize=False):
        pass


def decode_one(images: ImageList, spec: EmbeddingSpec) -> list[Batch]:
    with BatchLoader(
        iter([next(batches_of(images))]),
        pictures_of([spec]),
        LoaderOptions(batch_size=BATCH, workers=2),
    ) as loader:
        return list(loader)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", help="a folder of images")
    parser.add_argument("--models", nargs=2, default=["resnet50", "mobilenetv3_small_100"])
    parser.add_argument("--weights", default="random")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    keep_freed_memory()
    images = list_images(options.images)
    specs = load_specs(options.models, Options(weights=options.weights, device=options.device))
    backbones = [spec.parts[0].backbone for spec in specs]
    for spec in specs:
        compute(images, spec)  # warm

    def one_pass() -> None:
        with tempfile.TemporaryDirectory() as folder:
            extract(images, backbones, folder, batch_size=BATCH)

    ratios = []
    for _ in range(options.repeats):
        parts = [seconds(lambda spec=spec: compute(images, spec)) for spec in specs]
        parts.append(seconds(lambda: decode(images, specs)))
        together = seconds(one_pass)
        ratios.append(together / sum(parts))
        told = " + ".join(f"{part:.2f}" for part in parts)
        print(f"one pass {together:.2f} s, parts {told} = {sum(parts):.2f} s: {ratios[-1]:.3f}")
    print(f"{' and '.join(options.models)}, {len(images)} images, {options.repeats} turns")
    print(f"{platform.machine()}, {os.cpu_count()} cores; torch {torch.__version__}")
    print(f"one pass / (model + model + one decode): median {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
