"""What is not seen is not gone: rows outlive mounts and disks that fail for a night."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.callbacks import stop_after
from support.networks import mean_pixel

from extractor import FeatureStore, extract
from extractor.api import Report
from extractor.cli.summary import summary, warnings
from extractor.errors import DecodeError, InterruptedRunError
from extractor.images.listing import ImageList, list_images
from extractor.loading import image_decoder
from extractor.models import embedding
from extractor.options import Options
from extractor.run.up_to_date import up_to_date_report
from extractor.upkeep.compact import compact
from extractor.upkeep.verify import verify

SIZES: dict[str, Any] = {"shard_images": 3, "batch_size": 2, "workers": 1, "device": "cpu"}


@pytest.fixture(autouse=True)
def mean_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(model: str, options: Options, *_: object) -> object:
        return mean_pixel(size=(8, 8) if model == "mean" else (4, 4))

    monkeypatch.setattr(embedding, "load", load)


def add(folder: Path, *names: str) -> None:
    """Write images, each of a gray that is its own."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (5, 5), sum(name.encode()) % 256).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "in"
    add(made, "a.png", "b.png", "sub/c.png", "sub/d.png", "sub/deep/e.png", "z.png")
    return made


@contextmanager
def failing(
    *paths: Path, error: int = errno.ESTALE, calls: str = "stat scandir open"
) -> Iterator[None]:
    """Let the operating system refuse some paths and all below them."""
    bad = [os.fsencode(path) for path in paths]
    real = {name: getattr(os, name) for name in calls.split()}

    def refuse(name: str) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **named: Any) -> Any:
            if not isinstance(path, int):
                full = os.fsencode(path)
                if any(full == one or full.startswith(one + b"/") for one in bad):
                    raise OSError(error, os.strerror(error), full)
            return real[name](path, *arguments, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in real:
            patch.setattr(os, name, refuse(name))
        yield


def run(images: Any, out: Path, **options: Any) -> Report:
    return extract(images, "mean", out, **SIZES, **options)


def rows(out: Path) -> dict[str, bytes]:
    """Each path with the bytes of its row."""
    store = FeatureStore.open(out)
    assert list(verify(out)) == []
    return {path: np.asarray(store[i]).tobytes() for i, path in enumerate(store.paths)}


@pytest.mark.parametrize("error", [errno.ESTALE, errno.EACCES, errno.EIO, errno.ELOOP])
@pytest.mark.parametrize("check", ["stat", "content"])
def test_rows_below_a_folder_that_fails_stay(
    folder: Path, tmp_path: Path, error: int, check: Any
) -> None:
    out = tmp_path / "out"
    run(folder, out)
    before = rows(out)
    add(folder, "new.png")
    for _ in range(2):
        with failing(folder / "sub", error=error):
            report = run(folder, out, check=check)
        (store,) = report.stores
        assert (store.unseen, store.gone, store.changed, report.exit_code) == (3, 0, 0, 3)
        assert report.unlisted == (("sub", os.strerror(error)),)
        assert {path: rows(out)[path] for path in before} == before
        assert [failure["path"] for failure in report.failures] == ["sub"]
    report = run(folder, out, check=check)
    assert (report.rows, report.failed, report.exit_code) == (7, 0, 0)
    assert report.resumed == 7
    assert len(FeatureStore.open(out).manifest.shards) == 3


def test_rows_below_a_folder_that_cannot_be_listed_stay_although_the_files_are_there(
    folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(folder, out)
    with failing(folder / "sub/deep", calls="scandir"):
        report = run(folder, out, max_failure_rate=1.0)
    assert (report.rows, report.stores[0].unseen, report.exit_code) == (6, 1, 3)


def test_failing_input_beside_others_keeps_its_rows(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    inputs = [folder / "sub", folder / "a.png"]
    run(inputs, out)
    with failing(folder / "sub"):
        report = run(inputs, out)
    assert (report.rows, report.stores[0].unseen, report.exit_code) == (4, 3, 3)
    assert run(inputs, out).exit_code == 0


def test_single_images_that_cannot_be_read_keep_their_rows(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    listed = ImageList(os.fsencode(folder), [b"a.png", b"b.png", b"z.png"])
    run(listed, out)
    before = rows(out)
    with failing(folder / "a.png", error=errno.EACCES):
        for _ in range(2):
            report = run(listed, out, retry_failed=True)
            assert (report.rows, report.failed, report.stores[0].unseen) == (3, 0, 1)
            assert (report.resumed, report.exit_code) == (3, 3)
    os.utime(folder / "b.png", (9, 9))  # replaced by someone else's
    with failing(folder / "b.png", error=errno.EACCES, calls="open"):
        report = run(listed, out)
    assert (report.stores[0].unseen, report.failed, report.exit_code) == (1, 0, 3)
    assert rows(out) == before
    with failing(folder / "z.png", error=errno.EIO, calls="open"):
        report = run(listed, out, check="content")
    assert (report.stores[0].unseen, report.failed, report.exit_code) == (1, 0, 3)
    assert rows(out) == before
    # Another list does not ask for it, but nobody knows whether it is there.
    with failing(folder / "a.png", error=errno.EACCES):
        report = run(ImageList(listed.root, listed.paths[1:]), out)
    assert (report.stores[0].unseen, report.exit_code) == (1, 3)
    assert set(rows(out)) == set(before)
    report = run(ImageList(listed.root, listed.paths[1:]), out)
    assert (report.stores[0].gone, report.exit_code) == (1, 0)


def test_keep_missing_and_unseen_agree(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(folder, out)
    (folder / "z.png").unlink()
    with failing(folder / "sub"):
        report = run(folder, out, keep_missing=True)
    assert (report.rows, report.stores[0].unseen, report.exit_code) == (6, 3, 3)
    report = run(folder, out, keep_missing=True)
    assert (report.rows, report.failed, report.exit_code) == (6, 0, 0)


def test_all_stores_of_a_run_keep_their_rows(folder: Path, tmp_path: Path) -> None:
    extract(folder, ["mean", "small"], tmp_path / "out", **SIZES)
    with failing(folder / "sub"):
        report = extract(folder, ["mean", "small"], tmp_path / "out", **SIZES)
    assert [store.unseen for store in report.stores] == [3, 3]
    assert [store.rows for store in report.stores] == [6, 6]
    assert report.exit_code == 3


def test_interrupted_run_keeps_rows_that_are_unseen_by_now(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InterruptedRunError, match="stopped after 3 of 6"):
        run(folder, out, stop=stop_after(2))
    with failing(folder / "sub"):
        report = run(folder, out)
    assert (report.rows, report.stores[0].unseen, report.exit_code) == (4, 1, 3)
    report = run(folder, out)
    assert (report.rows, report.failed, report.exit_code) == (6, 0, 0)


def test_failure_below_an_unseen_folder_stays_known(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (folder / "sub/d.png").write_bytes(b"no image")
    run(folder, out)
    with failing(folder / "sub"):
        report = run(folder, out)
    assert [failure["path"] for failure in report.failures] == ["sub", "sub/d.png"]
    report = run(folder, out)
    assert (report.resumed, report.failed) == (6, 1)


def many(folder: Path, count: int = 20) -> list[str]:
    names = [f"many/{number:02d}.png" for number in range(count)]
    add(folder, *names)
    return names


@pytest.mark.parametrize("listed", [False, True])
def test_many_vanished_images_keep_their_rows_until_confirmed(tmp_path: Path, listed: bool) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    names = many(folder)
    add(folder, "a.png")
    images: Any = folder
    if listed:
        images = ImageList(os.fsencode(folder), [b"a.png", *map(str.encode, names)])
    run(images, out)
    before = rows(out)
    shutil.move(folder / "many", tmp_path / "away")
    if not listed:
        add(folder, *(f"new/{number:03d}.png" for number in range(20)))
    for _ in range(2):
        report = run(images, out)
        (store,) = report.stores
        assert (store.vanished, store.gone, store.failed, report.exit_code) == (20, 0, 0, 3)
        assert before.items() <= rows(out).items()
    assert FeatureStore.open(out).manifest.vanished == 20
    compact(out)
    assert FeatureStore.open(out).manifest.vanished == 20
    assert before.items() <= rows(out).items()
    text = dict(summary(report))["missing"]
    assert text.startswith("images of 20 rows are gone from the disk")
    assert "--retire" in text
    # They come back; nothing is computed, and the store forgets about it.
    shutil.move(tmp_path / "away", folder / "many")
    report = run(images, out)
    assert (report.resumed, report.stores[0].vanished, report.exit_code) == (
        len(images_of(images)),
        0,
        0,
    )
    assert FeatureStore.open(out).manifest.vanished == 0
    shutil.rmtree(folder / "many")
    report = run(images, out, retire=True)
    assert report.stores[0].vanished == 0
    assert report.exit_code == (3 if listed else 0)  # a listed image that is missing is a failure
    assert not set(names) & set(rows(out))
    files = sorted(path.name for path in (out / "features").iterdir())
    assert len(files) == len(FeatureStore.open(out).manifest.shards)


def images_of(images: Any) -> ImageList:
    return images if isinstance(images, ImageList) else list_images(images)


def test_few_vanished_images_are_retired(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    names = many(folder)
    run(folder, out)
    for name in names[:10]:
        (folder / name).unlink()
    report = run(folder, out)
    assert (report.rows, report.stores[0].gone, report.exit_code) == (10, 10, 0)


def test_images_that_are_left_out_are_retired_however_many(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    names = many(folder)
    root = os.fsencode(folder)
    run(ImageList(root, [*map(str.encode, names)]), out)
    report = run(ImageList(root, [names[3].encode()]), out)
    assert (report.rows, report.stores[0].gone, report.exit_code) == (1, 19, 0)


def test_up_to_date_store_reports_what_is_not_seen(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = Options(shard_images=3, device="cpu", weights="random", batch_size=2)
    arguments = {"shard_images": 3, "device": "cpu", "weights": "random", "batch_size": 2}
    out = str(tmp_path / "out")
    with failing(folder / "sub", calls="scandir"):
        extract(folder, "timm:test_resnet", out, **arguments)  # type: ignore[arg-type]
        report = up_to_date_report(list_images(folder), ["timm:test_resnet"], out, options)
    assert report is not None
    assert (report.rows, report.exit_code) == (3, 3)
    assert warnings(report) == ["cannot list sub: Stale file handle"]
    extract(folder, "timm:test_resnet", out, **arguments)  # type: ignore[arg-type]
    with failing(folder / "sub/c.png"):
        listed = ImageList(os.fsencode(folder), list_images(folder).paths)
        report = up_to_date_report(listed, ["timm:test_resnet"], out, options)
    assert report is not None
    assert (report.rows, report.stores[0].unseen, report.exit_code) == (6, 1, 3)
    assert warnings(report) == [f"{out}: images of 1 row could not be read; the rows are kept"]


def test_excluded_folder_that_cannot_be_seen_is_retired(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(folder, out)
    with failing(folder / "sub"):
        report = run(list_images(folder, exclude=["sub"]), out)
    assert (report.rows, report.stores[0].gone, report.exit_code) == (3, 3, 0)


@pytest.mark.parametrize("is_deleted", [False, True])
def test_changed_image_whose_content_cannot_be_read_keeps_its_row(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_deleted: bool
) -> None:
    out = tmp_path / "out"
    run(folder, out)
    before = rows(out)
    Image.new("L", (9, 9), 1).save(folder / "b.png")
    add(folder, "new.png")
    read_file = image_decoder.read_file

    def broken(path: bytes, *arguments: Any) -> Any:
        if path.endswith(b"b.png"):
            if is_deleted:
                (folder / "b.png").unlink()
            raise DecodeError("unreadable", "Input/output error")
        return read_file(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(image_decoder, "read_file", broken)
        report = run(folder, out)
    (store,) = report.stores
    if is_deleted:
        assert (store.rows, store.failed, store.unseen, store.changed) == (6, 1, 0, 1)
        return
    assert (store.rows, store.failed, store.unseen, store.changed) == (7, 0, 1, 0)
    assert (report.exit_code, store.first_failures) == (3, ())
    assert before.items() <= rows(out).items()
    assert FeatureStore.open(out).failures == []
    report = run(folder, out)
    assert (report.rows, report.stores[0].changed, report.exit_code) == (7, 1, 0)
