"""Measure networks as their libraries build them, fused as a run on a CPU has them, and compiled.

    python scripts/benchmarks/fusion.py --models resnet50 mobilenetv3_small_100

Images per second of the model alone, on noise, with random weights. All sides take turns, and the
medians are compared.
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace

import torch
from common import argument_parser, in_turns, median_ratio, report, spread

from extractor import Backbone, load_backbone
from extractor.compute.tune import compiled
from extractor.options import default_batch_size
from extractor.system.process_tuning import keep_freed_memory

SECONDS = 2.0  # per measurement


def main() -> None:
    """Print one line for each model and precision."""
    parser = argument_parser(__doc__, repeats=5)
    parser.add_argument("--models", nargs="+", default=["resnet50", "mobilenetv3_small_100"])
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true", help="also measure compiled networks")
    args = parser.parse_args()
    keep_freed_memory()
    lines, results = [], []
    for model in args.models:
        built = load_backbone(model, weights="random", device=args.device)
        fused = replace(built, module=copy.deepcopy(built.module)).fold()
        for precision in args.precisions:
            sides = {"built": copied(built, precision), "fused": copied(fused, precision)}
            if args.compile:
                sides["compiled"] = compiled(copied(fused, precision))
            measures = {
                name: lambda backbone=backbone: rate(backbone) for name, backbone in sides.items()
            }
            rates = in_turns(measures, args.repeats)
            ratios = {name: median_ratio(values, rates["built"]) for name, values in rates.items()}
            spreads = {name: spread(values) for name, values in rates.items()}
            cells = [
                f"{name} {spreads[name]['median']:,.1f} ({ratios[name]:.2f})" for name in rates
            ]
            lines.append(f"{model}, {precision}: {', '.join(cells)} images/s")
            results.append(
                {"model": model, "precision": precision, "rates": spreads, "ratios": ratios}
            )
    report({"repeats": args.repeats, "results": results}, lines, args.json)


def copied(backbone: Backbone, precision: str) -> Backbone:
    """Return a copy of a backbone in a precision."""
    copy_ = replace(backbone, module=copy.deepcopy(backbone.module))
    return copy_.to(backbone.device, precision)


def rate(backbone: Backbone) -> float:
    """Return the images/s of a backbone on noise."""
    size = default_batch_size(backbone.device.type)
    pixels = torch.randn(size, 3, *backbone.preprocess.input_size, device=backbone.device)
    pixels = pixels.to(backbone.dtype, memory_format=torch.channels_last)
    backbone.embed(pixels)  # chooses algorithms, or compiles
    started, images = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < SECONDS:
        backbone.embed(pixels)[0].cpu()
        images += size
    return images / elapsed


if __name__ == "__main__":
    main()
