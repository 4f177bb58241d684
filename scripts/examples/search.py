"""Search a store for the images that are most alike an image: search.py STORE QUERY..."""

import sys

import numpy as np

from extractor import Extractor, FeatureStore

NEIGHBORS = 5


def main(folder: str, *queries: str) -> None:
    store = FeatureStore.open(folder)
    rows = store.features[:].astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    with Extractor.for_store(store) as embed:
        for query, vector in zip(queries, embed(queries), strict=True):
            cosines = rows @ (vector / np.linalg.norm(vector))
            for row in np.argsort(-cosines)[:NEIGHBORS]:
                print(f"{query}\t{cosines[row]:.4f}\t{store.full_path(row)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
