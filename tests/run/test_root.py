"""Rows hold for images that are now in another folder, if these are the same images."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.callbacks import stop_after
from support.networks import mean_pixel, normalized

from extractor import FeatureStore, Report, extract
from extractor.errors import InterruptedRunError, StoreError
from extractor.images.listing import ImageList, list_images, read_list
from extractor.models import embedding
from extractor.options import Options
from extractor.run.up_to_date import up_to_date_report
from extractor.store.format import JOB, STAGING
from extractor.upkeep.verify import verify, verify_images

IMAGES = 10


def color(number: int) -> tuple[int, int, int]:
    return 12 * number, 5 * number, 250 - 12 * number


def write(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"P6 4 4 255\n" + bytes(color(number)) * 16)
    os.utime(path, ns=(0, (1_700_000_000 + number) * 10**9))


def touch(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        os.utime(folder / name, ns=(0, 1_800_000_000 * 10**9))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    folder = tmp_path / "old"
    for number in range(IMAGES):
        write(folder / f"{number}.ppm", number)
    return folder


@pytest.fixture
def new(old: Path, tmp_path: Path) -> Path:
    """A copy that keeps the times, as another mount of the same disk would show it."""
    return Path(shutil.copytree(old, tmp_path / "mnt" / "new"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def run(images: Any, out: Path, **options: Any) -> Report:
    return extract(images, mean_pixel(), out, shard_images=4, batch_size=2, **options)


def files_of(out: Path) -> dict[str, bytes]:
    files = [path for path in out.rglob("*") if path.is_file() and path.name != "run.json"]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def assert_rows(out: Path, numbers: dict[str, int]) -> None:
    store = FeatureStore.open(out)
    assert sorted(store.paths) == sorted(numbers)
    expected = [normalized(color(numbers[path])) for path in store.paths]
    np.testing.assert_allclose(store.features[:], expected, atol=1e-5)
    assert list(verify(out)) == list(verify_images(out)) == []


def numbers(count: int = IMAGES, prefix: str = "") -> dict[str, int]:
    return {f"{prefix}{number}.ppm": number for number in range(count)}


def test_rows_hold_in_another_folder_and_the_store_records_it(
    old: Path, new: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(old, out)
    before = files_of(out)
    shutil.rmtree(old)
    report = run(new, out)
    assert (report.resumed, report.store.root) == (IMAGES, str(new))
    (message,) = caplog.messages
    assert message.endswith(f"now in {str(new)!r}; 10 of 10 images with rows hold")
    after = files_of(out)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"store.json", "history.jsonl"}
    assert_rows(out, numbers())
    caplog.clear()
    assert run(new, out).resumed == IMAGES
    assert (files_of(out), caplog.messages) == (after, [])


def test_new_images_are_added_in_another_folder(old: Path, new: Path, out: Path) -> None:
    run(old, out)
    write(new / "11.ppm", 11)
    (new / "3.ppm").unlink()
    (store,) = run(new, out).stores
    assert (store.added, store.changed) == (1, 0)
    assert set(numbers()) - {"3.ppm"} | {"11.ppm"} <= set(FeatureStore.open(out).paths)


def test_ninety_percent_of_the_images_are_enough(old: Path, new: Path, out: Path) -> None:
    run(old, out)
    before = files_of(out)
    for number in (4, 5):
        write(new / f"{number}.ppm", number + 7)
    with pytest.raises(
        StoreError,
        match=r"made from images in '.*old'; 8 of 10 images with rows are unchanged in '.*new', "
        r"expected 90%; compare contents with --check content, accept it with --new-root, or",
    ):
        run(new, out)
    assert files_of(out) == before
    write(new / "5.ppm", 5)
    (store,) = run(new, out).stores
    assert (store.added, store.changed) == (1, 1)
    assert_rows(out, numbers() | {"4.ppm": 11})


def test_new_root_accepts_a_folder_with_few_of_the_images(old: Path, new: Path, out: Path) -> None:
    run(old, out)
    for number in range(6):
        write(new / f"{number}.ppm", number + IMAGES)
    report = run(new, out, new_root=True)
    assert (report.resumed, report.store.root) == (4, str(new))
    assert_rows(out, numbers() | {f"{number}.ppm": number + IMAGES for number in range(6)})
    assert run(new, out).resumed == IMAGES


def test_content_decides_where_times_changed(old: Path, new: Path, out: Path) -> None:
    run(old, out)
    touch(new, numbers())
    with pytest.raises(StoreError, match=r"0 of 10 images .* --check content"):
        run(new, out)
    report = run(new, out, check="content")
    assert (report.resumed, report.store.root) == (IMAGES, str(new))
    write(new / "0.ppm", 1)
    write(new / "1.ppm", 2)
    shutil.move(new, old.parent / "moved")
    with pytest.raises(StoreError, match=r"8 of 10 images .* expected 90%; accept it with"):
        run(old.parent / "moved", out, check="content")


def test_refusal_names_the_common_folder_of_several_inputs(
    old: Path, tmp_path: Path, out: Path
) -> None:
    run(old, out)
    write(tmp_path / "more" / "11.ppm", 11)
    with pytest.raises(
        StoreError, match=r"0 of 10 images .* deepest folder that holds all inputs.*--new-root"
    ):
        run([old, tmp_path / "more"], out)


def test_list_from_another_folder_names_the_same_images(
    old: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listed() -> ImageList:
        return read_list(io.BytesIO(b"\n".join(os.fsencode(old / name) for name in numbers())))

    monkeypatch.chdir(tmp_path)
    run(listed(), out)
    before = files_of(out)
    monkeypatch.chdir("/")
    assert listed().root == b"/"
    assert run(listed(), out).resumed == IMAGES
    monkeypatch.chdir(old)
    assert run(listed(), out).resumed == IMAGES
    assert files_of(out) == before
    assert_rows(out, numbers(prefix="old/"))
    write(old / "11.ppm", 11)
    run(old, out)
    assert_rows(out, {**numbers(prefix="old/"), "old/11.ppm": 11})


def test_part_of_the_images_is_refused_as_the_whole(old: Path, tmp_path: Path, out: Path) -> None:
    write(tmp_path / "old" / "below" / "11.ppm", 11)
    run(old, out)
    with pytest.raises(StoreError, match=r"0 of 11 images .* deepest folder"):
        run(old / "below", out)


def test_linked_folder_has_the_same_images(old: Path, tmp_path: Path, out: Path) -> None:
    run(old, out)
    (tmp_path / "link").symlink_to(old)
    report = run(tmp_path / "link", out)
    assert (report.resumed, report.store.root) == (IMAGES, str(tmp_path / "link"))


def test_single_image_is_found_in_another_folder(old: Path, new: Path, out: Path) -> None:
    run(old / "1.ppm", out)
    assert run(new / "1.ppm", out).resumed == 1
    with pytest.raises(StoreError, match=r"0 of 1 image with rows"):
        run(old / "2.ppm", out)


@pytest.mark.parametrize("extended", [False, True])
def test_interrupted_run_resumes_in_another_folder(
    old: Path, new: Path, out: Path, tmp_path: Path, extended: bool
) -> None:
    if extended:
        for number in range(3, IMAGES):
            (old / f"{number}.ppm").unlink()
        run(old, out)
        shutil.rmtree(old)
        shutil.copytree(new, old)
    with pytest.raises(InterruptedRunError, match="stopped"):
        run(old, out, stop=stop_after(2))
    done = 4 + 3 * extended
    with pytest.raises(InterruptedRunError, match="stopped"):
        run(new, out, stop=stop_after(1))
    assert json.loads((out / STAGING / JOB).read_bytes())["root"] == str(new)
    shutil.rmtree(old)
    report = run(new, out)
    assert (report.resumed, report.store.root) == (done + 2, str(new))
    assert_rows(out, numbers())
    run(new, tmp_path / "whole")
    if not extended:
        for name in ("features/00000.npy", "features/00001.npy", "images/00002.parquet"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_accepted_root_of_an_interrupted_run_stays_accepted(
    old: Path, new: Path, out: Path
) -> None:
    run(old, out)
    for name, number in numbers().items():
        write(new / name, number + IMAGES)
    with pytest.raises(InterruptedRunError, match="stopped"):
        run(new, out, new_root=True, stop=stop_after(1))
    assert run(new, out).resumed == 2
    assert_rows(out, {name: number + IMAGES for name, number in numbers().items()})


def test_interrupted_run_of_other_images_is_refused(old: Path, new: Path, out: Path) -> None:
    with pytest.raises(InterruptedRunError, match="stopped"):
        run(old, out, stop=stop_after(2))
    touch(new, numbers())
    with pytest.raises(StoreError, match="0 of 4 images with rows are unchanged"):
        run(new, out)
    assert run(new, out, overwrite=True).resumed == 0
    assert_rows(out, numbers())


@pytest.fixture
def named_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that a name loads: ``mean`` and ``small``."""
    sizes = {"mean": (24, 32), "small": (8, 8)}
    monkeypatch.setattr(embedding, "load", lambda name, *_: mean_pixel(size=sizes[name]))


@pytest.mark.usefixtures("named_models")
def test_each_of_several_stores_follows(old: Path, new: Path, out: Path) -> None:
    extract(old, ["mean", "small"], out)
    extract(new, "small", out / "small")
    report = extract(new, ["mean", "small"], out)
    assert report.resumed == IMAGES
    assert [store.store.root for store in report.stores] == [str(new)] * 2


@pytest.mark.usefixtures("named_models")
def test_images_below_the_root_of_a_store_need_no_model(
    old: Path, new: Path, out: Path, tmp_path: Path
) -> None:
    whole = list_images([old, tmp_path])
    extract(whole, "mean", out, device="cpu")
    paths = [os.path.basename(path) for path in whole.paths if path.startswith(b"old/")]
    assert (whole.root, len(paths)) == (os.fsencode(tmp_path), IMAGES)
    shutil.rmtree(tmp_path / "mnt")
    extract(tmp_path, "mean", out, device="cpu")
    below = ImageList(os.fsencode(old), paths)
    report = up_to_date_report(below, ["mean"], str(out), Options(device="cpu"))
    assert report is not None
    assert report.resumed == IMAGES
    moved = ImageList(os.fsencode(new), paths)
    assert up_to_date_report(moved, ["mean"], str(out), Options(device="cpu")) is None
