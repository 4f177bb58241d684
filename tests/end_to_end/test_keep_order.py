"""``--keep-order``: the row of each line of a list, for labels that stand beside it."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.callbacks import stop_after
from support.networks import mean_pixel, normalized

from extractor import FeatureStore, Report, extract
from extractor.errors import InterruptedRunError, StoreError, UsageError
from extractor.images.listing import ImageList, read_list
from extractor.models import embedding
from extractor.options import Options
from extractor.run.up_to_date import up_to_date_report
from extractor.store.format import LIST_ROWS
from extractor.upkeep.compact import compact
from extractor.upkeep.verify import verify

# Lines of a list: in no order, with a duplicate, empty lines, a broken and a missing image.
LINES = ["7", "2", "", "broken", "5", "7", "missing", "\r", "0"]
NAMES = [line for line in LINES if line.strip()]


@pytest.fixture(autouse=True)
def mean_model(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"mean": (4, 4), "other": (8, 8)}
    monkeypatch.setattr(embedding, "load", lambda name, *_: mean_pixel(size=sizes[name]))


def color(number: int) -> tuple[int, int, int]:
    return 20 * number, 5 * number, 250 - 20 * number


def write(path: Path, number: int, seconds: int = 1_700_000_000) -> None:
    path.write_bytes(b"P6 4 4 255\n" + bytes(color(number)) * 16)
    os.utime(path, ns=(0, seconds * 10**9))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(8):
        write(folder / str(number), number)
    (folder / "broken").write_bytes(b"P6 4 4 255\nshort")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def listed(folder: Path, lines: list[str]) -> ImageList:
    text = "\n".join(str(folder / line) if line.strip() else line for line in lines)
    return read_list(io.BytesIO(text.encode()))


def run(folder: Path, lines: list[str], out: Path, **options: Any) -> Report:
    options = {"keep_order": True, "shard_images": 3, "batch_size": 2} | options
    return extract(listed(folder, lines), "mean", out, **options)


def assert_in_order(out: Path, lines: list[str], changed: dict[str, int] | None = None) -> None:
    store = FeatureStore.open(out)
    rows = store.list_rows
    numbers = {name: int(name) for name in store.paths} | (changed or {})
    expected = [store.paths.index(line) if line in store.paths else -1 for line in lines]
    assert rows.dtype == np.int64
    assert rows.tolist() == expected
    np.testing.assert_allclose(
        store.features[rows[rows >= 0]],
        [normalized(color(numbers[line])) for line in lines if line in numbers],
        atol=1e-5,
    )
    assert list(verify(out)) == []


def files_of(out: Path) -> dict[str, bytes]:
    files = [path for path in out.rglob("*") if path.is_file() and path.name != "run.json"]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def test_list_rows_follow_the_lines_of_the_list(photos: Path, out: Path) -> None:
    run(photos, LINES, out)
    store = FeatureStore.open(out)
    assert store.paths == ["0", "2", "5", "7"]
    assert store.list_rows.tolist() == [3, 1, -1, 2, 3, -1, 0]
    assert_in_order(out, NAMES)
    assert np.load(out / "list_rows.npy").tolist() == store.list_rows.tolist()


def test_labels_beside_a_list_meet_their_rows(photos: Path, out: Path) -> None:
    labels = np.array([0.7, 0.2, -1, 0.5, 0.7, -1, 0.0])  # one per line that is not empty
    run(photos, LINES, out)
    store = FeatureStore.open(out)
    rows = store.list_rows
    features, kept = store.features[rows[rows >= 0]], labels[rows >= 0]
    red = [normalized((round(200 * label), 0, 0))[0] for label in kept]
    np.testing.assert_allclose(features[:, 0], red, atol=1e-5)


def test_each_run_rewrites_the_rows_of_its_list(photos: Path, out: Path) -> None:
    run(photos, LINES, out)
    before = files_of(out)
    assert run(photos, LINES, out).resumed == 6
    assert files_of(out) == before
    assert run(photos, LINES[::-1], out).resumed == 6
    assert_in_order(out, NAMES[::-1])
    changed = {name for name, content in files_of(out).items() if before[name] != content}
    assert changed == {"store.json", "history.jsonl", LIST_ROWS}
    write(photos / "2", 6, 1_700_000_001)
    report = run(photos, [*NAMES, "3", "2"], out)
    assert report.stores[0].added == 2
    assert FeatureStore.open(out).paths == ["0", "5", "7", "2", "3"]
    assert_in_order(out, [*NAMES, "3", "2"], {"2": 6})


def test_run_that_does_not_keep_the_order_leaves_no_stale_rows(photos: Path, out: Path) -> None:
    run(photos, LINES, out)
    before = files_of(out)
    run(photos, LINES, out, keep_order=False)
    assert files_of(out) == before  # nothing changed, so the rows still hold
    run(photos, [*LINES, "1"], out, keep_order=False)
    assert not (out / LIST_ROWS).exists()
    assert list(verify(out)) == []
    with pytest.raises(StoreError, match=r"no rows of a list.*--list FILE --keep-order"):
        FeatureStore.open(out).list_rows  # noqa: B018
    run(photos, LINES, out)
    assert_in_order(out, NAMES)


def test_open_reader_does_not_read_rows_of_another_list(photos: Path, out: Path) -> None:
    run(photos, LINES, out)
    store = FeatureStore.open(out)
    run(photos, LINES[::-1], out)
    with pytest.raises(StoreError, match="was replaced or removed since it was opened"):
        store.list_rows  # noqa: B018
    assert store.paths == ["0", "2", "5", "7"]


def test_compacted_store_keeps_the_order_of_the_list(photos: Path, out: Path) -> None:
    run(photos, LINES, out)
    write(photos / "0", 4, 1_700_000_001)
    run(photos, LINES, out)
    assert FeatureStore.open(out).paths == ["2", "5", "7", "0"]
    assert_in_order(out, NAMES, {"0": 4})
    compact(out)
    assert FeatureStore.open(out).paths == ["0", "2", "5", "7"]
    assert_in_order(out, NAMES, {"0": 4})
    (out / LIST_ROWS).unlink()
    with pytest.raises(StoreError, match=r"list_rows\.npy: is missing"):
        compact(out)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b"short"), "has 5 bytes"),
        (lambda path: np.save(path, np.arange(7)), "content changed"),
    ],
)
def test_damaged_rows_of_a_list_are_found_and_written_again(
    photos: Path, out: Path, damage: Any, problem: str
) -> None:
    run(photos, LINES, out)
    damage(out / LIST_ROWS)
    (found,) = verify(out)
    assert found.startswith(f"list_rows.npy: {problem}")
    run(photos, LINES, out)
    assert_in_order(out, NAMES)


def test_interrupted_run_keeps_the_order_at_its_end(photos: Path, out: Path) -> None:
    with pytest.raises(InterruptedRunError, match="stopped"):
        run(photos, LINES, out, stop=stop_after(1))
    run(photos, LINES, out)
    assert_in_order(out, NAMES)
    run(photos, LINES[::-1], out, overwrite=True)
    assert_in_order(out, NAMES[::-1])


def test_paths_of_the_caller_keep_their_order(photos: Path, out: Path) -> None:
    names = ["7", "2", "broken", "7", "0"]
    extract([photos / name for name in names], "mean", out, keep_order=True)
    assert_in_order(out, names)


def test_folder_has_no_order_to_keep(photos: Path, out: Path) -> None:
    for images in (photos, [photos], [photos / "1", photos]):
        with pytest.raises(UsageError, match=r"keep order: got folders.* --list FILE"):
            extract(images, "mean", out, keep_order=True)
    assert not out.exists()


def test_each_of_several_stores_keeps_the_order(photos: Path, out: Path) -> None:
    run(photos, ["7"], out / "other", shard_images=65_536)
    images = listed(photos, LINES)
    report = extract(images, ["mean", "other"], out / "both", keep_order=True)
    for store in report.stores:
        assert_in_order(store.out, NAMES)


def test_list_that_is_unchanged_needs_no_model(photos: Path, out: Path) -> None:
    options = Options(keep_order=True, shard_images=3, batch_size=2)
    run(photos, LINES, out)
    report = up_to_date_report(listed(photos, LINES), ["mean"], str(out), options)
    assert report is not None
    assert report.rows == 4
    assert up_to_date_report(listed(photos, LINES[::-1]), ["mean"], str(out), options) is None


def test_list_in_another_folder_keeps_its_order(photos: Path, out: Path, tmp_path: Path) -> None:
    run(photos, LINES, out)
    photos.rename(tmp_path / "moved")
    run(tmp_path / "moved", LINES[::-1], out)
    assert_in_order(out, NAMES[::-1])
