"""Search a store for the images that are most alike an image: search.py STORE QUERY..."""

import sys

from extractor import FeatureStore


def main(folder: str, *queries: str) -> None:
    store = FeatureStore.open(folder)
    for query, found in zip(queries, store.search(queries, k=5), strict=True):
        for hit in found:
            print(f"{query}\t{hit.score:.4f}\t{store.full_path(hit.row)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
