"""Images that were renamed, moved or touched keep their rows; the store learns their paths."""

from __future__ import annotations

import errno
import io
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.callbacks import stop_after
from support.networks import mean_pixel, normalized

from extractor import FeatureStore, extract
from extractor.api import Report
from extractor.cli.summary import summary
from extractor.errors import InterruptedRunError, StoreReplacedError
from extractor.images import files
from extractor.images.listing import ImageList, list_images, read_list
from extractor.models import embedding
from extractor.options import Options
from extractor.run import run_json as run_json_module
from extractor.run import snapshot as snapshot_module
from extractor.run.up_to_date import up_to_date_report
from extractor.upkeep.compact import compact
from extractor.upkeep.verify import verify

SIZES: dict[str, Any] = {"shard_images": 4, "batch_size": 2, "workers": 1, "device": "cpu"}
IMAGES = 10


@pytest.fixture(autouse=True)
def mean_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(model: str, options: Options, *_: object) -> object:
        return mean_pixel(size=(8, 8))

    monkeypatch.setattr(embedding, "load", load)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read to compare their content."""
    names: list[str] = []
    digest_of = files.digest_of

    def watched(path: Any) -> bytes:
        names.append(os.path.basename(os.fsdecode(path)))
        return digest_of(path)

    monkeypatch.setattr(snapshot_module, "digest_of", watched)
    return names


def write(path: Path, gray: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), gray).save(path.with_suffix(".pgm"))  # all of one size


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "in"
    for i in range(IMAGES):
        write(made / f"old/{i}.pgm", i)
    return made


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def run(folder: Any, out: Path, **options: Any) -> Report:
    return extract(folder, "mean", out, **SIZES, **options)


def counts(report: Report) -> tuple[int, int, int, int]:
    (store,) = report.stores
    assert list(verify(store.out)) == []
    return store.added, store.changed, store.moved, store.gone


def grays(out: Path) -> dict[str, int]:
    """The gray of each path that its row stands for."""
    store = FeatureStore.open(out)
    zero, one = (np.array(normalized((level,) * 3)) for level in (0, 255))
    levels = (np.asarray(store.features) - zero) / (one - zero) * 255
    assert len(set(store.paths)) == len(store.paths)
    return {
        path: round(float(level)) for path, level in zip(store.paths, levels[:, 0], strict=True)
    }


@pytest.mark.parametrize("keep_missing", [False, True])
def test_renamed_folder_keeps_its_rows_and_is_learned_once(
    folder: Path, out: Path, hashed: list[str], keep_missing: bool
) -> None:
    run(folder, out)
    assert hashed == []
    features = {path: path.read_bytes() for path in (out / "features").iterdir()}
    (folder / "old").rename(folder / "new")
    report = run(folder, out, keep_missing=keep_missing)
    assert counts(report) == (0, 0, IMAGES, 0)
    assert (report.resumed, report.rows, report.exit_code) == (IMAGES, IMAGES, 0)
    assert ("moved", "10 images; the rows are kept") in summary(report)
    assert ("up to date", "nothing to compute") in summary(report)
    assert sorted(hashed) == [f"{i}.pgm" for i in range(IMAGES)]
    hashed.clear()
    assert counts(run(folder, out)) == (0, 0, 0, 0)
    assert hashed == []
    assert grays(out) == {f"new/{i}.pgm": i for i in range(IMAGES)}
    assert {path: path.read_bytes() for path in (out / "features").iterdir()} == features


def test_touched_images_keep_their_rows_and_are_learned_once(
    folder: Path, out: Path, hashed: list[str]
) -> None:
    run(folder, out)
    for i in range(3):
        os.utime(folder / f"old/{i}.pgm", (9, 9))
    write(folder / "old/2.pgm", 77)
    report = run(folder, out)
    assert counts(report) == (1, 1, 0, 0)
    assert sorted(hashed) == ["0.pgm", "1.pgm", "2.pgm"]
    hashed.clear()
    assert counts(run(folder, out)) == (0, 0, 0, 0)
    assert hashed == []
    assert FeatureStore.open(out).column("mtime_ns")[:2] == [9 * 10**9] * 2
    assert grays(out) == {f"old/{i}.pgm": i for i in range(IMAGES)} | {"old/2.pgm": 77}


def test_new_image_is_read_once_if_no_row_lost_its_image(
    folder: Path, out: Path, hashed: list[str]
) -> None:
    run(folder, out)
    shutil.copy2(folder / "old/3.pgm", folder / "old/copy.pgm")
    assert counts(run(folder, out)) == (1, 0, 0, 0)
    assert hashed == []
    assert grays(out)["old/copy.pgm"] == 3


def test_swapped_images_swap_their_paths(folder: Path, out: Path) -> None:
    run(folder, out)
    a, b = folder / "old/1.pgm", folder / "old/8.pgm"
    os.utime(b, (5, 5))
    a.rename(folder / "x")
    b.rename(a)
    (folder / "x").rename(b)
    assert counts(run(folder, out)) == (0, 0, 2, 0)
    assert grays(out) == {f"old/{i}.pgm": {1: 8, 8: 1}.get(i, i) for i in range(IMAGES)}


def test_deleted_image_that_comes_back_elsewhere_gets_its_row_back(folder: Path, out: Path) -> None:
    run(folder, out)
    shutil.copy(folder / "old/4.pgm", folder.parent / "kept.pgm")
    (folder / "old/4.pgm").unlink()
    assert counts(run(folder, out)) == (0, 0, 0, 1)
    (folder.parent / "kept.pgm").rename(folder / "back.pgm")
    assert counts(run(folder, out)) == (0, 0, 1, 0)
    assert grays(out)["back.pgm"] == 4
    assert len(FeatureStore.open(out)) == IMAGES


def test_moves_are_no_disappearance_but_what_is_left_is(folder: Path, out: Path) -> None:
    for i in range(IMAGES, 24):
        write(folder / f"old/{i}.pgm", i)
    run(folder, out)
    (folder / "old").rename(folder / "new")
    for i in range(12):
        (folder / f"new/{i}.pgm").unlink()
    report = run(folder, out)
    (store,) = report.stores
    assert (store.moved, store.vanished, store.gone, report.exit_code) == (12, 12, 0, 3)
    assert counts(run(folder, out, retire=True)) == (0, 0, 0, 12)
    assert grays(out) == {f"new/{i}.pgm": i for i in range(12, 24)}


def test_order_of_a_list_follows_its_images(folder: Path, out: Path) -> None:
    def listed(*stems: str) -> ImageList:
        lines = "".join(f"{folder}/{stem}.pgm\n" for stem in stems)
        return read_list(io.BytesIO(lines.encode()), "a list")

    run(listed("old/3", "old/1", "old/2"), out, keep_order=True)
    (folder / "old/1.pgm").rename(folder / "old/9x.pgm")
    report = run(listed("old/9x", "old/2", "old/3"), out, keep_order=True)
    assert counts(report) == (0, 0, 1, 0)
    store = FeatureStore.open(out)
    assert [Path(store.paths[row]).stem for row in store.list_rows.tolist()] == ["9x", "2", "3"]


def test_compact_sorts_moved_rows_again(folder: Path, out: Path) -> None:
    run(folder, out)
    (folder / "old/0.pgm").rename(folder / "old/z.pgm")
    run(folder, out)
    assert FeatureStore.open(out).paths[0] == "old/z.pgm"
    compact(out)
    store = FeatureStore.open(out)
    assert store.paths == sorted(store.paths)
    assert grays(out) == {f"old/{i}.pgm": i for i in range(1, IMAGES)} | {"old/z.pgm": 0}


def test_reader_of_the_earlier_state_keeps_its_rows_and_says_what_it_lacks(
    folder: Path, out: Path
) -> None:
    run(folder, out)
    before = FeatureStore.open(out)
    late = FeatureStore.open(out)
    paths, features = before.paths, np.array(before.features)
    (folder / "old").rename(folder / "new")
    run(folder, out)
    assert (before.paths, np.array(before.features).tolist()) == (paths, features.tolist())
    assert np.array(late.features).tolist() == features.tolist()
    with pytest.raises(StoreReplacedError, match=r"call reopen\(\)"):
        late.paths  # noqa: B018


@pytest.mark.parametrize("keep_order", [False, True])
def test_moved_images_need_no_model(folder: Path, out: Path, keep_order: bool) -> None:
    options = {"keep_order": keep_order, **SIZES}

    def request() -> Any:
        names = sorted((os.fsencode(path) for path in folder.rglob("*.pgm")), reverse=True)
        return read_list(io.BytesIO(b"\n".join(names))) if keep_order else list_images(folder)

    write(folder / "top.pgm", 200)  # so that the root stays
    extract(request(), "mean", out, **options)
    (folder / "old").rename(folder / "new")
    os.utime(folder / "new/5.pgm", (9, 9))
    (folder / "new/3.pgm").rename(folder / "new/z.pgm")
    report = up_to_date_report(request(), ["mean"], str(out), Options(**options))
    assert report is not None
    assert counts(report) == (0, 0, IMAGES, 0)
    paths = {f"new/{i}.pgm": i for i in range(IMAGES)}
    paths["new/z.pgm"] = paths.pop("new/3.pgm")
    assert grays(out) == {**paths, "top.pgm": 200}
    store = FeatureStore.open(out)
    if keep_order:
        assert [store.paths[row] for row in store.list_rows] == sorted(store.paths, reverse=True)
    again = up_to_date_report(request(), ["mean"], str(out), Options(**options))
    assert again is not None
    assert counts(again) == (0, 0, 0, 0)
    write(folder / "new/5.pgm", 99)
    assert up_to_date_report(request(), ["mean"], str(out), Options(**options)) is None
    assert counts(extract(request(), "mean", out, **options)) == (1, 1, 0, 0)


def test_moves_are_learned_although_the_report_cannot_be_written(
    folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write(folder / "top.pgm", 200)  # so that the root stays
    run(folder, out)
    (folder / "old").rename(folder / "new")
    monkeypatch.setattr(run_json_module, "write_atomically", full)
    report = up_to_date_report(list_images(folder), ["mean"], str(out), Options(**SIZES))
    assert report is not None
    assert counts(report) == (0, 0, IMAGES, 0)
    assert "cannot write" in caplog.text


@pytest.mark.parametrize("change", ["rename", "swap", "touch"])
@pytest.mark.parametrize("batches", [1, 3])
def test_rows_of_an_interrupted_run_move_with_their_images(
    folder: Path, out: Path, change: str, batches: int
) -> None:
    with pytest.raises(InterruptedRunError, match="stopped") as stopped:
        run(folder, out, stop=stop_after(batches))
    expected = {f"old/{i}.pgm": i for i in range(IMAGES)}
    first, second = folder / "old/0.pgm", folder / "old/1.pgm"
    if change == "rename":
        first.rename(folder / "old/x.pgm")
        expected["old/x.pgm"] = expected.pop("old/0.pgm")
    elif change == "swap":
        os.utime(second, (5, 5))
        first.rename(folder / "x")
        second.rename(first)
        (folder / "x").rename(second)
        expected |= {"old/0.pgm": 1, "old/1.pgm": 0}
    else:
        os.utime(first, (5, 5))
    report = run(folder, out)
    assert report.resumed == stopped.value.done
    assert counts(report)[1:] == (0, {"rename": 1, "swap": 2, "touch": 0}[change], 0)
    assert grays(out) == expected
    assert run(folder, out).resumed == IMAGES
