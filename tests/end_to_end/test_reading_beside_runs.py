"""Readers that hold handles while runs extend, compact and replace a store see no wrong row."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.networks import mean_pixel, normalized

from extractor import FeatureStore, StoreReplacedError, extract
from extractor.models import embedding
from extractor.upkeep.compact import compact

CYCLES = 2


@pytest.fixture(autouse=True)
def mean_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "load", lambda *_: mean_pixel())


def paint(folder: Path, number: int) -> None:
    """Write an image of one color, which its name tells."""
    color = (number * 37 % 256, number * 91 % 256, number % 256)
    Image.new("RGB", (9, 9), color).save(folder / f"{'-'.join(map(str, color))}.png")


def expected(path: str) -> list[float]:
    red, green, blue = map(int, path.removesuffix(".png").split("-"))
    return normalized((red, green, blue))


class Reader(threading.Thread):
    """Reads from handles of old states, and opens the newest one again and again."""

    def __init__(self, out: Path) -> None:
        super().__init__()
        self.out = out
        self.ends = threading.Event()
        self.errors: list[BaseException] = []
        self.reads = 0

    def run(self) -> None:
        handle, unread = FeatureStore.open(self.out), FeatureStore.open(self.out)
        try:
            while not self.ends.is_set():
                self.check(handle)
                if not unread.is_current():  # its index is read first from another state
                    self.check(unread)
                    unread = unread.reopen()
                if not handle.is_current():
                    self.check(handle)
                    handle = handle.reopen()
        except BaseException as error:
            self.errors.append(error)

    def check(self, handle: FeatureStore) -> None:
        rows = np.asarray(handle.features[:])  # of any state, always
        assert len(rows) == len(handle)
        try:
            paths, ids = handle.paths, handle.ids
        except StoreReplacedError:
            return
        np.testing.assert_allclose(rows, [expected(path) for path in paths], atol=1e-6)
        assert np.array_equal(handle.rows_of(ids), np.arange(len(handle)))
        self.reads += 1


def test_handles_beside_runs_serve_right_rows_or_say_that_they_cannot(tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    numbers = itertools.count(1)

    def run(**options: bool) -> None:
        extract(images, "mean", out, batch_size=2, shard_images=3, retire=True, **options)

    def change(removed: int = 2, added: int = 3) -> None:
        for path in sorted(images.iterdir())[:removed]:
            path.unlink()
        for _ in range(added):
            paint(images, next(numbers))

    change(added=7)
    run()
    readers = [Reader(out) for _ in range(2)]
    for reader in readers:
        reader.start()
    for _ in range(CYCLES):
        change()
        run()
        compact(out)
        change()
        run(overwrite=True)
    for reader in readers:
        reader.ends.set()
        reader.join()
    assert [reader.errors for reader in readers] == [[], []]
    assert all(reader.reads > CYCLES for reader in readers)


def test_store_deleted_under_a_reader_keeps_its_rows(tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for number in range(3):
        paint(images, number)
    extract(images, "mean", out)
    read, unread = FeatureStore.open(out), FeatureStore.open(out)
    paths = read.paths
    out.rename(tmp_path / "elsewhere")
    assert not read.is_current()
    for store in (read, unread):
        np.testing.assert_allclose(store.features[:], [expected(p) for p in paths], atol=1e-6)
    assert read.paths == paths
    with pytest.raises(StoreReplacedError, match="was replaced or removed since it was opened"):
        _ = unread.paths
