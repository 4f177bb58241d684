"""Parts of a job array fill one store together: the store that a single run makes."""

from __future__ import annotations

import fcntl
import itertools
import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.commands import WarmProcess, run_extract
from support.networks import mean_pixel
from support.pictures import noise
from support.stores import content

import extractor.parts.session as parts_module
import extractor.run.session as session_module
import extractor.store.writer as writer_module
from extractor import FeatureStore, extract
from extractor.errors import (
    InterruptedRunError,
    SourceError,
    StoreBusyError,
    StoreError,
    UsageError,
)
from extractor.images.listing import ImageList, list_images
from extractor.lease.parts import Part
from extractor.loading.crash_log import CrashLog
from extractor.models import embedding
from extractor.options import Options
from extractor.parts.session import _harvest, _own_folder
from extractor.report import Progress, Report
from extractor.store.format import IN_FLIGHT, JOURNAL, STAGING, WORKERS
from extractor.upkeep.compact import compact
from extractor.upkeep.verify import verify

SIZES: dict[str, Any] = {"shard_images": 3, "batch_size": 2, "workers": 1, "device": "cpu"}
ANY_DEVICE = Options().device
IMAGES = 23  # eight shards, of which the last has two images
BAD = 5


@pytest.fixture
def listings(monkeypatch: pytest.MonkeyPatch) -> list[ImageList]:
    """Lists of images that runs made."""
    made: list[ImageList] = []

    def watched(*arguments: Any, **options: Any) -> ImageList:
        made.append(list_images(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(session_module, "list_images", watched)
    return made


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images of which one is damaged, for models that return their mean pixel."""

    def load(model: str, *_: object) -> object:
        return mean_pixel(size=(8, 8) if model == "mean" else (4, 4))

    monkeypatch.setattr(embedding, "load", load)
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(IMAGES):
        noise(i, 8, 8).save(folder / f"{i:02d}.png")
    (folder / f"{BAD:02d}.png").write_bytes(b"no image")
    return folder


def part(photos: Path, out: Path, which: str, **options: Any) -> Report:
    return extract(photos, "mean", out, part=which, **{**SIZES, **options})


@pytest.fixture
def alone(photos: Path, tmp_path: Path) -> dict[str, object]:
    """Content of the store that a single run makes."""
    extract(photos, "mean", tmp_path / "alone", **SIZES)
    return content(tmp_path / "alone")


def during(batch: int, action: Callable[[], object]) -> Callable[[Progress], None]:
    """Do something once, while a run computes, after some batches."""
    count = itertools.count()

    def progress(progress: Progress) -> None:
        if progress.phase == "computing" and next(count) == batch:
            action()

    return progress


@pytest.mark.parametrize("order", [(1, 2, 3, 4), (3, 1, 4, 2), (4, 3, 2, 1)])
def test_parts_in_any_order_make_the_store_of_one_run(
    photos: Path,
    tmp_path: Path,
    alone: dict[str, object],
    listings: list[ImageList],
    order: tuple[int, ...],
) -> None:
    out = tmp_path / "out"
    reports = {number: part(photos, out, f"{number}/4") for number in order}
    assert content(out) == alone
    assert not (out / STAGING).exists()
    assert list(verify(out)) == []
    assert len(listings) == 1  # later parts read the plan
    *early, last = (reports[number] for number in order)
    assert [report.missing_shards for report in early] == [6, 4, 2]
    assert {report.shards for report in reports.values()} == {8}
    assert (last.missing_shards, last.rows, last.failed, last.images) == (0, 22, 1, IMAGES)
    assert last.exit_code == 3
    own = {number: reports[number] for number in order[:-1]}
    assert [own[n].images for n in sorted(own)] == [5 if n == 4 else 6 for n in sorted(own)]
    assert {n: report.exit_code for n, report in own.items()} == {n: 3 * (n == 1) for n in own}
    run = json.loads((out / "run.json").read_text())
    assert run["options"]["part"] == f"{order[-1]}/4"
    assert run["counts"]["rows"] == 22


def test_part_after_the_last_one_finds_the_store_up_to_date(
    photos: Path, tmp_path: Path, alone: dict[str, object]
) -> None:
    out = tmp_path / "out"
    for number in (1, 2):
        part(photos, out, f"{number}/2")
    report = part(photos, out, "2/2")
    assert (report.part, report.resumed, report.rows) == ("2/2", IMAGES, 22)
    assert content(out) == alone
    # What is new is a plan of its own.
    noise(100, 8, 8).save(photos / "new.png")
    report = part(photos, out, "2/2")
    assert (report.rows, report.stores[0].added, report.shards) == (23, 1, 1)
    assert FeatureStore.open(out).paths[-1] == "new.png"


def test_more_parts_than_shards_leave_some_without_work(
    photos: Path, tmp_path: Path, alone: dict[str, object]
) -> None:
    out = tmp_path / "out"
    images = [part(photos, out, f"{number}/11").images for number in range(1, 12)]
    assert images == [0, 3, 3, 0, 3, 3, 3, 0, 3, 3, IMAGES]
    assert content(out) == alone


def test_stopped_part_is_resumed_by_the_same_part(
    photos: Path, tmp_path: Path, alone: dict[str, object]
) -> None:
    out = tmp_path / "out"
    calls = iter([False] * 4 + [True] * 9)
    with pytest.raises(InterruptedRunError, match=r"stopped after \d of 12 images"):
        part(photos, out, "1/2", stop=lambda: next(calls))
    assert part(photos, out, "2/2").missing_shards > 0
    report = part(photos, out, "1/2")
    assert 0 < report.resumed < IMAGES
    assert content(out) == alone


def test_plain_run_resumes_what_parts_left(
    photos: Path, tmp_path: Path, alone: dict[str, object]
) -> None:
    out = tmp_path / "out"
    part(photos, out, "3/4")
    part(photos, out, "1/4")
    report = extract(photos, "mean", out, **SIZES)
    assert report.resumed == 12
    assert content(out) == alone


def test_part_resumes_what_a_plain_run_left(
    photos: Path, tmp_path: Path, alone: dict[str, object]
) -> None:
    out = tmp_path / "out"
    calls = iter([False] * 6 + [True] * 9)
    with pytest.raises(InterruptedRunError, match="stopped after"):
        extract(photos, "mean", out, stop=lambda: next(calls), **SIZES)
    for number in (2, 1):
        part(photos, out, f"{number}/2")
    assert content(out) == alone


def test_folder_is_busy_for_others_while_a_part_computes(
    photos: Path, tmp_path: Path, alone: dict[str, object]
) -> None:
    out = tmp_path / "out"

    def refused() -> None:
        with pytest.raises(StoreBusyError, match=r"out is being written by process \d+ on"):
            extract(photos, "mean", out, **SIZES)
        with pytest.raises(StoreError, match=r"not finished|being written|no store"):
            compact(out)
        with pytest.raises(StoreBusyError, match=r"out is being written by process \d+ on"):
            extract(photos, "mean", out, overwrite=True, **SIZES)

    part(photos, out, "1/2", progress=during(2, refused))
    part(photos, out, "2/2")
    assert content(out) == alone


@pytest.mark.parametrize("which", ["1/2", "2/2"])
def test_part_beside_another_one_or_its_own_copy_computes_what_is_free(
    photos: Path, tmp_path: Path, alone: dict[str, object], which: str
) -> None:
    out = tmp_path / "out"
    beside: list[Report] = []

    def also() -> None:
        beside.append(part(photos, out, which))

    report = part(photos, out, "1/2", progress=during(2, also))
    if which == "1/2":  # the first one has them
        assert beside[0].missing_shards > report.missing_shards == 4
        part(photos, out, "2/2")
    else:
        assert beside[0].missing_shards == 4
        assert report.missing_shards == 0
    assert content(out) == alone


@pytest.mark.parametrize("is_stopped", [False, True])
def test_part_waits_for_another_process_that_computes_its_shards(
    photos: Path,
    tmp_path: Path,
    alone: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
    is_stopped: bool,
) -> None:
    """Otherwise it says that it is done, and nobody computes them once that process dies."""
    monkeypatch.setattr(parts_module, "POLL_SECONDS", 0.01)
    out = tmp_path / "out"
    part(photos, out, "2/2")
    lock = out / STAGING / JOURNAL / "00001.lock"
    lock.write_text("process 1 on elsewhere\n")
    held = lock.open()
    fcntl.flock(held, fcntl.LOCK_EX)

    polls, calls = 20, itertools.count()  # more than the part has batches
    if is_stopped:
        with pytest.raises(InterruptedRunError, match="stopped after 9 of 12 images"):
            part(photos, out, "1/2", stop=lambda: next(calls) > polls)
        held.close()
    assert part(photos, out, "1/2", progress=during(polls, held.close)).missing_shards == 0
    assert content(out) == alone


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dtype": "float16"}, "dtype: float32 there, float16 here"),
        ({"batch_size": 3}, "batch size: 2 there, 3 here"),
        ({"shard_images": 4}, "shard images: 3 there, 4 here"),
        ({"exclude": ["0*"]}, r"exclude: \[\] there, \['0\*'\] here"),
    ],
)
def test_parts_of_other_options_are_refused_and_lose_nothing(
    photos: Path, tmp_path: Path, alone: dict[str, object], change: dict[str, Any], match: str
) -> None:
    out = tmp_path / "out"
    part(photos, out, "1/2")
    with pytest.raises(StoreError, match=rf"out holds parts of another run \({match}"):
        part(photos, out, "2/2", **change)
    part(photos, out, "2/2")
    assert content(out) == alone


def test_run_of_parts_can_be_discarded_as_the_message_says(
    photos: Path, tmp_path: Path, alone: dict[str, object]
) -> None:
    """After an upgrade, no part fits the plan of before any more."""
    out = tmp_path / "out"
    part(photos, out, "1/2", dtype="float16")
    with pytest.raises(StoreError, match="or discard that run: rm -r ") as caught:
        part(photos, out, "1/2")
    shutil.rmtree(str(caught.value).rpartition("rm -r ")[2])
    for number in (1, 2):
        part(photos, out, f"{number}/2")
    assert content(out) == alone


def test_parts_of_other_inputs_or_models_are_refused(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    part(photos, out, "1/2")
    (tmp_path / "others").mkdir()
    noise(0, 8, 8).save(tmp_path / "others" / "0.png")
    with pytest.raises(StoreError, match=r"another run \(inputs: .*photos.* there, .*others"):
        part(tmp_path / "others", out, "2/2")
    with pytest.raises(StoreError, match=r"another run \(models: \['mean'\] there"):
        extract(photos, "small", out, part="2/2", **SIZES)


def test_part_may_have_other_workers_and_another_number(
    photos: Path, tmp_path: Path, alone: dict[str, object]
) -> None:
    out = tmp_path / "out"
    part(photos, out, "1/2", workers=2, device=ANY_DEVICE, devices="cpu")
    part(photos, out, "4/4")
    part(photos, out, "2/3", max_failure_rate=1.0)
    assert part(photos, out, "3/4").missing_shards == 0
    assert content(out) == alone


def test_parts_fill_several_stores_together(photos: Path, tmp_path: Path) -> None:
    models, outs = ["mean", "small"], [tmp_path / "alone", tmp_path / "out"]
    extract(photos, "mean", outs[0] / "mean", **SIZES)  # one of the stores has rows already
    shutil.copytree(*outs)
    for i in range(4):
        noise(100 + i, 8, 8).save(photos / f"new-{i}.png")
    extract(photos, models, outs[0], **SIZES)
    for number in (1, 3, 2):  # the first part alone fills one of the stores
        extract(photos, models, outs[1], part=f"{number}/3", **SIZES)
    for model in models:
        assert content(outs[1] / model) == content(outs[0] / model)


def test_parts_extend_a_store_whose_images_changed_and_moved(photos: Path, tmp_path: Path) -> None:
    extract(photos, "mean", tmp_path / "alone", **SIZES)
    shutil.copytree(tmp_path / "alone", tmp_path / "out")
    noise(200, 8, 8).save(photos / "03.png")
    (photos / "07.png").rename(photos / "moved.png")
    (photos / "08.png").unlink()
    for i in range(9):
        noise(300 + i, 8, 8).save(photos / f"x{i}.png")
    whole = extract(photos, "mean", tmp_path / "alone", **SIZES)
    part(photos, tmp_path / "out", "2/2")
    last = part(photos, tmp_path / "out", "1/2")
    assert content(tmp_path / "out") == content(tmp_path / "alone")
    assert last.stores[0].counts == whole.stores[0].counts


def test_parts_keep_the_order_of_a_list(photos: Path, tmp_path: Path) -> None:
    names = [photos / f"{i:02d}.png" for i in (9, 3, 3, 20, BAD, 0, 11, 4)]
    options = {**SIZES, "keep_order": True}
    extract(names, "mean", tmp_path / "alone", **options)
    for number in (1, 2):
        extract(names, "mean", tmp_path / "out", part=f"{number}/2", **options)
    assert content(tmp_path / "out") == content(tmp_path / "alone")
    assert FeatureStore.open(tmp_path / "out").list_rows.tolist()[4] == -1


def test_images_that_all_fail_leave_no_store(photos: Path, tmp_path: Path) -> None:
    for path in photos.iterdir():
        path.write_bytes(b"no image")
    part(photos, tmp_path / "out", "1/2")
    with pytest.raises(SourceError, match="no embedding from 23 images"):
        part(photos, tmp_path / "out", "2/2")
    assert not list((tmp_path / "out").iterdir())


def test_part_does_not_start_over(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="part: got overwrite"):
        part(photos, tmp_path / "out", "1/2", overwrite=True)


@pytest.mark.parametrize("again", ["1/2", "2/2", ""])
def test_store_of_a_part_that_died_while_publishing_is_published_by_the_next(
    photos: Path,
    tmp_path: Path,
    alone: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
    again: str,
) -> None:
    out = tmp_path / "out"
    part(photos, out, "1/2")

    def die(out: Path) -> None:
        raise MemoryError("the process dies")

    with monkeypatch.context() as patched:
        patched.setattr(writer_module, "publish_staged", die)
        with pytest.raises(MemoryError, match="the process dies"):
            part(photos, out, "2/2")
    assert (out / STAGING / "store.json").exists()
    extract(photos, "mean", out, part=again or None, **SIZES)
    assert content(out) == alone
    assert not (out / STAGING).exists()


def test_suspects_of_a_dead_part_are_those_of_the_same_part_alone(tmp_path: Path) -> None:
    staging = tmp_path / "out" / STAGING
    staging.mkdir(parents=True)
    with _own_folder(staging, Part(0, 2)) as folder:
        dead = CrashLog(folder / IN_FLIGHT, 2)
        dead.__enter__()
        dead.note(1, b"/photos/evil.png")
        left = (folder / IN_FLIGHT).read_bytes()
    (staging / WORKERS / "part-1-2").mkdir()
    (staging / WORKERS / "part-1-2" / IN_FLIGHT).write_bytes(left)
    with _own_folder(staging, Part(1, 2)) as folder:
        assert _harvest(folder, [staging]) == frozenset()
    with _own_folder(staging, Part(0, 2)) as folder:
        assert folder.name == "part-1-2"
        assert _harvest(folder, [staging]) == {b"/photos/evil.png"}
        with _own_folder(staging, Part(0, 2)) as copy:  # the same part runs twice
            assert copy != folder
            assert _harvest(copy, [staging]) == {b"/photos/evil.png"}
        assert (folder / "lock").exists()
    assert not list((staging / WORKERS).iterdir())


MODEL = ["-m", "torchvision:squeezenet1_1", "--weights", "random", "--device", "cpu"]
COMMAND = [*MODEL, "-b", "4", "--shard-images", "12", "--image-size", "64", "--threads", "1"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images for the command: 17 shards, the last of 8."""
    (tmp_path / "in").mkdir()
    for i in range(200):
        noise(i, 40 + i % 7, 40).save(tmp_path / "in" / f"{i:03d}.png")
    (tmp_path / "in" / "050.png").write_bytes(b"no image")
    return tmp_path / "in"


def test_command_says_how_many_shards_are_missing(folder: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    done = run_extract(*COMMAND, "--part", "2/2", str(folder), "-o", out)
    assert done.returncode == 0
    assert "2/2 is done; 8 of 17 shards are missing" in done.stdout
    assert "104 of 104 images of this part" in done.stdout
    done = run_extract(*COMMAND, "--part", "1/2", str(folder), "-o", out, "--log-json")
    end = json.loads(done.stderr.splitlines()[-1])
    assert done.returncode == 3
    assert (end["part"], end["shards"], end["missing_shards"]) == ("1/2", 17, 0)
    assert end["stores"][0]["rows"] == 199
    assert "1/2 is done, and so are all others" in done.stdout


@pytest.mark.slow
def test_parts_at_once_of_which_some_are_killed_make_the_store_of_one_run(
    folder: Path, tmp_path: Path
) -> None:
    rng = random.Random(6)
    assert run_extract(*COMMAND, str(folder), "-o", str(tmp_path / "alone")).returncode == 3
    out = tmp_path / "out"

    def start(number: int) -> WarmProcess:
        which = ["--part", f"{number}/4", str(folder), "-o", str(out)]
        return WarmProcess(["-m", "extractor", *COMMAND, *which])

    for round_ in range(3):
        numbers = [1, 2, 3, 4, rng.randrange(1, 5)]  # one of them twice
        rng.shuffle(numbers)
        running = [start(number) for number in numbers]
        if round_ < 2:
            time.sleep(rng.uniform(0.5, 4))
            for process in rng.sample(running, 3):
                process.send_signal(signal.SIGKILL)
        codes = {process.wait() for process in running}
        assert codes <= {0, 3, -9}, [process.errors() for process in running]
    assert content(out) == content(tmp_path / "alone")


@pytest.mark.slow
def test_part_computes_in_several_processes(folder: Path, tmp_path: Path) -> None:
    assert run_extract(*COMMAND, str(folder), "-o", str(tmp_path / "alone")).returncode == 3
    for number in (2, 1):
        which = ["--part", f"{number}/2", "--processes", "2", "--devices", "cpu"]
        command = [arg for arg in COMMAND if arg not in ("--device", "cpu")]
        done = run_extract(*command, *which, str(folder), "-o", str(tmp_path / "out"))
        assert done.returncode == (3 if number == 1 else 0), done.stderr
    assert content(tmp_path / "out") == content(tmp_path / "alone")
