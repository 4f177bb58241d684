"""Find the images most similar to a few others, print them, and draw them on a contact sheet.

scripts/show_neighbors.py features/ images/ --sheet neighbors.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from extractor import FeatureStore

THUMBNAIL = 150  # pixels
LABEL = 34
GAP = 10


def nearest(store: FeatureStore, row: int, count: int) -> list[tuple[int, float]]:
    """Return the rows most similar to a row and their cosine similarity, the nearest first."""
    features = np.array(store.features, np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    similarity = features @ features[row]
    similarity[row] = -np.inf
    return [(int(i), float(similarity[i])) for i in np.argsort(-similarity)[:count]]


def queries(paths: list[str], count: int) -> list[int]:
    """Return the rows of a few images, each from another folder, spread over all folders."""
    first = {path.rpartition("/")[0]: row for row, path in reversed(list(enumerate(paths)))}
    rows = sorted(first.values())
    return rows[:: max(1, len(rows) // count)][:count]


def draw_sheet(rows: list[list[tuple[Path, str]]]) -> Image.Image:
    """Draw labeled thumbnails: a row for each query, which stands first, in a frame."""
    columns = max(map(len, rows))
    width, height = THUMBNAIL + GAP, THUMBNAIL + LABEL + GAP
    sheet = Image.new("RGB", (columns * width + 2 * GAP, len(rows) * height + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for y, row in enumerate(rows):
        for x, (path, label) in enumerate(row):
            left, top = GAP + x * width + (GAP if x else 0), GAP + y * height
            with Image.open(path) as image:
                picture = ImageOps.exif_transpose(image).convert("RGB")
            sheet.paste(ImageOps.pad(picture, (THUMBNAIL, THUMBNAIL), color="white"), (left, top))
            if x == 0:
                edges = (left - 4, top - 4, left + THUMBNAIL + 3, top + THUMBNAIL + 3)
                draw.rectangle(edges, outline=(30, 110, 200), width=4)
            draw.text((left, top + THUMBNAIL + 4), label, fill="black")
    return sheet


def main() -> None:
    """Print the neighbors and write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("images", type=Path, help="folder that the store's paths start from")
    parser.add_argument("--sheet", type=Path, default=Path("neighbors.png"))
    parser.add_argument("--queries", type=int, default=3)
    parser.add_argument("--neighbors", type=int, default=4)
    options = parser.parse_args()

    store = FeatureStore.open(options.store)
    paths = list(store.paths)
    rows = []
    for query in queries(paths, options.queries):
        print(f"most similar to {paths[query]}:")
        row = [(options.images / paths[query], f"query\n{paths[query]}")]
        for i, similarity in nearest(store, query, options.neighbors):
            print(f"  {similarity:.3f}  {paths[i]}")
            row.append((options.images / paths[i], f"{similarity:.3f}\n{paths[i]}"))
        rows.append(row)
    draw_sheet(rows).save(options.sheet)
    print(f"contact sheet: {options.sheet}")


if __name__ == "__main__":
    main()
