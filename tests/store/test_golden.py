"""Stores of an earlier program open, verify, extend, compact and resume (``golden/README.md``)."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from extractor import FeatureStore, Report, extract, transform_store
from extractor.store.failures import failure_lines, read_failures
from extractor.store.format import STAGING, Manifest, with_checksum
from extractor.store.job import Job
from extractor.store.journal import BatchEntry
from extractor.store.shard import FinishedShard
from extractor.upkeep.compact import compact
from extractor.upkeep.verify import verify, verify_images

GOLDEN = Path(__file__).parent / "golden"
STORE = GOLDEN / "store"
INTERRUPTED = GOLDEN / "interrupted"
STORE_2 = GOLDEN / "store-2"  # of format version 2
INTERRUPTED_2 = GOLDEN / "interrupted-2"
TRANSFORMED = GOLDEN / "transformed"

# Color and modification time, in seconds, of every image of the finished store; 4.ppm is no image.
COLORS = {
    "0.ppm": ((0, 0, 0), 1000),
    "1.ppm": ((200, 100, 50), 2001),
    "2.ppm": ((20, 40, 60), 1002),
    "3.ppm": ((30, 60, 90), 1003),
    "5.ppm": ((50, 100, 150), 1005),
}
# Those that the interrupted run was to add, in the order of their names.
ADDED = {f"{i:02d}.ppm": ((10 * i, 20 * i, 5 * i), 1000 + i) for i in range(6, 11)}
ROWS = ["0.ppm", "2.ppm", "3.ppm", "5.ppm", "1.ppm"]  # 1.ppm changed and has a new row, the last


def embedding(name: str) -> list[float]:
    """What the network makes of a one-color image after the normalization of ImageNet."""
    color, _ = {**COLORS, **ADDED}[name]
    channels = zip(color, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (1, 2, 4), strict=True)
    return [(level / 255 - mean) / std * scale for level, mean, std, scale in channels]


def assert_holds(store: FeatureStore, names: list[str]) -> None:
    assert store.paths == names
    np.testing.assert_allclose(store.features, [embedding(name) for name in names], atol=1e-4)
    assert [failure["path"] for failure in store.failures] == ["4.ppm"]


def write_images(folder: Path, images: dict[str, tuple[tuple[int, int, int], int]]) -> None:
    for name, (color, seconds) in images.items():
        (folder / name).write_bytes(b"P6 8 8 255\n" + bytes(color) * 64)
        os.utime(folder / name, ns=(0, seconds * 10**9))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """The images of the finished store, byte by byte."""
    folder = tmp_path / "photos"
    folder.mkdir()
    write_images(folder, COLORS)
    (folder / "4.ppm").write_bytes(b"not an image")
    os.utime(folder / "4.ppm", ns=(0, 1004 * 10**9))
    return folder


def adopt(content: dict[str, Any], photos: Path) -> None:
    """Put in the folder of the images, which differs from machine to machine."""
    content["root"] = str(photos)


@pytest.fixture
def old(tmp_path: Path, photos: Path) -> Path:
    """A copy of the finished store that takes itself for one of this machine."""
    out = tmp_path / "out"
    shutil.copytree(STORE, out)
    content = json.loads((out / "store.json").read_bytes())
    adopt(content, photos)
    content["checksum"] = ""
    (out / "store.json").write_text(with_checksum(json.dumps(content, indent=2) + "\n"))
    return out


@pytest.fixture
def interrupted(old: Path, photos: Path) -> Path:
    """The store with the staging folder of the run that was killed, and that run's images."""
    write_images(photos, ADDED)
    shutil.copytree(INTERRUPTED, old / STAGING)
    job = json.loads((old / STAGING / "job.json").read_bytes())
    adopt(job, photos)
    job["base"] = json.loads((old / "store.json").read_bytes())["checksum"]
    (old / STAGING / "job.json").write_text(json.dumps(job) + "\n")
    return old


def run_again(photos: Path, out: Path) -> Report:
    return extract(
        photos,
        f"{GOLDEN / 'network.py'}:mean_color",
        out,
        device="cpu",
        precision="float32",
        compile="off",
        decode="exact",
        shard_images=3,
        batch_size=1,
        threads=1,
    )


# Ids of the rows, and the tokens of the states, of the store of version 2.
IDS_2 = {"0.ppm": 0, "1.ppm": 6, "2.ppm": 2, "3.ppm": 3, "5.ppm": 4, "06.ppm": 7}
TOKENS_2 = {
    "50f5492a28ea3592c7fafa53ba0a08f4c98370c06d87fbe209b22e060a1633da": ([6, 7], [1], [[1, 6]]),
    "c275e636dc6a3ad33bbfabbc975090def310e2fdf5c6150a766f6e09dac04f29": ([7], [], []),
    "8039f9a4b5194bc955c2a792cf47ac166a33a2203fad5a867adfba98ecea0058": ([7], [], []),
    "cdc2c7c54a8db650b1775bd92386966bde56a9a7787313b82cacfbb707cb657b": ([], [], []),
}


@pytest.fixture
def old_2(tmp_path: Path, photos: Path) -> Path:
    """A copy of the finished store of version 2, and its images."""
    write_images(photos, {"06.ppm": ADDED["06.ppm"]})
    out = tmp_path / "out"
    shutil.copytree(STORE_2, out)
    content = json.loads((out / "store.json").read_bytes())
    adopt(content, photos)
    content["checksum"] = ""
    (out / "store.json").write_text(with_checksum(json.dumps(content, indent=2) + "\n"))
    return out


def ids_of(out: Path) -> dict[str, int]:
    store = FeatureStore.open(out)
    return dict(zip(store.paths, store.ids.tolist(), strict=True))


def test_store_of_version_2_opens_with_its_ids_and_history() -> None:
    store = FeatureStore.open(STORE_2)
    assert_holds(store, list(IDS_2))
    assert store.ids.tolist() == list(IDS_2.values())
    assert store.manifest.next_id == 8
    for token, (added, removed, changed) in TOKENS_2.items():
        changes = store.changes_since(token)
        assert changes.added.tolist() == added
        assert changes.removed.tolist() == removed
        assert changes.changed.tolist() == changed
    assert list(verify(STORE_2)) == []
    text = (STORE_2 / "store.json").read_text("ascii")
    assert Manifest.from_json(text, "store.json").to_json() == text
    job = (INTERRUPTED_2 / "job.json").read_bytes()
    assert Job.from_json(job).to_json().encode() == job


def test_store_of_version_2_extends_and_compacts(old_2: Path, photos: Path) -> None:
    write_images(photos, {"10.ppm": ADDED["10.ppm"]})
    assert run_again(photos, old_2).resumed == 7
    assert ids_of(old_2) == {**IDS_2, "10.ppm": 8}
    compact(old_2)
    assert ids_of(old_2) == {**IDS_2, "10.ppm": 8}
    assert list(verify(old_2)) == []


def test_interrupted_run_of_version_2_resumes(old_2: Path, photos: Path) -> None:
    write_images(photos, ADDED)
    shutil.copytree(INTERRUPTED_2, old_2 / STAGING)
    job = json.loads((old_2 / STAGING / "job.json").read_bytes())
    adopt(job, photos)
    job["base"] = json.loads((old_2 / "store.json").read_bytes())["checksum"]
    (old_2 / STAGING / "job.json").write_text(json.dumps(job) + "\n")
    assert run_again(photos, old_2).resumed == 8  # three images were left to do
    expected = {**IDS_2, "07.ppm": 8, "08.ppm": 9, "09.ppm": 10, "10.ppm": 11}
    assert ids_of(old_2) == expected
    assert_holds(FeatureStore.open(old_2), list(expected))
    assert list(verify(old_2)) == []


def test_old_store_has_the_same_ids_after_its_upgrade(old: Path, photos: Path) -> None:
    before = FeatureStore.open(old)
    assert before.ids.tolist() == [0, 2, 3, 4, 5]  # row 1 is retired
    assert (before.manifest.version, before.manifest.next_id) == (1, 6)
    assert not before.changes_since(before.token)
    write_images(photos, {"10.ppm": ADDED["10.ppm"]})
    run_again(photos, old)
    store = FeatureStore.open(old)
    assert (store.manifest.version, store.manifest.next_id) == (2, 7)
    assert store.ids.tolist() == [0, 2, 3, 4, 5, 6]
    changes = store.changes_since(before.token)
    assert (changes.added.tolist(), changes.removed.tolist()) == ([6], [])


def test_old_store_keeps_its_ids_if_it_is_compacted(old: Path) -> None:
    before = ids_of(old)
    token = FeatureStore.open(old).token
    compact(old)
    assert ids_of(old) == before
    assert FeatureStore.open(old).manifest.next_id == 6
    assert not FeatureStore.open(old).changes_since(token)


def test_old_store_opens() -> None:
    assert_holds(FeatureStore.open(STORE), ROWS)


def test_old_store_verifies(old: Path) -> None:
    assert list(verify(STORE)) == []
    assert list(verify(old)) == []
    assert list(verify_images(old)) == []


def test_old_files_are_written_the_same_today() -> None:
    text = (STORE / "store.json").read_text("ascii")
    assert Manifest.from_json(text, "store.json").to_json() == text
    assert failure_lines(read_failures(STORE / "failures.jsonl")) == (
        (STORE / "failures.jsonl").read_bytes()
    )
    job = (INTERRUPTED / "job.json").read_bytes()
    assert Job.from_json(job).to_json().encode() == job
    done = (INTERRUPTED / "journal/00003.done").read_bytes()
    assert FinishedShard.from_json(done).to_json().encode() == done
    line = (INTERRUPTED / "journal/00004.jsonl").read_bytes()
    assert BatchEntry.from_line(line).to_line() == line


def test_old_store_extends(old: Path, photos: Path) -> None:
    before = {path: path.read_bytes() for path in old.glob("*/*")}
    write_images(photos, {"10.ppm": ADDED["10.ppm"]})
    report = run_again(photos, old)
    assert (report.images, report.resumed) == (7, 6)
    assert_holds(FeatureStore.open(old), [*ROWS, "10.ppm"])
    assert {path: path.read_bytes() for path in before} == before
    assert list(verify(old)) == []


def test_old_store_without_new_images_is_up_to_date(old: Path, photos: Path) -> None:
    manifest = (old / "store.json").read_bytes()
    report = run_again(photos, old)
    assert (report.images, report.resumed) == (6, 6)
    assert (old / "store.json").read_bytes() == manifest


def test_old_store_compacts(old: Path) -> None:
    before, after = compact(old)
    assert (before.retired, len(before.shards)) == (1, 3)
    assert (after.retired, len(after.shards)) == (0, 2)
    assert_holds(FeatureStore.open(old), sorted(COLORS))
    assert list(verify(old)) == []


def test_old_interrupted_run_resumes(interrupted: Path, photos: Path) -> None:
    assert_holds(FeatureStore.open(interrupted), ROWS)
    report = run_again(photos, interrupted)
    assert (report.images, report.resumed) == (11, 10)  # one image was left to do
    assert_holds(FeatureStore.open(interrupted), [*ROWS, *ADDED])
    features = (interrupted / "features/00003.npy").read_bytes()
    assert features == (INTERRUPTED / "features/00003.npy").read_bytes()
    assert FeatureStore.open(interrupted).ids.tolist() == [0, 2, 3, 4, 5, *range(6, 11)]
    assert list(verify(interrupted)) == []
    assert not (interrupted / STAGING).exists()


def test_transformed_store_holds_what_the_documentation_says() -> None:
    rows = np.array([embedding(name) for name in ROWS])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    mean, components, scales = (
        np.load(TRANSFORMED / f"transform_{name}.npy") for name in ("mean", "components", "scales")
    )
    np.testing.assert_allclose(mean, rows.mean(0), atol=1e-6)
    rows = (rows - mean) @ components.T * scales
    np.testing.assert_allclose(rows.var(0, ddof=1), [1, 1], rtol=1e-3)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    store = FeatureStore.open(TRANSFORMED)
    assert store.paths == ROWS
    np.testing.assert_allclose(store.features, rows, atol=1e-3)
    assert list(verify(TRANSFORMED)) == []
    text = (TRANSFORMED / "store.json").read_text("ascii")
    assert Manifest.from_json(text, "store.json").to_json() == text


def test_transformed_store_is_still_that_of_its_source(tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(TRANSFORMED, out)
    assert not transform_store(STORE, out).is_changed
    compact(out)
    assert FeatureStore.open(out).paths == sorted(ROWS)
    assert list(verify(out)) == []
