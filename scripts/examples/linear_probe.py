"""Train a linear classifier on a store: linear_probe.py STORE. Folders of images are classes."""

import sys

import numpy as np
import torch
from torch.utils.data import DataLoader

from extractor import FeatureStore

EPOCHS = 20


def main(folder: str) -> None:
    store = FeatureStore.open(folder)
    names, labels = np.unique(
        [path.rpartition("/")[0] for path in store.paths], return_inverse=True
    )
    torch.manual_seed(0)
    probe = torch.nn.Sequential(
        torch.nn.BatchNorm1d(store.dim, momentum=None), torch.nn.Linear(store.dim, len(names))
    )
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-2)
    loader = DataLoader(store.dataset(labels), batch_size=256, shuffle=True)
    for _ in range(EPOCHS):
        for rows, targets in loader:
            loss = torch.nn.functional.cross_entropy(probe(rows.float()), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    probe.eval()
    right = sum((probe(rows.float()).argmax(1) == targets).sum().item() for rows, targets in loader)
    print(f"{right} of {len(store)} training images in the right one of {len(names)} classes")


if __name__ == "__main__":
    main(*sys.argv[1:])
