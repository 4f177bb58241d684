"""Embed images in a Daft query.

    pip install daft
    python scripts/examples/daft_udf.py '/srv/images/**/*.jpg' /srv/embeddings

Each process of the query loads the model once. The same class runs on Daft's own runner and on Ray.
"""

from __future__ import annotations

import argparse
from typing import Any

import daft
from daft import DataType, Series


@daft.cls
class Embed:
    """Embeds a column of encoded images; an image that fails becomes null."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        from extractor import Extractor

        self._extractor = Extractor(model, **options)

    @daft.method.batch(return_dtype=DataType.list(DataType.float32()))  # type: ignore[untyped-decorator]
    def __call__(self, images: Series) -> list[list[float] | None]:
        """Return a list of embeddings."""
        rows = self._extractor(images.to_pylist(), on_error="return")
        return [None if isinstance(row, Exception) else row.tolist() for row in rows]


def embed(pattern: str, out: str, model: str, **options: Any) -> int:
    """Embed the images that a glob matches, and return the number of embeddings."""
    run = Embed(model, options)
    images = daft.from_glob_path(pattern)
    encoded = images.with_column("bytes", daft.col("path").download())
    embedded = encoded.with_column("embedding", run(daft.col("bytes"))).select("path", "embedding")
    embedded.where(daft.col("embedding").not_null()).write_parquet(out)
    return int(daft.read_parquet(f"{out}/*.parquet").count_rows())


def main() -> None:
    """Embed the images that a glob matches."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pattern")
    parser.add_argument("out")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--weights", default="default")
    args = parser.parse_args()
    count = embed(args.pattern, args.out, args.model, weights=args.weights)
    print(f"{count} embeddings in {args.out}")


if __name__ == "__main__":
    main()
