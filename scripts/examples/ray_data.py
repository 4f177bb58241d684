"""Embed images inside a Ray Data pipeline, between other steps of it.

    pip install 'ray[data]'
    python scripts/examples/ray_data.py /srv/images /srv/embeddings

Each actor loads the model once. The embeddings go to Parquet files, in no order; for a store whose
row i belongs to image i, and that can be resumed and extended, use extract --engine ray.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np


class Embed:
    """Adds a column of embeddings to batches with a column of encoded images."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        from extractor import Extractor  # in the actor, so that the driver needs no torch

        self._extractor = Extractor(model, **options)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return paths and embeddings; images that cannot be decoded are left out."""
        rows = self._extractor([bytes(image) for image in batch["bytes"]], on_error="return")
        good = [i for i, row in enumerate(rows) if isinstance(row, np.ndarray)]
        embeddings = np.array([rows[i] for i in good], np.float32)
        embeddings = embeddings.reshape(-1, self._extractor.dim)  # also if no image is left
        return {"path": batch["path"][good], "embedding": embeddings}


def embed(images: str, out: str, model: str, actors: int, gpus: float, **options: Any) -> int:
    """Embed a folder of images, and return the number of embeddings."""
    import ray.data
    from ray.data import ActorPoolStrategy

    embedded = ray.data.read_binary_files(images, include_paths=True).map_batches(
        Embed,
        fn_constructor_args=(model, options),
        compute=ActorPoolStrategy(size=actors),
        batch_size=256,
        num_gpus=gpus,
    )
    embedded.write_parquet(out)
    return int(ray.data.read_parquet(out).count())


def main() -> None:
    """Embed a folder of images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images")
    parser.add_argument("out")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--weights", default="default")
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--gpus", type=float, default=1, help="of each actor; 0 on a CPU")
    args = parser.parse_args()
    count = embed(args.images, args.out, args.model, args.actors, args.gpus, weights=args.weights)
    print(f"{count} embeddings in {args.out}")


if __name__ == "__main__":
    main()
