"""Indexes of a store: what they find, how they follow the store, and when they are left out."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.networks import mean_pixel
from support.terminal import on_a_terminal, screen

from extractor import Searcher, extract
from extractor.cli import main as cli
from extractor.errors import InstallationError, StoreDamagedError, StoreError, UsageError
from extractor.reading.reader import FeatureStore
from extractor.search import index as index_module
from extractor.search.derived import entries_of
from extractor.store.format import MANIFEST
from extractor.store.publish import check_output_folder
from extractor.upkeep.compact import compact
from extractor.upkeep.verify import verify

faiss = pytest.importorskip("faiss")

WriteStore = Callable[..., Path]
DIM = 16


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def clustered(count: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    centers = random.normal(size=(20, DIM)) * 3
    rows = centers[random.integers(0, 20, count)] + random.normal(size=(count, DIM))
    return rows.astype(np.float32)


@pytest.fixture
def store(tmp_path: Path, write_store: WriteStore) -> FeatureStore:
    """900 rows in two shards."""
    rows = clustered(900)
    return FeatureStore.open(write_store(tmp_path / "out", [rows[:500], rows[500:]]))


def recall_of(found: np.ndarray, exact: np.ndarray) -> float:
    pairs = zip(found, exact, strict=True)
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in pairs]))


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
def test_search_uses_the_index_and_names_its_recall(
    store: FeatureStore, kind: Any, metric: Any
) -> None:
    built = Searcher(store).build_index(kind, metric=metric)
    assert (built.added, built.was_built, built.entry.kind) == (900, True, kind)
    queries = clustered(200)[::2] + np.float32(0.01)
    found = store.search(queries, 10, metric=metric)
    exact = store.search(queries, 10, metric=metric, exact=True)
    assert (found.method, exact.method) == (
        f"{kind} index (recall@10 {built.entry.recall:.3f})",
        "exact",
    )
    recall = recall_of(found.rows, exact.rows)
    assert recall >= (1 if kind == "flat" else 0.95)
    assert recall == pytest.approx(built.entry.recall, abs=0.03)
    same = found.rows == exact.rows
    np.testing.assert_array_equal(found.scores[same], exact.scores[same])
    others = [other for other in ("cosine", "ip", "l2") if other != metric]
    assert store.search(queries, 10, metric=others[0]).method == "exact"


def test_recall_is_that_of_an_independent_count(store: FeatureStore) -> None:
    entry = Searcher(store).build_index("ivf").entry
    rows = np.array(store.features, np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    similarity = rows @ rows.T
    np.fill_diagonal(similarity, -np.inf)
    exact = np.argsort(-similarity, axis=1)[:, :10]
    picked = np.arange(0, 900, 3)
    found = store.search(rows[picked], 10, own_rows=picked)
    assert recall_of(found.rows, exact[picked]) == pytest.approx(entry.recall, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_printed_recall_is_that_of_other_vectors(
    kind: Any, tmp_path: Path, write_store: WriteStore
) -> None:
    random = np.random.default_rng(5)
    centers = random.normal(size=(100, 128))

    def near_centers(count: int) -> np.ndarray:
        noise = random.normal(size=(count, 128)) * 0.3
        return np.asarray(centers[random.integers(0, 100, count)] + noise, np.float32)

    store = FeatureStore.open(write_store(tmp_path / "out", [near_centers(50_000)]))
    entry = Searcher(store).build_index(kind).entry
    assert entry.sample == 5000
    queries = near_centers(10_000)
    found, exact = (store.search(queries, 10, exact=exact).rows for exact in (False, True))
    assert recall_of(found, exact) == pytest.approx(entry.recall, abs=0.01)


def test_own_rows_and_all_k_are_found_with_an_index(store: FeatureStore) -> None:
    Searcher(store).build_index("ivf")
    found = store.search(store.features[:20], 5, own_rows=range(20))
    assert not (found.rows == np.arange(20)[:, None]).any()
    assert "index" in found.method
    # One list of IVF holds fewer rows than these.
    assert (store.search(store.features[:3], 100).rows >= 0).all()
    assert store.search(store.features[:3], 101).method == "exact"
    assert store.select([0, 1, 2]).search(store.features[0], 2).method == "exact"


def colors(folder: Path, names: list[str]) -> None:
    """Images of one color each, whose embedding is that color."""
    folder.mkdir(exist_ok=True)
    for name in names:
        level = int(name)
        Image.new("RGB", (40, 30), (level, 255 - level, (level * 7) % 256)).save(
            folder / f"{name}.png"
        )


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
def test_an_index_follows_a_store_that_grows_and_loses_rows(
    tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "EXTRA", 0)  # a wrong row takes the place of a right one
    images, out = tmp_path / "images", tmp_path / "out"
    colors(images, [f"{i:03d}" for i in range(0, 200, 10)])
    store = extract(images, mean_pixel(), out, device="cpu").store
    Searcher(store).build_index(kind, metric="l2")

    colors(images, ["005", "115"])
    (images / "110.png").unlink()
    store = extract(images, mean_pixel(), out, device="cpu").store
    assert list(verify(out)) == []
    query = store["115.png"]
    found = store.search(query, 4, metric="l2")
    assert found.method.endswith(", 2 new rows exactly")
    exact = store.search(query, 4, metric="l2", exact=True)
    assert found.rows.tolist() == exact.rows.tolist()
    paths = [hit.path for hit in found[0]]
    assert paths[0] == "115.png"
    assert "110.png" not in paths

    built = Searcher(store).build_index(metric="l2")
    assert (built.added, built.was_built, built.entry.kind) == (2, False, kind)
    found = store.reopen().search(query, 4, metric="l2")
    assert "new row" not in found.method
    assert found.rows.tolist() == exact.rows.tolist()
    assert len(list((out / "derived").glob("*.faiss"))) == 1
    again = Searcher(store).build_index(metric="l2")
    assert (again.added, again.entry) == (0, built.entry)


def test_an_index_with_many_retired_rows_is_built_anew(tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    names = [f"{i:03d}" for i in range(0, 200, 20)]
    colors(images, names)
    store = extract(images, mean_pixel(), out, device="cpu").store
    Searcher(store).build_index("hnsw")
    for name in names[:4]:
        (images / f"{name}.png").unlink()
    store = extract(images, mean_pixel(), out, device="cpu").store
    built = Searcher(store).build_index("hnsw")
    assert built.was_built


def test_an_index_of_other_shards_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    colors(images, ["010", "020", "030", "040"])
    store = extract(images, mean_pixel(), out, device="cpu").store
    Searcher(store).build_index("hnsw")
    (images / "020.png").unlink()
    extract(images, mean_pixel(), out, device="cpu")
    compact(out)
    store = FeatureStore.open(out)
    with caplog.at_level(logging.WARNING):
        assert store.search(store[0], 2).method == "exact"
    assert "holds rows that are not in the store; run extract index" in caplog.text
    assert Searcher(store).build_index().was_built
    assert "index" in store.reopen().search(store[0], 2).method
    extract(images, mean_pixel(), out, device="cpu", overwrite=True, normalize=True)
    assert list(verify(out)) == []
    assert FeatureStore.open(out).search(store[0], 2).method == "exact"


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "json", "list", "fifo", "foreign"])
def test_a_changed_file_never_reaches_faiss(
    damage: str,
    store: FeatureStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    entry = Searcher(store).build_index("hnsw").entry
    content = entry.path.read_bytes()
    described = entry.folder / "hnsw-cosine.index.json"
    if damage == "flip":
        entry.path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    elif damage == "cut":
        entry.path.write_bytes(content[:-1])
    elif damage == "remove":
        entry.path.unlink()
    elif damage == "json":
        described.write_text("{")
    elif damage == "list":
        described.write_text("[]")
    elif damage == "fifo":
        described.unlink()
        os.mkfifo(described)
    else:
        values = json.loads(described.read_text())
        values["file"]["name"] = "../../../other.faiss"
        described.write_text(json.dumps(values))

    def refuse(*_: object) -> None:
        raise AssertionError("faiss was asked to parse a changed file")

    monkeypatch.setattr(faiss, "read_index", refuse)
    with caplog.at_level(logging.WARNING):
        assert store.reopen().search(store[0], 2).method == "exact"
    assert "is left out: " in caplog.text


def test_a_file_that_faiss_cannot_parse_is_left_out(
    store: FeatureStore, caplog: pytest.LogCaptureFixture
) -> None:
    """The checksum is right, and the content is another kind of file."""
    entry = Searcher(store).build_index("flat").entry
    described = entry.folder / "flat-cosine.index.json"
    entry.path.write_bytes(b"no index")
    values = json.loads(described.read_text())
    from extractor.store.format import FileEntry

    found = FileEntry.of(entry.path, entry.file.name)
    values["file"] = {"name": found.name, "bytes": found.bytes, "sha256": found.sha256}
    described.write_text(json.dumps(values))
    with caplog.at_level(logging.WARNING):
        assert store.reopen().search(store[0], 2).method == "exact"
    assert "is left out: " in caplog.text


def test_a_store_that_cannot_be_written_has_its_index_in_the_cache(
    store: FeatureStore, cache: Path
) -> None:
    (store.path / "derived").write_text("in the way")
    entry = Searcher(store).build_index("flat").entry
    assert cache in entry.path.parents
    assert "flat index" in store.reopen().search(store[0], 2).method
    assert [found.path for found in entries_of(store.path)] == [entry.path]
    (cache / "extractor" / "derived").rename(cache / "gone")
    (cache / "extractor" / "derived").write_text("in the way")
    with pytest.raises(StoreError, match="the index cannot be written"):
        Searcher(store.reopen()).build_index("flat")


def test_next_build_removes_what_a_killed_one_left(store: FeatureStore) -> None:
    folder = Path(store.path) / "derived"
    folder.mkdir()
    killed, living = folder / "tmp1.partial", folder / "tmp2.partial"
    killed.write_bytes(b"x")
    with living.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        Searcher(store).build_index("flat")
        assert sorted(folder.glob("*.partial")) == [living]


def test_a_damaged_store_with_an_index_can_be_replaced(store: FeatureStore) -> None:
    Searcher(store).build_index("flat")
    text = (store.path / MANIFEST).read_text()
    (store.path / MANIFEST).write_text(text.replace('"shards": [', '"shards": [{},', 1))
    with pytest.raises(StoreDamagedError, match="start over with --overwrite"):
        check_output_folder(store.path, may_exist=True)
    check_output_folder(store.path, may_exist=True, overwrite=True)


def test_without_faiss_search_is_exact_and_an_index_is_refused(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Searcher(store).build_index("flat")
    monkeypatch.setattr(index_module, "faiss_module", lambda: None)
    with caplog.at_level(logging.WARNING):
        assert store.reopen().search(store[0], 2).method == "exact"
    assert "faiss is not installed" in caplog.text
    with pytest.raises(InstallationError, match=r"'backbone-extractor\[search\]'"):
        Searcher(store).build_index("flat")


def test_wrong_arguments_are_named(
    store: FeatureStore, tmp_path: Path, write_store: WriteStore
) -> None:
    with pytest.raises(UsageError, match="kind: got 'lsh', expected one of flat, hnsw, ivf"):
        Searcher(store).build_index("lsh")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="metric: got 'dot'"):
        Searcher(store).build_index(metric="dot")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="index: got Selection, expected a store"):
        Searcher(store.select([1])).build_index()
    empty = FeatureStore.open(write_store(tmp_path / "empty", []))
    with pytest.raises(StoreError, match="empty holds no rows, so there is nothing to index"):
        Searcher(empty).build_index()


@pytest.mark.parametrize("rows", [1, 2, 12])
@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
def test_small_stores_have_an_index(
    rows: int, kind: Any, tmp_path: Path, write_store: WriteStore
) -> None:
    store = FeatureStore.open(write_store(tmp_path / "out", [clustered(rows)]))
    Searcher(store).build_index(kind)
    found = store.search(store.features, 1)
    assert found.rows.ravel().tolist() == list(range(rows))


def test_large_values_do_not_overflow_an_index(tmp_path: Path, write_store: WriteStore) -> None:
    store = FeatureStore.open(write_store(tmp_path / "out", [clustered(300) * 1e5]))
    for metric in ("l2", "cosine"):
        entry = Searcher(store).build_index("hnsw", metric=metric).entry
        assert entry.recall > 0.95


def test_command_builds_extends_and_uses_an_index(
    store: FeatureStore, capsys: pytest.CaptureFixture[str]
) -> None:
    out = os.fspath(store.path)
    assert cli.main(["index", out, "--kind", "ivf"]) == 0
    printed = capsys.readouterr().out.splitlines()
    (entry,) = entries_of(store.path)
    assert printed[0] == f"{out}: 900 rows indexed"
    assert printed[1] == f"index   {entry.path}"
    assert printed[3] == f"recall  {entry.recall:.3f} of the 10 nearest rows, for 900 rows"
    assert cli.main(["index", out]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: already up to date\n")
    assert cli.main(["search", out, "row:3", "-k", "2"]) == 0
    recall = f"recall@10 {entry.recall:.3f}"
    assert capsys.readouterr().err == f"{out}: ivf index ({recall}), 900 rows\n"
    assert cli.main(["search", out, "row:3", "-k", "2", "--exact"]) == 0
    assert "exact search, 900 rows" in capsys.readouterr().err


def test_command_shows_its_progress_on_a_terminal(store: FeatureStore) -> None:
    received = on_a_terminal("-m", "extractor", "index", os.fspath(store.path), "--kind", "hnsw")
    assert "training the index ..." in received
    assert "measuring the recall ..." in received
    (bar,) = filter(None, screen(received))  # all else was removed
    assert "900/900" in bar


def test_progress_counts_the_rows_that_are_added(store: FeatureStore) -> None:
    seen: list[tuple[str, int, int]] = []
    Searcher(store).build_index("flat", progress=lambda *values: seen.append(values))
    adding = [("adding", done, 900) for done in (0, 500, 900)]
    assert seen == [("training", 0, 900), *adding, ("measuring", 0, 900)]
    seen.clear()
    Searcher(store).build_index("flat", progress=lambda *values: seen.append(values))
    assert seen == []


def test_hnsw_has_levels_enough_to_find_every_cluster(
    tmp_path: Path, write_store: WriteStore
) -> None:
    rows = clustered(2900)
    store = FeatureStore.open(write_store(tmp_path / "out", [rows[:2000], rows[2000:]]))
    entry = Searcher(store).build_index("hnsw").entry
    index = faiss.read_index(os.fspath(entry.path))
    graph = index.hnsw  # lives as long as the index
    above = faiss.vector_to_array(graph.levels) - 1
    # The level of a row is exponential with the scale 1: the mean of its floor is 1 / (e - 1).
    assert above.mean() == pytest.approx(1 / (math.e - 1), abs=0.08)
    assert graph.efConstruction == index_module.BUILD_EFFORT
    assert graph.nb_neighbors(1) == index_module.LINKS


@pytest.mark.parametrize("rows", [1, 20, 45])
def test_faiss_prints_nothing_about_a_tiny_index(
    rows: int, tmp_path: Path, write_store: WriteStore, capfd: pytest.CaptureFixture[str]
) -> None:
    write_store(tmp_path / "tiny", [clustered(rows)])
    assert cli.main(["index", str(tmp_path / "tiny"), "--kind", "ivf"]) == 0
    assert capfd.readouterr().err == ""


def test_index_of_a_store_whose_path_is_not_utf8_lies_in_the_cache(
    tmp_path: Path, write_store: WriteStore, cache: Path
) -> None:
    store = FeatureStore.open(write_store(tmp_path / "out\udcff", [clustered(20)]))
    built = Searcher(store).build_index("flat")
    assert built.entry.path.is_relative_to(cache)
    assert store.reopen().search(store.features[:1]).method.startswith("flat index")
