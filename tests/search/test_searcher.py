"""What ``store.search`` accepts, finds, leaves out and refuses."""

from __future__ import annotations

import math
import os
import pickle
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.pictures import noise

from extractor import Extractor, Searcher, extract
from extractor.errors import DecodeError, StoreError, UsageError
from extractor.reading import lookup
from extractor.reading.reader import FeatureStore
from extractor.search.queries import Names
from extractor.store.index import read_column

WriteStore = Callable[..., Path]

# Five directions in the plane, at these angles in degrees.
ANGLES = [0, 10, 25, 90, 180]
NAMES = [[b"a/0.jpg", b"a/10.jpg", b"b/25.jpg"], [b"b/90.jpg", b"c/\xff.jpg"]]


def direction(*degrees: float) -> np.ndarray:
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


@pytest.fixture
def out(tmp_path: Path, write_store: WriteStore) -> Path:
    lengths = np.array([[1], [2], [3], [4], [5]], np.float32)
    rows = direction(*ANGLES) * lengths
    return write_store(tmp_path / "out", [rows[:3], rows[3:]], names=NAMES, root=str(tmp_path))


@pytest.fixture
def store(out: Path) -> FeatureStore:
    return FeatureStore.open(out)


def cosine(degrees: float) -> float:
    return math.cos(math.radians(degrees))


def test_search_reads_paths_of_few_shards_and_after_many_searches_all_once(
    tmp_path: Path, write_store: WriteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    angles = np.arange(32) * 2
    names = [[b"%d/%d.jpg" % (shard, i) for i in range(4)] for shard in range(8)]
    out = write_store(tmp_path / "out", np.split(direction(*angles), 8), names=names)
    store = FeatureStore.open(out)
    read: list[str] = []

    def noted(path: Path, name: str) -> list[Any]:
        read.append(path.name)
        return read_column(path, name)

    monkeypatch.setattr(lookup, "read_column", noted)
    (query,) = Names(store).queries_of_word("row:9")
    assert (query.name, query.row, read) == ("2/1.jpg", 9, ["00002.parquet"])
    hits = store.search([direction(15)[0], direction(17)[0]], k=2)  # rows 7 and 8, 8 and 9
    expected = [["1/3.jpg", "2/0.jpg"], ["2/0.jpg", "2/1.jpg"]]
    for _ in range(2):
        assert [{hit.path for hit in found} for found in hits] == [set(e) for e in expected]
    assert read[1:] == ["00001.parquet", "00002.parquet"]
    part = store.select([30, 8])
    assert part.search(direction(16), k=1)[0][0].path == "2/0.jpg"
    assert read[3:] == ["00002.parquet"]
    for row in range(32):
        assert store.search(store.features[row], k=1)[0][0].path == f"{row // 4}/{row % 4}.jpg"
    assert read[4:] == [f"{shard:05}.parquet" for shard in range(8)]


def test_hits_name_row_id_score_and_path_best_first(store: FeatureStore) -> None:
    hits = store.search(direction(12), k=3)
    assert hits.rows.tolist() == [[1, 0, 2]]
    assert hits.ids.tolist() == [[1, 0, 2]]
    assert hits.scores[0] == pytest.approx([cosine(2), cosine(12), cosine(13)], abs=1e-7)
    assert [hit.path for hit in hits[0]] == ["a/10.jpg", "a/0.jpg", "b/25.jpg"]
    assert hits[0][2] == (2, 2, hits.scores[0, 2], "b/25.jpg")
    assert (len(hits), hits.metric, hits.method) == (1, "cosine", "exact")
    assert [len(found) for found in hits] == [3]


def test_metrics_rank_by_their_own_score(store: FeatureStore) -> None:
    query = direction(20)
    assert store.search(query, 2, metric="cosine").rows.tolist() == [[2, 1]]
    assert store.search(query, 2, metric="ip").rows.tolist() == [[2, 1]]
    found = store.search(query, 2, metric="l2")
    assert found.rows.tolist() == [[0, 1]]
    # Law of cosines, for rows of length 1 and 2.
    assert found.scores[0] == pytest.approx(
        [math.sqrt(2 - 2 * cosine(20)), math.sqrt(5 - 4 * cosine(10))], abs=1e-6
    )


@pytest.mark.parametrize(
    "query",
    [
        direction(12)[0],
        direction(12).tolist(),
        direction(12)[0].tolist(),
        [direction(12)[0]],
        torch.from_numpy(direction(12)),
        [torch.from_numpy(direction(12)[0])],
        direction(12).astype(np.float16),
    ],
)
def test_vectors_of_any_kind_are_queries(store: FeatureStore, query: Any) -> None:
    assert store.search(query, k=2).rows.tolist() == [[1, 0]]


def test_default_k_is_ten_or_all_rows(store: FeatureStore, write_store: WriteStore) -> None:
    assert store.search(direction(0)).rows.shape == (1, 5)
    large = write_store(store.path.parent / "large", [np.eye(12, dtype=np.float32)])
    assert FeatureStore.open(large).search(np.eye(12)).rows.shape == (12, 10)


def test_path_in_store_stands_for_its_row_and_does_not_find_itself(store: FeatureStore) -> None:
    assert store.search("a/10.jpg", k=5).rows.tolist() == [[0, 2, 3, 4, -1]]
    both = store.search(["a/10.jpg", Path("b/90.jpg")], k=1)
    assert both.rows.tolist() == [[0], [2]]
    assert len(store.search("a/10.jpg", k=5)[0]) == 4
    assert store.search(os.fsdecode(b"c/\xff.jpg"), k=1).rows.tolist() == [[3]]


def test_own_rows_of_vectors_are_left_out(store: FeatureStore) -> None:
    assert store.search(store.features, 1).rows.ravel().tolist() == [0, 1, 2, 3, 4]
    left_out = store.search(store.features, 1, own_rows=range(5))
    assert left_out.rows.ravel().tolist() == [1, 0, 1, 2, 3]


def test_image_file_of_the_store_is_its_row_until_it_changes(
    store: FeatureStore, tmp_path: Path
) -> None:
    """The records of the store are of files with 101 bytes, made at 10**18 + 1 ns."""
    embedded = []

    class Embed:
        def __call__(self, images: list[Any], on_error: str) -> np.ndarray:
            embedded.extend(images)
            return direction(90)

    path = tmp_path / "a" / "10.jpg"
    path.parent.mkdir()
    path.write_bytes(b"x" * 101)
    os.utime(path, ns=(10**18 + 1, 10**18 + 1))
    searcher = Searcher(store, extractor=Embed())  # type: ignore[arg-type]
    assert searcher.search(path, k=1).rows.tolist() == [[0]]
    assert embedded == []
    os.utime(path)
    assert searcher.search(path, k=1).rows.tolist() == [[3]]
    assert embedded == [path]


def test_plus_and_minus_add_unit_directions_and_leave_their_rows_out(store: FeatureStore) -> None:
    # 0 and 90 degrees, of lengths 1 and 4, add to 45 degrees.
    found = store.search("a/0.jpg", k=3, plus=["b/90.jpg"])
    assert found.rows.tolist() == [[2, 1, 4]]
    assert found.scores[0, 0] == pytest.approx(cosine(20), abs=1e-7)
    # 90 degrees minus 0 degrees is 135 degrees.
    found = store.search(direction(90), k=2, minus=["a/0.jpg"])
    assert found.rows.tolist() == [[3, 4]]
    for image in ("b/90.jpg", Path("b/90.jpg"), iter(["b/90.jpg"])):
        assert store.search("a/0.jpg", k=3, plus=image).rows.tolist() == [[2, 1, 4]]
    with pytest.raises(UsageError, match="the vectors cancel out"):
        store.search("a/0.jpg", plus=["c/\udcff.jpg"])
    with pytest.raises(UsageError, match="there is no distance; try the metric cosine"):
        store.search("a/0.jpg", plus=["a/0.jpg"], metric="l2")


def test_selections_and_groups_are_searched_by_their_own_rows(
    store: FeatureStore, tmp_path: Path
) -> None:
    some = store.select([4, 2, 0])
    assert some.search(direction(12), k=2).rows.tolist() == [[2, 1]]
    assert some.search(direction(12), k=2).ids.tolist() == [[0, 2]]
    shutil.copytree(store.path, tmp_path / "again")
    group = FeatureStore.open([store.path, tmp_path / "again"])
    found = group.search(direction(12), k=4)
    assert found.rows.tolist() == [[1, 6, 0, 5]]
    assert found.ids.tolist() == [[-1] * 4]
    joined = FeatureStore.join(store, store)
    assert joined.search(np.tile(direction(12), 2), k=1).rows.tolist() == [[1]]


def test_retired_rows_are_not_found(tmp_path: Path) -> None:
    for i in range(4):
        noise(i, 30, 30).save(tmp_path / f"{i}.png")
    small: dict[str, Any] = {"weights": "random", "device": "cpu", "image_size": 32}
    extract(tmp_path, "test_resnet", tmp_path / "out", **small)
    (tmp_path / "1.png").unlink()
    store = extract(tmp_path, "test_resnet", tmp_path / "out", **small).store
    assert store.manifest.retired == 1
    assert sorted(store.search(store.features[0], 3).ids[0].tolist()) == [0, 2, 3]


def test_images_are_embedded_as_the_store_was(tmp_path: Path) -> None:
    for i in range(5):
        noise(i, 40, 30).save(tmp_path / f"{i}.png")
    store = extract(
        tmp_path, "test_resnet", tmp_path / "out", weights="random", device="cpu", normalize=True
    ).store
    content = (tmp_path / "3.png").read_bytes()
    array = np.asarray(noise(2, 40, 30))
    hits = store.search([content, array, noise(4, 40, 30)], k=1)
    assert hits.rows.tolist() == [[3], [2], [4]]
    assert hits.scores.min() > 0.9999
    assert store.search(noise(1, 40, 30), k=1).rows.tolist() == [[1]]
    with pytest.raises(DecodeError, match="image 0: no image format matches"):
        store.search([b"nothing"])
    (tmp_path / "text.jpg").write_text("nothing")
    with pytest.raises(DecodeError, match=r"image 0 \(.*text.jpg\): no image format matches"):
        store.search(tmp_path / "text.jpg")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 6}, "k: got 6, expected an integer from 1 to 5, the number of rows of"),
        ({"k": 0}, "k: got 0, expected an integer from 1 to 5"),
        ({"k": True}, "k: got True, expected an integer"),
        ({"metric": "dot"}, "metric: got 'dot', expected one of cosine, ip, l2"),
        ({"queries": [[1.0, 2.0, 3.0]]}, r"shape \(1, 3\), expected \(number of queries, 2\)"),
        ({"queries": [[1.0, math.nan]]}, "query 0 holds NaN or infinity"),
        ({"queries": [[1.0, 2.0], [3.0]]}, "expected vectors of one length on the CPU"),
        ({"queries": ["a/0.jpg", "a/7.jpg"]}, "a/7.jpg: no such image, and no such path in the"),
        ({"queries": 7}, "queries: got int, expected vectors, or a list of paths"),
        ({"queries": "a/0.jpg", "own_rows": [0]}, "own_rows: this goes with vectors"),
    ],
)
def test_a_wrong_argument_is_named(
    store: FeatureStore, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        store.search(**{"queries": [[1.0, 2.0]], **arguments})


def test_another_store_is_no_query(store: FeatureStore) -> None:
    with pytest.raises(UsageError, match=r"got FeatureStore.* try its \.features"):
        store.search(store)


def test_a_store_without_rows_says_so(tmp_path: Path, write_store: WriteStore) -> None:
    store = FeatureStore.open(write_store(tmp_path / "empty", []))
    with pytest.raises(StoreError, match="empty holds no rows, so there is nothing to search"):
        store.search([[1.0, 2.0, 3.0]])


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_queries_whose_scores_overflow_are_refused(store: FeatureStore, metric: Any) -> None:
    with pytest.raises(UsageError, match=f"a value above 1e\\+100, whose {metric} overflows"):
        store.search(direction(0).astype(float) * 1e300, metric=metric)
    assert store.search(direction(0).astype(float) * 1e300, k=1).rows.tolist() == [[0]]


def test_a_store_that_was_searched_can_be_pickled(store: FeatureStore) -> None:
    store.search(direction(0))
    again = pickle.loads(pickle.dumps(store))
    assert again.search(direction(12), k=1).rows.tolist() == [[1]]


def test_a_searcher_takes_the_extractor_of_its_caller(tmp_path: Path) -> None:
    for i in range(3):
        noise(i, 40, 30).save(tmp_path / f"{i}.png")
    store = extract(tmp_path, "test_resnet", tmp_path / "out", weights="random", device="cpu").store
    with Extractor.for_store(store, device="cpu") as embed:
        found = Searcher(store, extractor=embed).search([noise(1, 40, 30)], 1)
    assert found.rows.tolist() == [[1]]
    made = {"weights": "random", "device": "cpu", "precision": "float32"}
    with Extractor("test_resnet", **made, normalize=True) as embed:
        found = Searcher(store.select("*"), extractor=embed).search([noise(1, 40, 30)], 1)
    assert found.rows.tolist() == [[1]]
    for other in ({"seed": 1}, {"augment": "flip"}, {"image_size": 64}):
        with (
            Extractor("test_resnet", **made, **other) as embed,
            pytest.raises(StoreError, match="was not made as this extractor embeds"),
        ):
            Searcher(store, extractor=embed).search([noise(1, 40, 30)], 1)


@pytest.mark.parametrize("rows", ["features/resnet50", Path("features"), None, np.eye(2)], ids=type)
def test_a_searcher_of_something_else_than_a_store_is_refused(rows: Any) -> None:
    with pytest.raises(UsageError, match=r"rows: got \w+, expected a store; try Feature"):
        Searcher(rows)


@pytest.mark.parametrize("queries", [{"a/0.jpg"}, {"a/0.jpg": 1}], ids=type)
def test_queries_without_an_order_are_refused(store: FeatureStore, queries: Any) -> None:
    with pytest.raises(UsageError, match=r"queries: got \w+, expected vectors, or a list of paths"):
        store.search(queries)


def test_threads_share_one_extractor(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []

    class Embed:
        dim = 2

        def __call__(self, images: list[Any], on_error: str) -> np.ndarray:
            return direction(*[90] * len(images))

    def for_store(rows: object) -> Embed:
        time.sleep(0.05)
        made.append(rows)
        return Embed()

    monkeypatch.setattr(Extractor, "for_store", for_store)
    with ThreadPoolExecutor(8) as callers:
        found = list(callers.map(lambda _: store.search([b"image"], k=1).rows.item(), range(8)))
    assert found == [3] * 8
    assert made == [store]
