"""Follow a store while runs write to it: reader.py STORE SECONDS."""

import sys
import time

from extractor import FeatureStore, StoreReplacedError


def main(folder: str, seconds: str) -> None:
    store = FeatureStore.open(folder)
    shown = None
    end = time.monotonic() + float(seconds)
    while time.monotonic() < end:
        try:
            if shown != store.token:
                print(f"{len(store)} rows, last image {store.paths[-1]}", flush=True)
                shown = store.token
            if store.is_current():
                time.sleep(0.1)
                continue
        except StoreReplacedError:
            pass  # before its paths were read
        store = store.reopen()


if __name__ == "__main__":
    main(*sys.argv[1:])
