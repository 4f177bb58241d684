"""Measure two backbones in one run beside the sum of its parts, turn by turn.

    python scripts/benchmarks/several_models.py images/ --models resnet50 mobilenetv3_small_100

The parts are the time of each model alone on decoded pictures, and the time to decode every image
once with as many threads as a run uses. On a CPU, where all three share the cores, one run can be
no faster than their sum. All are measured in one process.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from typing import Any

from common import argument_parser, report, seconds, spread

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
from extractor.text import plural

BATCH = 32


def main() -> None:
    """Print one line per turn, and the median ratio."""
    parser = argument_parser(__doc__)
    parser.add_argument("images", help="a folder of images")
    parser.add_argument("--models", nargs=2, default=["resnet50", "mobilenetv3_small_100"])
    parser.add_argument("--weights", default="random")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    keep_freed_memory()
    images = list_images(args.images)
    specs = load_specs(args.models, Options(weights=args.weights, device=args.device))
    backbones = [spec.parts[0].backbone for spec in specs]
    for spec in specs:
        compute(images, spec)  # warm up

    def one_run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            extract(images, backbones, folder, batch_size=BATCH)

    lines: list[str] = []
    turns: list[dict[str, Any]] = []
    for _ in range(args.repeats):
        parts = [seconds(lambda spec=spec: compute(images, spec)) for spec in specs]
        parts.append(seconds(lambda: decode(images, specs)))
        run = seconds(one_run)
        turns.append({"run_seconds": run, "part_seconds": parts, "ratio": run / sum(parts)})
        terms = " + ".join(f"{part:.2f}" for part in parts)
        lines.append(
            f"one run {run:.2f} s, parts {terms} = {sum(parts):.2f} s: ratio {run / sum(parts):.3f}"
        )
    ratios = [
        run / sum(parts) for run, parts in ((t["run_seconds"], t["part_seconds"]) for t in turns)
    ]
    lines.append(f"{' and '.join(args.models)}, {plural(len(images), 'image')}")
    lines.append(f"one run / (model + model + one decode): median {statistics.median(ratios):.3f}")
    figures = {
        "models": args.models,
        "images": len(images),
        "repeats": args.repeats,
        "turns": turns,
        "ratio": spread(ratios),
    }
    report(figures, lines, args.json)


def batches_of(images: ImageList) -> Iterator[list[bytes]]:
    """Yield the paths of the images in batches."""
    for start in range(0, len(images), BATCH):
        stop = min(start + BATCH, len(images))
        yield [images.full_path(index) for index in range(start, stop)]


def decode(images: ImageList, specs: list[EmbeddingSpec]) -> None:
    """Decode every image once into the pictures of all models."""
    with BatchLoader(
        batches_of(images),
        pictures_of(specs),
        LoaderOptions(batch_size=BATCH, workers=available_cores()),
    ) as loader:
        for batch in loader:
            batch.release()


def compute(images: ImageList, spec: EmbeddingSpec) -> None:
    """Run the model alone on as many batches as the images fill."""
    (batch,) = decode_first(images, spec)
    batch.release = lambda: None  # type: ignore[method-assign]
    count = -(-len(images) // BATCH)
    for _ in embed([spec], [batch] * count, normalize=False):
        pass


def decode_first(images: ImageList, spec: EmbeddingSpec) -> list[Batch]:
    """Return the first batch, decoded for one model."""
    with BatchLoader(
        iter([next(batches_of(images))]),
        pictures_of([spec]),
        LoaderOptions(batch_size=BATCH, workers=2),
    ) as loader:
        return list(loader)


if __name__ == "__main__":
    main()
