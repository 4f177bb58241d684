"""Join the embeddings of several backbones image by image: join.py JOINED.npz STORE STORE..."""

import sys

import numpy as np

from extractor import FeatureStore


def main(file: str, *folders: str) -> None:
    joined = FeatureStore.join(*folders)
    np.savez(file, rows=joined.features[:], paths=joined.paths)
    print(f"{len(joined)} images, {joined.dim} numbers each; left out: {joined.left_out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
