"""Train a linear probe: linear_probe.py STORE [IMAGE...]. Folders are classes; IMAGEs get one."""

import sys

from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from extractor import Extractor, FeatureStore, evaluate_store


def main(folder: str, *images: str) -> None:
    store = FeatureStore.open(folder)
    labels = [path.rpartition("/")[0] for path in store.paths]
    accuracy = evaluate_store(store, labels, probe=True).scores["linear probe"]
    print(f"accuracy {accuracy.value:.3f}, between {accuracy.low:.3f} and {accuracy.high:.3f}")
    if images:
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        probe.fit(store.features[:], labels)
        with Extractor.for_store(store) as embed:
            for image, label in zip(images, probe.predict(embed(images)), strict=True):
                print(f"{image}\t{label}")


if __name__ == "__main__":
    main(*sys.argv[1:])
