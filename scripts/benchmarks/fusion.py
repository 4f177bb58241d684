"""Measures networks as their libraries build them, folded as a run has them, and compiled.

    python scripts/benchmarks/fusion.py --models resnet50 mobilenetv3_small_100

Images per second of the model alone, on noise, with random weights; all ways take turns, and their
medians are compared.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from dataclasses import replace

import torch

from extractor import Backbone, load_backbone
from extractor.compute.tune import compiled
from extractor.options import default_batch_size
from extractor.system.devices import resolve_device
from extractor.system.process_tuning import keep_freed_memory

SECONDS = 2.0  # for each measurement


def main() -> None:
    """Print one line for each model and precision."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["resnet50", "mobilenetv3_small_100"])
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true", help="measure compiled networks, too")
    parser.add_argument("--repeats", type=int, default=5)
    parsed = parser.parse_args()
    keep_freed_memory()
    for model in parsed.models:
        whole = load_backbone(model, weights="random", device=parsed.device)
        folded = replace(whole, module=copy.deepcopy(whole.module)).fold()
        for precision in parsed.precisions:
            ways = {"built": _copy(whole, precision), "folded": _copy(folded, precision)}
            if parsed.compile:
                ways["compiled"] = compiled(_copy(folded, precision))
            print(f"{model}, {precision}: {_compared(ways, parsed.repeats)}", flush=True)


def _copy(backbone: Backbone, precision: str) -> Backbone:
    copied = replace(backbone, module=copy.deepcopy(backbone.module))
    return copied.to(backbone.device, precision)


def _compared(ways: dict[str, Backbone], repeats: int) -> str:
    """Rates of all ways, and each one's ratio to the first."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, backbone in ways.items():
            rates[name].append(_rate(backbone))
    first = next(iter(rates.values()))
    told = []
    for name, values in rates.items():
        ratio = statistics.median(b / a for a, b in zip(first, values, strict=True))
        told.append(f"{name} {statistics.median(values):,.1f} ({ratio:.2f})")
    return ", ".join(told) + " images/s"


def _rate(backbone: Backbone) -> float:
    device = resolve_device(str(backbone.device))
    size = default_batch_size(device.type)
    pixels = torch.randn(size, 3, *backbone.preprocess.input_size, device=device)
    pixels = pixels.to(backbone.dtype, memory_format=torch.channels_last)
    backbone.embed(pixels)  # finds its algorithms, or compiles
    begun, images = time.perf_counter(), 0
    while (seconds := time.perf_counter() - begun) < SECONDS:
        backbone.embed(pixels)[0].cpu()
        images += size
    return images / seconds


if __name__ == "__main__":
    main()
