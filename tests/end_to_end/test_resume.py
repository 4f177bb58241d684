"""A run that was stopped, killed or failed resumes, and its store equals an undisturbed one."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.callbacks import computed
from support.callbacks import stop_after as after
from support.commands import WarmProcess, run_python
from support.networks import mean_pixel
from support.pictures import noise
from support.stores import content

from extractor import FeatureStore, extract
from extractor.api import Progress
from extractor.errors import InterruptedRunError, StoreError
from extractor.models import embedding
from extractor.options import Options
from extractor.store.failures import FailureRecord
from extractor.store.index import ImageRecord
from extractor.store.journal import BatchEntry
from extractor.upkeep.verify import verify

KILLS = int(os.environ.get("EXTRACTOR_TEST_KILLS", "3"))


@pytest.fixture(autouse=True)
def mean_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(model: str, options: Options, *_: object) -> object:
        return mean_pixel(size=(24, 32) if model == "mean" else (16, 16))

    monkeypatch.setattr(embedding, "load", load)


def without_ids(files: dict[str, Any]) -> dict[str, Any]:
    """The same files without ids, which go on counting when a store is replaced."""
    manifest = {key: value for key, value in files["store.json"].items() if key != "next_id"}
    shards = [{**shard, "first_id": 0} for shard in manifest["shards"]]
    others = {name: files[name] for name in files if name != "history.jsonl"}
    return {**others, "store.json": {**manifest, "shards": shards}}


@pytest.mark.parametrize("bad", [[], [0], [4, 5, 6, 7], [10]])
@pytest.mark.parametrize("shard_images", [3, 4, 100])
def test_resumed_store_equals_undisturbed_store(
    photos: Path, tmp_path: Path, bad: list[int], shard_images: int
) -> None:
    files = sorted(path for path in photos.rglob("*") if path.is_file())
    for index in bad:
        files[index].write_text("bad")
    settings: dict[str, Any] = {"batch_size": 2, "shard_images": shard_images}
    extract(photos, "mean", tmp_path / "undisturbed", **settings)
    expected = content(tmp_path / "undisturbed")
    out = tmp_path / "out"
    for batches in range(1, 20):  # each run does one batch more than the one before it
        try:
            report = extract(photos, "mean", out, **settings, stop=after(batches))
            break
        except InterruptedRunError:
            assert not (out / "store.json").exists()
    assert batches > 1
    assert report.failed == len(bad)
    assert content(out) == expected


@pytest.mark.parametrize("batches", [5, 6])
@pytest.mark.parametrize("is_there", [True, False])
def test_shard_lost_in_a_power_cut_costs_no_later_row(
    photos: Path, tmp_path: Path, batches: int, is_there: bool
) -> None:
    settings: dict[str, Any] = {"batch_size": 1, "shard_images": 3}
    extract(photos, "mean", tmp_path / "undisturbed", **settings)
    out = tmp_path / "out"
    with pytest.raises(InterruptedRunError, match=f"stopped after {batches} of 11 images"):
        extract(photos, "mean", out, **settings, stop=after(batches))
    features = out / ".extractor-partial" / "features"
    if is_there:  # its name was not on the disk yet
        os.replace(features / "00000.npy", features / "00000.npy.partial")
    else:
        (features / "00000.npy").unlink()
    extract(photos, "mean", out, **settings)
    assert content(out) == content(tmp_path / "undisturbed")


def test_resumed_run_skips_finished_images(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError, match="stopped after 4 of 11 images"):
        extract(photos, "mean", tmp_path / "out", batch_size=2, stop=after(2))
    updates: list[Progress] = []
    report = extract(photos, "mean", tmp_path / "out", batch_size=2, progress=updates.append)
    assert computed(updates) == [4, 6, 8, 10, 11]
    assert report.resumed == 4
    updates.clear()
    again = extract(photos, "mean", tmp_path / "out", batch_size=2, progress=updates.append)
    assert again.resumed == again.images == 11
    assert again.rows == 11
    assert computed(updates) == [11]  # nothing was computed


def test_several_stores_resume_together(photos: Path, tmp_path: Path) -> None:
    models = ["mean", "small"]
    extract(photos, models, tmp_path / "undisturbed", batch_size=2, shard_images=4)
    with pytest.raises(InterruptedRunError, match="stopped after 6"):
        extract(photos, models, tmp_path / "out", batch_size=2, shard_images=4, stop=after(3))
    # One of them alone goes on, and is finished before the other.
    extract(photos, ["small"], tmp_path / "out/small", batch_size=2, shard_images=4)
    extract(photos, models, tmp_path / "out", batch_size=2, shard_images=4)
    for model in models:
        assert content(tmp_path / "out" / model) == content(tmp_path / "undisturbed" / model)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda photos: {"batch_size": 3}, r"computation.batch_size: 2 there, 3 now"),
        (lambda photos: {"dtype": "float16"}, r'embedding.dtype: "float32" there, "float16" now'),
        (lambda photos: {"normalize": True}, r"embedding.normalized: false there, true now"),
        (lambda photos: {"shard_images": 9}, r"shard_images: 1024 there, 9 now"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_changed_options_are_refused_and_never_mixed(
    photos: Path,
    tmp_path: Path,
    change: Callable[[Path], dict[str, Any] | None],
    match: str,
    finished: bool,
) -> None:
    out = tmp_path / "out"
    settings: dict[str, Any] = {"batch_size": 2}
    if finished:
        extract(photos, "mean", out, **settings)
    else:
        with pytest.raises(InterruptedRunError, match="stopped after 8"):
            extract(photos, "mean", out, **settings, stop=after(4))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    settings |= change(photos) or {}
    with pytest.raises(StoreError, match=rf"{match}.*--overwrite"):
        extract(photos, "mean", out, **settings)
    left = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    lock = out / ".extractor-partial/lock"
    assert {p: b for p, b in left.items() if p != lock} == {
        p: b for p, b in before.items() if p != lock
    }
    extract(photos, "mean", out, **settings, overwrite=True)
    extract(photos, "mean", tmp_path / "anew", **settings)
    assert without_ids(content(out)) == without_ids(content(tmp_path / "anew"))


def noise_file(path: Path) -> None:
    noise(1, 9, 9).save(path)


@pytest.mark.parametrize("shard_images", [3, 100])
@pytest.mark.parametrize("finished", [False, True])
def test_resumed_run_computes_only_changed_images(
    photos: Path, tmp_path: Path, finished: bool, shard_images: int
) -> None:
    out = tmp_path / "out"
    settings: dict[str, Any] = {"batch_size": 2, "shard_images": shard_images}
    if finished:
        extract(photos, "mean", out, **settings)
    else:
        with pytest.raises(InterruptedRunError, match=r"stopped after [56] of 11"):
            extract(photos, "mean", out, **settings, stop=after(3))
    done = 11 if finished else 6 if shard_images == 100 else 5
    noise_file(photos / "00.png")
    noise_file(photos / "000.png")
    gone = sorted(path for path in photos.rglob("*") if path.is_file())[3]
    gone.unlink()
    updates: list[Progress] = []
    report = extract(photos, "mean", out, **settings, progress=updates.append)
    assert (report.resumed, computed(updates)[0]) == (done - 2, done - 2)
    assert (report.stores[0].changed, report.stores[0].gone) == (1, 1)
    extract(photos, "mean", tmp_path / "anew", **settings)
    store, anew = (FeatureStore.open(folder) for folder in (out, tmp_path / "anew"))
    assert len(store) == len(anew) == 11
    for path in anew.paths:
        assert np.array_equal(store[store.index_of(path)], anew[anew.index_of(path)]), path
    assert not list(verify(out))
    assert store.manifest.listing == anew.manifest.listing
    extract(photos, "mean", out, **settings, overwrite=True)
    assert without_ids(content(out)) == without_ids(content(tmp_path / "anew"))


@pytest.mark.parametrize("cut", [1, 5, 12, 40, 200])
@pytest.mark.parametrize("what", ["features/00000.npy.partial", "journal/00000.jsonl"])
def test_torn_tail_costs_only_its_batch(photos: Path, tmp_path: Path, what: str, cut: int) -> None:
    extract(photos, "mean", tmp_path / "undisturbed", batch_size=2)
    with pytest.raises(InterruptedRunError, match="stopped after 8"):
        extract(photos, "mean", tmp_path / "out", batch_size=2, stop=after(4))
    torn = tmp_path / "out/.extractor-partial" / what
    os.truncate(torn, max(torn.stat().st_size - cut, 0))
    report = extract(photos, "mean", tmp_path / "out", batch_size=2)
    assert report.resumed in (0, 2, 4, 6)
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


@pytest.mark.parametrize("what", ["features/00000.npy.partial", "journal/00000.jsonl"])
def test_damaged_batch_is_recomputed(photos: Path, tmp_path: Path, what: str) -> None:
    extract(photos, "mean", tmp_path / "undisturbed", batch_size=2)
    rng = random.Random(0)
    for turn in range(20):
        out = tmp_path / f"out{turn}"
        with pytest.raises(InterruptedRunError, match="stopped after 8"):
            extract(photos, "mean", out, batch_size=2, stop=after(4))
        damaged = out / ".extractor-partial" / what
        data = bytearray(damaged.read_bytes())
        offset = rng.randrange(128, len(data)) if "npy" in what else data.index(b"\n") - 5
        data[offset] ^= 1 << rng.randrange(8)
        damaged.write_bytes(data)
        extract(photos, "mean", out, batch_size=2)
        assert content(out) == content(tmp_path / "undisturbed")


# ---------------------------------------------------------------------------------------------
# The real command


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folder of images, some of them bad, and the store of an undisturbed run."""
    home = tmp_path_factory.mktemp("many")
    (home / "in").mkdir()
    for index in range(400):
        path = home / "in" / f"{index:03d}.jpg"
        if index % 50 == 7:
            path.write_text("no image")
        else:
            noise(index, 60, 50).save(path)
    done = run_python(*arguments(home, "undisturbed"))
    assert done.returncode == 3, done.stderr
    return home / "in", home / "undisturbed"


def has_lock(process: int, out: Path) -> bool:
    lock = out / ".extractor-partial/lock"
    return lock.exists() and f"process {process} " in lock.read_text()


def arguments(home: Path, out: str) -> list[str]:
    model = ["-m", "torchvision:squeezenet1_1", "--weights", "random", "--device", "cpu"]
    sizes = ["-b", "4", "--shard-images", "50", "--image-size", "160"]
    command = ["-m", "extractor", *model, *sizes, "--quiet"]
    return [*command, str(home / "in"), "-o", str(home / out)]


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGKILL, id="kill"),
        pytest.param(signal.SIGTERM, id="term", marks=pytest.mark.slow),
    ],
)
def test_repeatedly_killed_run_equals_undisturbed_store(
    many: tuple[Path, Path], number: signal.Signals
) -> None:
    home = many[0].parent
    rng = random.Random(number)
    midway = stores = 0
    while midway < KILLS:  # a store takes some of them, and then the next one begins
        stores += 1
        assert stores <= KILLS, "no run was ended before it was done"
        out = home / f"out-{number.name}-{stores}"
        while (code := signaled_run(home, out, number, rng, midway < KILLS)) != 3:
            # SIGTERM before the command has begun to listen ends it as it ends any process.
            assert code in (-number, 143 if number is signal.SIGTERM else -number)
            midway += not (out / "store.json").exists()
        assert content(out) == content(many[1])


def signaled_run(
    home: Path, out: Path, number: signal.Signals, rng: random.Random, is_signaled: bool
) -> int:
    """Run the command, signal it at a random moment of its work, and return its exit code."""
    with WarmProcess(arguments(home, out.name)) as run:
        if is_signaled:
            while run.poll() is None and not has_lock(run.pid, out):
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.5))
            run.send_signal(number)
        code = run.wait()
    assert "Traceback" not in run.errors()
    return code


def test_undisturbed_store_has_distinct_rows(many: tuple[Path, Path]) -> None:
    features = np.load(many[1] / "features/00000.npy")
    assert features.shape == (49, 512)
    assert len(np.unique(features, axis=0)) == 49


@pytest.mark.parametrize(
    "line",
    [
        b'{"records": [], "failures": [], "checksum": Infinity}\n',
        b"[" * 100_000 + b"\n",
        b'{"records": [1], "failures": [], "checksum": 0}\n',
        b"{}\n",
    ],
)
def test_damaged_journal_line_is_a_value_error(line: bytes) -> None:
    with pytest.raises(ValueError, match="damaged line"):
        BatchEntry.from_line(line)


@pytest.mark.parametrize("path", [b"a b.jpg", b'\xff"\\\n.jpg', "\u00e9\U0001f600".encode(), b""])
def test_journal_line_holds_any_path(path: bytes) -> None:
    record = ImageRecord(path, 1, -2, 3, 4, bytes(range(32)))
    failure = FailureRecord(path, "damaged", 'a "word"\n')
    line = BatchEntry((record, record._replace(sha256=b"")), (failure,), 7).to_line()
    assert line.count(b"\n") == 1
    again = BatchEntry.from_line(line)
    assert [*again.records] == [record, record._replace(sha256=b"")]
    assert ([*again.failures], again.checksum) == ([failure], 7)
