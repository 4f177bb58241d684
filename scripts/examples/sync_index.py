"""Keep an index outside of the store in step with a folder that grows: sync_index.py STORE INDEX.

The index is a file of ids and vectors here; one of faiss takes the same ids in ``IndexIDMap2``.
"""

import sys
from pathlib import Path

import numpy as np

from extractor import FeatureStore, UnknownTokenError


def main(folder: str, file: str) -> None:
    store = FeatureStore.open(folder)
    index, token = {}, ""
    if Path(file).exists():
        with np.load(file) as saved:
            index = dict(zip(saved["ids"].tolist(), saved["rows"], strict=True))
            token = str(saved["token"])
    try:
        changes = store.changes_since(token)
        added, removed = changes.added, changes.removed
    except UnknownTokenError:  # the first time, or too many states ago
        added, removed = store.ids, np.array(list(index), np.int64)
    for number in removed.tolist():
        del index[number]
    rows = store.features[store.rows_of(added)]
    index.update(zip(added.tolist(), rows, strict=True))
    print(f"{len(added)} added, {len(removed)} removed, {len(index)} in the index")
    ids = np.array(list(index), np.int64)
    with open(file, "wb") as saving:  # a name alone would get the suffix .npz
        np.savez(saving, ids=ids, rows=np.array(list(index.values())), token=store.token)


if __name__ == "__main__":
    main(*sys.argv[1:])
