"""Compare the embeddings of a default run with those of float32 and exact decoding.

    python scripts/benchmarks/fidelity.py images/ --model resnet50 --weights random

A run tries half precision only if it has many images to compute. A small folder is therefore taken
several times, through links, and one copy of each image is compared. Exits with 1 if the cosine of
an image is below ``--least``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from common import FIRST_COPY, argument_parser, copies_of, report

import extractor
from extractor import extract
from extractor.compute.tune import MIN_IMAGES
from extractor.images.listing import list_images
from extractor.text import plural


def main() -> int:
    """Print the least and the mean cosine; return 1 if one is below ``--least``."""
    parser = argument_parser(__doc__, repeats=None)
    parser.add_argument("images", type=Path, help="a folder of images")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--weights", default="default")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--least", type=float, default=0.999, help="least accepted cosine (default: %(default)s)"
    )
    args = parser.parse_args()
    settings = {"weights": args.weights, "device": args.device}
    copies = -(-MIN_IMAGES // len(list_images(args.images)))
    with tempfile.TemporaryDirectory() as out, copies_of(args.images, copies) as repeated:
        fast = extract(repeated, args.model, Path(out, "fast"), **settings)
        exact = extract(
            args.images,
            args.model,
            Path(out, "exact"),
            precision="float32",
            decode="exact",
            compile="off",
            **settings,
        )
        fast_rows = rows_of(fast, f"{FIRST_COPY}/" if copies > 1 else "")
        cosines = cosines_of(rows_of(exact), fast_rows)
    sample = "" if fast.least_cosine is None else f", {fast.least_cosine:.5f} in the run's sample"
    line = (
        f"{args.model}, {fast.precision}: least cosine {cosines.min():.5f}, mean "
        f"{cosines.mean():.5f} of {plural(len(cosines), 'image')}{sample}"
    )
    figures = {
        "model": args.model,
        "weights": args.weights,
        "precision": fast.precision,
        "images": len(cosines),
        "least_cosine": float(cosines.min()),
        "mean_cosine": float(cosines.mean()),
        "least_cosine_in_sample": fast.least_cosine,
    }
    report(figures, [line], args.json)
    return 0 if cosines.min() >= args.least else 1


def rows_of(run: extractor.Report, folder: str = "") -> dict[str, npt.NDArray[np.float32]]:
    """Return the embedding of each image in a folder of a store, by its path in that folder."""
    pairs = zip(run.store.paths, run.store.features[:], strict=True)
    return {path[len(folder) :]: row for path, row in pairs if path.startswith(folder)}


def cosines_of(
    expected: dict[str, npt.NDArray[np.float32]], rows: dict[str, npt.NDArray[np.float32]]
) -> npt.NDArray[np.float64]:
    """Return the cosine of each image's two embeddings."""
    pairs = [(row.astype(np.float64), rows[path]) for path, row in expected.items()]
    return np.array([a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in pairs])


if __name__ == "__main__":
    raise SystemExit(main())
