#!/usr/bin/env python3
"""How near the embeddings of a default run are to those of float32 with every pixel decoded.

    python scripts/benchmarks/fidelity.py images/ --model resnet50 --weights random

Half precision is only tried where many images are to be computed, so a small folder is taken
several times, through links; one copy of each image is compared.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from throughput import FIRST_COPY, copies_of

from extractor import extract
from extractor.compute.tune import MIN_IMAGES
from extractor.images.listing import list_images
from extractor.report import Report


def main() -> int:
    """Print the least and the mean cosine; 1 where that of an image is less than asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, help="a folder of images")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--weights", default="default")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--least", type=float, default=0.999, help="cosine (default: %(default)s)")
    options = parser.parse_args()
    settings = {"weights": options.weights, "device": options.device}
    copies = -(-MIN_IMAGES // len(list_images(options.images)))
    with tempfile.TemporaryDirectory() as out, copies_of(options.images, copies) as many:
        fast = extract(many, options.model, Path(out, "fast"), **settings)
        exact = extract(
            options.images,
            options.model,
            Path(out, "exact"),
            precision="float32",
            decode="exact",
            compile="off",
            **settings,
        )
        cosines = compare(rows_of(exact), rows_of(fast, f"{FIRST_COPY}/" if copies > 1 else ""))
    tried = "" if fast.least_cosine is None else f", {fast.least_cosine:.5f} where it was tried"
    print(
        f"{options.model}, {fast.precision}: least cosine {cosines.min():.5f}, mean "
        f"{cosines.mean():.5f} of {len(cosines)} images{tried}"
    )
    return 0 if cosines.min() >= options.least else 1


def rows_of(report: Report, folder: str = "") -> dict[str, np.ndarray]:
    """The embedding of each image in a folder, by its path in there."""
    pairs = zip(report.store.paths, report.store.features[:], strict=True)
    return {path[len(folder) :]: row for path, row in pairs if path.startswith(folder)}


def compare(expected: dict[str, np.ndarray], given: dict[str, np.ndarray]) -> np.ndarray:
    """The cosine of each image's embeddings."""
    pairs = [(row.astype(np.float64), given[name]) for name, row in expected.items()]
    return np.array([a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in pairs])


if __name__ == "__main__":
    raise SystemExit(main())
