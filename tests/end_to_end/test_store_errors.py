"""Each error of a store has a class of its own, and real runs raise it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.networks import mean_pixel
from support.pictures import noise

from extractor import (
    FeatureStore,
    Progress,
    Report,
    StoreBusyError,
    StoreDamagedError,
    StoreNotFoundError,
    StoreReplacedError,
    extract,
)
from extractor.models import embedding
from extractor.upkeep import compact as compact_module
from extractor.upkeep.compact import compact
from extractor.upkeep.verify import verify

READERS: dict[str, Callable[[Path], Any]] = {
    "open": FeatureStore.open,
    "join": lambda out: FeatureStore.join(out, out),
    "group": lambda out: FeatureStore.open([out]),
    "compact": compact,
}


@pytest.fixture(autouse=True)
def mean_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "load", lambda *_: mean_pixel())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def run(photos: Path, out: Path, **options: Any) -> Report:
    return extract(photos, "mean", out, batch_size=4, **options)


@pytest.mark.parametrize("is_new", [True, False])
def test_second_writer_finds_the_store_busy(photos: Path, out: Path, is_new: bool) -> None:
    if not is_new:
        run(photos, out)
        noise(1, 9, 9).save(photos / "new.png")
    refused: list[str] = []

    def meanwhile(progress: Progress) -> None:
        if progress.phase not in ("computing", "publishing"):
            return
        for write in (lambda: run(photos, out), lambda: run(photos, out, overwrite=True)):
            with pytest.raises(StoreBusyError, match="is being written by process") as caught:
                write()
            refused.append(str(caught.value))
        if not is_new:
            with pytest.raises(StoreBusyError, match="is being written by process"):
                compact(out)

    report = run(photos, out, progress=meanwhile)
    assert len(refused) == 2 * (3 if not is_new else 5)
    assert (report.rows, list(verify(out))) == (11 + (not is_new), [])


def test_compact_keeps_runs_out_from_its_beginning(
    photos: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads the store before it writes, and would lose what a run adds in between."""
    run(photos, out)
    noise(1, 9, 9).save(photos / "!.png")  # sorted before the others, and in a shard behind them
    run(photos, out)
    noise(2, 9, 9).save(photos / "new.png")

    def verify_beside_a_run(folder: Path, *_: object) -> Iterator[str]:
        with pytest.raises(StoreBusyError, match="is being written by process"):
            run(photos, out)
        return verify(folder)

    monkeypatch.setattr(compact_module, "verify", verify_beside_a_run)
    before, after = compact(out)
    assert (before.rows, after.rows) == (12, 12)
    assert run(photos, out).rows == 13


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("state", ["missing", "empty", "a file", "unfinished"])
def test_folder_without_a_store_is_not_found(
    photos: Path, out: Path, name: str, state: str
) -> None:
    if state == "empty":
        out.mkdir()
    elif state == "a file":
        out.write_text("no folder")
    elif state == "unfinished":
        with pytest.raises(KeyboardInterrupt, match="Ctrl-C"):
            run(photos, out, progress=interrupt)
    with pytest.raises(StoreNotFoundError, match=f"{out.name} is not"):
        READERS[name](out)


def interrupt(progress: Progress) -> None:
    if progress.done:
        raise KeyboardInterrupt("Ctrl-C")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


@pytest.mark.parametrize("name", [*READERS, "extract"])
@pytest.mark.parametrize("damage", [cut, Path.unlink], ids=["cut", "removed"])
@pytest.mark.parametrize(
    "file", ["features/00000.npy", "images/00000.parquet", "failures.jsonl", "store.json"]
)
def test_cut_or_missing_file_is_damage(
    photos: Path, out: Path, name: str, damage: Callable[[Path], None], file: str
) -> None:
    (photos / "broken.png").write_text("no image")
    run(photos, out)
    damage(out / file)
    noise(1, 9, 9).save(photos / "new.png")
    if file == "store.json" and damage is Path.unlink:
        pytest.skip("not a store any more")
    if file == "failures.jsonl" and name not in ("compact", "extract"):
        FeatureStore.open(out)  # serves what it can
        with pytest.raises(StoreDamagedError, match=r"failures.jsonl"):
            _ = FeatureStore.open(out).failures
        return
    with pytest.raises(StoreDamagedError, match=file.rpartition("/")[2]):
        (READERS | {"extract": lambda out: run(photos, out)})[name](out)


@pytest.mark.parametrize("damage", [cut, Path.unlink], ids=["cut", "removed"])
def test_damaged_history_begins_anew_with_a_warning(
    photos: Path,
    out: Path,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    run(photos, out)
    before = FeatureStore.open(out)
    damage(out / "history.jsonl")
    noise(1, 9, 9).save(photos / "new.png")
    report = run(photos, out)
    assert report.rows == 12
    (warning,) = caplog.messages
    assert "history.jsonl" in warning
    assert warning.endswith("; the next run that changes the store begins a new history")
    assert report.store.ids[:11].tolist() == before.ids.tolist()
    changes = report.store.changes_since(before.token)  # what this run did, it knows
    (index,) = changes.added.tolist()
    assert report.store.paths[report.store.rows_of([index])[0]] == "new.png"
    assert list(verify(out)) == []


def test_replaced_or_deleted_store_serves_rows_and_says_so_for_the_rest(
    photos: Path, out: Path
) -> None:
    run(photos, out)
    store = FeatureStore.open(out)
    rows = store.features[:].copy()
    run(photos, out, overwrite=True, dtype="float16")
    assert not store.is_current()
    for read in (lambda: store.paths, lambda: store["00.png"]):
        with pytest.raises(StoreReplacedError, match="was replaced or removed since it was opened"):
            read()
    assert (store.features[:] == rows).all()
    assert store.reopen().features.dtype == "float16"
