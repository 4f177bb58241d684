"""Images that hang, crash, lie, vanish or are none: a run ends with every other row right."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import socket
import struct
import subprocess
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.callbacks import stop_after
from support.commands import run_python
from support.hostile_decoder import hostile_python, write_hostile
from support.loading import only_hanging_images_are_late
from support.networks import mean_pixel, normalized
from support.pictures import color

from extractor import FeatureStore, Progress, extract
from extractor.errors import InterruptedRunError, SourceError
from extractor.images import decode as decode_module
from extractor.images import files as files_module
from extractor.images.budget import LargeImageSlot, PixelBudget
from extractor.images.decode import decode_into
from extractor.images.files import read_file
from extractor.images.listing import list_images
from extractor.images.types import Failure, ImageInfo, ImageSource, ReadFile
from extractor.loading.loader import BatchLoader
from extractor.loading.options import LoaderOptions
from extractor.loading.watchdog import MAX_ABANDONED
from extractor.models import embedding
from extractor.options import Options
from extractor.preprocess import Preprocess
from extractor.upkeep.verify import verify

SIZE = (8, 6)
PREPROCESS = Preprocess(SIZE, "squash", SIZE, "bilinear", (0, 0, 0), (1, 1, 1))


@pytest.fixture(autouse=True)
def mean_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(model: str, options: Options, *_: object) -> object:
        return mean_pixel()

    monkeypatch.setattr(embedding, "load", load)


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run does not wait long for the threads that hang when it ends."""
    monkeypatch.setattr("extractor.loading.loader.PATIENCE_SECONDS", 0.05)


def check_rows(store: FeatureStore, names: Sequence[int]) -> None:
    """Whether a store has just the photos of these numbers, each with its own row."""
    assert sorted(int(Path(path).stem) for path in store.paths) == sorted(names)
    expected = [normalized(color(int(Path(path).stem))) for path in store.paths]
    np.testing.assert_allclose(store.features[:], expected, atol=1e-5)


def failures_of(store: FeatureStore) -> dict[str, str]:
    return {Path(one["path"]).name: one["error"] for one in store.failures}


# ---------------------------------------------------------------------------------------------
# Decoders that hang


class Hanging:
    """``decode_into`` that hangs on images of some levels until it is told to go on."""

    def __init__(self, levels: Sequence[int], *, holding: bool = False) -> None:
        self.go_on = threading.Event()
        self.came_back: list[int] = []
        self._levels = set(levels)
        self._holding = holding

    def __call__(
        self,
        source: ImageSource,
        preprocesses: Sequence[Preprocess],
        outs: Sequence[np.ndarray],
        budget: PixelBudget,
        *how: str,
    ) -> ImageInfo:
        level = int(source[0, 0])  # type: ignore[index,call-overload]
        if level in self._levels:
            if self._holding:
                with budget.claim(5, 5):
                    self.go_on.wait(30)
            self.go_on.wait(30)
            for out in outs:
                out[...] = 255
            self.came_back.append(level)
            return ImageInfo(-1, -1, 5, 5)
        return decode_into(source, preprocesses, outs, budget, *how)


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Hanging]]:
    made: list[Hanging] = []

    def hang(*levels: int, **options: bool) -> Hanging:
        made.append(Hanging(levels, **options))
        only_hanging_images_are_late(monkeypatch, lambda source: source[0, 0] in levels)  # type: ignore[index,call-overload]
        monkeypatch.setattr("extractor.loading.image_decoder.decode_into", made[-1])
        return made[-1]

    yield hang
    for one in made:
        one.go_on.set()


def gray(level: int) -> np.ndarray:
    return np.full((5, 5), level, np.uint8)


def batches_of(levels: Sequence[int], size: int) -> Iterator[list[ImageSource]]:
    for start in range(0, len(levels), size):
        yield [gray(level) for level in levels[start : start + size]]


def load(
    levels: Sequence[int], size: int, workers: int, timeout: float = 0.15, **options: Any
) -> list[str | int]:
    """For each image the level that was drawn, or why there is none."""
    outcomes: list[str | int] = []
    limits = LoaderOptions(size, workers, image_timeout_seconds=timeout, **options)
    with BatchLoader(batches_of(levels, size), [PREPROCESS], limits) as loader:
        for batch in loader:
            outcomes += levels_of(batch)
            batch.release()
    return outcomes


def levels_of(batch: Any) -> list[str | int]:
    outcomes: list[str | int] = []
    rows = batch.pictures[0].numpy()
    for row, outcome in zip(rows, batch.outcomes, strict=False):
        failed = isinstance(outcome, Failure)
        assert (row == (0 if failed else row[0, 0, 0])).all()
        outcomes.append(outcome.reason if failed else int(row[0, 0, 0]))
    assert (rows[len(batch.outcomes) :] == 0).all()
    return outcomes


@pytest.mark.parametrize("hung", [[1], [4], [1, 2, 3], [3, 10], [9, 10, 11]])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("size", [1, 4])
def test_hanging_image_times_out_alone(
    hanging: Callable[..., Hanging], hung: list[int], workers: int, size: int
) -> None:
    hanging(*hung)
    levels = list(range(1, 12))
    expected = ["timeout" if level in hung else level for level in levels]
    assert load(levels, size, workers) == expected


def test_image_in_time_survives_timeout_of_its_neighbor(
    hanging: Callable[..., Hanging], monkeypatch: pytest.MonkeyPatch
) -> None:
    hang = hanging(1)

    def slow(source: ImageSource, *rest: Any) -> ImageInfo:
        if int(source[0, 0]) in (2, 3):  # type: ignore[index,call-overload]
            time.sleep(0.3)  # 3 is begun before 1 is given up, and done after it
        return hang(source, *rest)

    monkeypatch.setattr("extractor.loading.image_decoder.decode_into", slow)
    assert load([1, 2, 3, 4, 5], 4, 2, timeout=0.45) == ["timeout", 2, 3, 4, 5]


@pytest.mark.parametrize("workers", [1, 3])
def test_late_decoder_touches_no_batch(hanging: Callable[..., Hanging], workers: int) -> None:
    hung = hanging(2, 6)
    levels = list(range(1, 41))
    outcomes = []
    with BatchLoader(
        batches_of(levels, 4),
        [PREPROCESS],
        LoaderOptions(batch_size=4, workers=workers, image_timeout_seconds=0.15),
    ) as loader:
        for number, batch in enumerate(loader):
            before = batch.pictures[0].clone()
            if number == 1:
                hung.go_on.set()
                until = time.monotonic() + 5
                while len(hung.came_back) < 2 and time.monotonic() < until:
                    time.sleep(0.005)
                time.sleep(0.02)  # what it writes, and tells, after that
            assert (batch.pictures[0] == before).all()
            outcomes += levels_of(batch)
            batch.release()
    assert sorted(hung.came_back) == [2, 6]
    assert outcomes == ["timeout" if level in (2, 6) else level for level in levels]


@pytest.mark.parametrize("more", [0, 1])
def test_run_ends_above_the_limit_of_hanging_images(
    hanging: Callable[..., Hanging], more: int
) -> None:
    hung = list(range(1, MAX_ABANDONED + more + 1))
    hanging(*hung)
    levels = [*hung, 200, 201]
    if more:
        with pytest.raises(SourceError, match=r"33 images were not read .* within 0\.02 s each"):
            load(levels, 4, 8, timeout=0.02)
    else:
        outcomes = load(levels, 4, 8, timeout=0.02)
        assert outcomes[:MAX_ABANDONED] == ["timeout"] * MAX_ABANDONED


def test_run_does_not_wait_for_hanging_image(hanging: Callable[..., Hanging]) -> None:
    hanging(3)  # for 30 seconds
    begun = time.monotonic()
    load([1, 2, 3, 4], 2, 2)
    assert time.monotonic() - begun < 20


def test_waiting_for_the_pixel_budget_is_no_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(
        source: ImageSource,
        preprocesses: Sequence[Preprocess],
        outs: Sequence[np.ndarray],
        budget: PixelBudget,
        *how: str,
    ) -> ImageInfo:
        with budget.claim(5, 5):
            time.sleep(0.1)  # in time, each of them, and not all together
        return decode_into(source, preprocesses, outs)

    monkeypatch.setattr("extractor.loading.image_decoder.decode_into", slow)
    levels = list(range(1, 17))
    assert load(levels, 16, 16, timeout=1.0, max_pixels=30) == levels


def test_waiting_for_the_slot_of_large_images_is_no_timeout(tmp_path: Path) -> None:
    """An image of 25 pixels is above the share of this process, and another one has the slot."""
    slot = LargeImageSlot(tmp_path / "slot")
    slot.take()
    timer = threading.Timer(1.2, slot.give_back)
    timer.start()
    limits: dict[str, Any] = {"pixel_share": 20, "large_image_slot": tmp_path / "slot"}
    assert load([1, 2, 3, 4, 5], 4, 2, timeout=0.8, max_pixels=30, **limits) == [1, 2, 3, 4, 5]
    timer.join()


def test_hanging_image_frees_the_slot_of_large_images(
    hanging: Callable[..., Hanging], tmp_path: Path
) -> None:
    hanging(1, 3, holding=True)
    limits: dict[str, Any] = {"pixel_share": 20, "large_image_slot": tmp_path / "slot"}
    assert load([1, 2, 3, 4], 4, 2, max_pixels=30, **limits) == ["timeout", 2, "timeout", 4]
    LargeImageSlot(tmp_path / "slot").take()  # as another process


def test_hanging_image_does_not_starve_others(hanging: Callable[..., Hanging]) -> None:
    hanging(1, holding=True)
    assert load([1, 2, 3, 4], 4, 2, max_pixels=30) == ["timeout", 2, 3, 4]


def test_pixel_budget_bounds_images_decoded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lock, now, most = threading.Lock(), 0, 0

    class Counted(Image.Image):  # type: ignore[misc]
        def load(self) -> Any:
            nonlocal now, most
            with lock:
                now += self.width * self.height
                most = max(most, now)
            time.sleep(0.005)
            with lock:
                now -= self.width * self.height
            return super().load()

    def opened(array: np.ndarray) -> Image.Image:
        image = Counted()
        image.im = Image.fromarray(array).im
        image._mode, image._size = "L", array.shape[::-1]
        return image

    monkeypatch.setattr(decode_module, "_from_array", opened)
    levels = list(range(1, 41))
    assert load(levels, 8, 8, timeout=20, max_pixels=60) == levels
    assert most == 50  # two images of 25 at a time, not three


def test_store_lists_hanging_images_as_timeouts(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def hangs(path: Any) -> bool:
        return os.fsdecode(path).endswith(("00.png", "07.bmp"))

    def hang(source: ReadFile, *rest: Any) -> ImageInfo:
        if hangs(source.path):
            go_on.wait(30)
        return decode_into(source, *rest)

    monkeypatch.setattr("extractor.loading.image_decoder.decode_into", hang)
    only_hanging_images_are_late(monkeypatch, hangs)
    try:
        out = tmp_path / "out"
        report = extract(photos, "mean", out, batch_size=3, workers=2, image_timeout=0.3)
    finally:
        go_on.set()
    check_rows(report.store, [1, 2, 3, 4, 5, 6, 8, 9, 10])
    assert failures_of(report.store) == {"00.png": "timeout", "07.bmp": "timeout"}
    assert {one["message"] for one in report.failures} == {"not decoded within 0.3 s"}
    assert not list(verify(out))
    assert list(out.glob(".*")) == []


# ---------------------------------------------------------------------------------------------
# Decoders that take the process down

RUN = f"""
import logging, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from support.networks import mean_pixel
from extractor import extract
from extractor.models import embedding

logging.basicConfig(format="%(message)s")
embedding.load = lambda *_: mean_pixel()
extract(sys.argv[1], "mean", sys.argv[2], batch_size=3, workers=int(sys.argv[3]))
"""


@pytest.fixture
def pythonpath(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Children have a decoder with a fault; this process does not."""
    monkeypatch.setenv("PYTHONPATH", hostile_python(tmp_path / "hostile"))


def run(photos: Path, out: Path, workers: int = 1) -> subprocess.CompletedProcess[str]:
    return run_python("-c", RUN, str(photos), str(out), str(workers))


def hostile_photo(photos: Path, number: int, deed: str) -> bytes:
    (old,) = photos.rglob(f"{number:02d}.*")
    old.unlink()
    return write_hostile(old, deed, Image.new("RGB", (30, 20), color(number)))


@pytest.mark.usefixtures("pythonpath")
@pytest.mark.parametrize(
    ("deed", "code", "message"),
    [
        (f"signal {int(signal.SIGSEGV)}", -signal.SIGSEGV, "SIGSEGV"),
        (f"signal {int(signal.SIGKILL)}", -signal.SIGKILL, "SIGKILL"),
        ("exit 9", 9, "exit code 9"),
    ],
)
def test_image_that_kills_a_run_fails_in_the_next(
    photos: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    deed: str,
    code: int,
    message: str,
) -> None:
    hostile_photo(photos, 8, deed)
    out = tmp_path / "out"
    first = run(photos, out, workers=2)
    assert first.returncode == code, first.stderr
    assert not (out / "store.json").exists()
    with caplog.at_level(logging.WARNING):
        report = extract(photos, "mean", out, batch_size=3, workers=2)
    (warning,) = [text for text in caplog.messages if "the last run died" in text]
    assert "08.tiff" in warning
    check_rows(report.store, [i for i in range(11) if i != 8])
    (failure,) = report.failures
    assert failure["error"] == "crashed"
    assert message in failure["message"]
    assert not list(verify(out))
    assert list(out.glob(".*")) == []  # nothing is remembered of a store that is complete
    caplog.clear()
    again = extract(photos, "mean", out, batch_size=3, workers=2)
    assert (again.resumed, again.failed, caplog.messages) == (11, 1, [])


@pytest.mark.usefixtures("pythonpath")
def test_every_image_that_killed_a_run_is_remembered(photos: Path, tmp_path: Path) -> None:
    for number in (0, 9):
        hostile_photo(photos, number, "exit 9")
    out = tmp_path / "out"
    first = run(photos, out)
    assert (first.returncode, first.stderr) == (9, "")
    second = run(photos, out)
    assert second.returncode == 9
    assert second.stderr.count("the last run died") == 1
    assert second.stderr.count(".png") + second.stderr.count(".bmp") == 1
    third = run(photos, out)
    assert third.returncode == 0
    store = FeatureStore.open(out)
    check_rows(store, [i for i in range(11) if i not in (0, 9)])
    assert failures_of(store) == {"00.png": "crashed", "09.png": "crashed"}
    assert not list(verify(out))


@pytest.mark.usefixtures("pythonpath")
def test_new_images_do_not_erase_memory_of_a_crash(photos: Path, tmp_path: Path) -> None:
    hostile_photo(photos, 10, "exit 9")
    out = tmp_path / "out"
    assert run(photos, out).returncode == 9
    Image.new("RGB", (9, 9), color(11)).save(photos / "11.png")
    second = run(photos, out)
    assert "the last run died" in second.stderr
    assert second.returncode == 0
    store = FeatureStore.open(out)
    check_rows(store, [*range(10), 11])
    assert failures_of(store) == {"10.bmp": "crashed"}


def leave_suspects(photos: Path, out: Path, *paths: bytes) -> None:
    """What a run leaves that died while it decoded these, after a batch that it did."""
    with pytest.raises(InterruptedRunError, match="stopped after 3"):
        extract(photos, "mean", out, batch_size=3, stop=stop_after(1))
    names = json.dumps([os.fsdecode(path) for path in paths])
    (out / ".extractor-partial/suspects.json").write_text(names)


@pytest.mark.slow
@pytest.mark.usefixtures("pythonpath")
def test_hanging_suspect_times_out_and_good_suspect_has_row(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bad = hostile_photo(photos, 8, "hang")
    good = os.fsencode(next(photos.rglob("10.*")))
    leave_suspects(photos, out, bad, good)
    report = extract(photos, "mean", out, batch_size=3, workers=2, image_timeout=3)
    check_rows(report.store, [i for i in range(11) if i != 8])
    assert failures_of(report.store) == {"08.tiff": "timeout"}
    assert not list(verify(out))


@pytest.mark.usefixtures("pythonpath")
def test_suspects_survive_a_stopped_run(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bad = hostile_photo(photos, 10, "exit 9")
    leave_suspects(photos, out, bad)
    with pytest.raises(InterruptedRunError, match="stopped after 6"):
        extract(photos, "mean", out, batch_size=3, stop=stop_after(1))
    report = extract(photos, "mean", out, batch_size=3)
    assert failures_of(report.store) == {"10.bmp": "crashed"}


@pytest.mark.usefixtures("pythonpath")
def test_suspects_survive_interruption_before_the_first_batch(photos: Path, tmp_path: Path) -> None:
    bad = hostile_photo(photos, 0, "exit 9")
    out = tmp_path / "out"
    assert run(photos, out).returncode == 9

    def interrupted(progress: Progress) -> None:
        if progress.phase == "computing":
            raise KeyboardInterrupt("Ctrl-C")

    with pytest.raises(KeyboardInterrupt, match="Ctrl-C"):
        extract(photos, "mean", out, batch_size=3, progress=interrupted)
    names = json.loads((out / ".extractor-partial/suspects.json").read_text())
    assert os.fsdecode(bad) in names


# ---------------------------------------------------------------------------------------------
# What is no image, or not for long


NAMES = [
    b"new\nline.png",
    b"quote'\".png",
    b"\t\x01\x7f.png",
    "\N{GRINNING FACE} \N{COMBINING ACUTE ACCENT}.png".encode(),
    b"\xff\xfe.png",
    b"-rf.png",
    b" .png",
    b"%s{}$HOME.png",
    b"n" * 251 + b".png",
]


def png_of(number: int, size: tuple[int, int] = (30, 20)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color(number)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("shard_images", [4, 100])
def test_any_file_name_has_its_row(tmp_path: Path, shard_images: int) -> None:
    folder = os.fsencode(tmp_path / "images")
    os.mkdir(folder)
    names = []
    for number, name in enumerate(NAMES):
        try:
            with open(os.path.join(folder, name), "wb") as file:
                file.write(png_of(number))
            names.append(name)
        except OSError:  # the file system takes only UTF-8 names
            assert name == b"\xff\xfe.png"
    deep = b"/".join([b"d" * 200] * ((3990 - len(folder)) // 201))
    os.makedirs(os.path.join(folder, deep))
    names.append(deep + b"/" + b"e" * (3990 - len(folder) - len(deep) - 6) + b".png")
    path = os.path.join(folder, names[-1])
    assert len(path) == 3990
    with open(path, "wb") as file:
        file.write(png_of(len(NAMES)))
    report = extract(os.fsdecode(folder), "mean", tmp_path / "out", shard_images=shard_images)
    assert report.failed == 0
    store = report.store
    assert [os.fsencode(path) for path in store.paths] == sorted(names)
    numbers = {name: number for number, name in enumerate(NAMES)} | {names[-1]: len(NAMES)}
    expected = [normalized(color(numbers[os.fsencode(path)])) for path in store.paths]
    np.testing.assert_allclose(store.features[:], expected, atol=1e-5)
    assert not list(verify(tmp_path / "out"))


def hostile_folder(folder: Path) -> dict[str, str]:
    """Files that are no images under names of images; returns the reason of each that counts."""
    (folder / "zero.png").touch()
    (folder / "text.jpg").write_text("text")
    (folder / "half.png").write_bytes(png_of(1, (400, 400))[:-400])
    (folder / "bomb.png").write_bytes(png_file(65_536, 65_536, b""))
    (folder / "nowhere.gif").symlink_to("gone.gif")
    (folder / "itself.bmp").symlink_to("itself.bmp")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "to-pipe.jpg").symlink_to("pipe.jpg")
    (folder / "to-device.jpg").symlink_to("/dev/zero")
    (folder / "folder.jpg").mkdir()
    (folder / "folder.jpg/inside.webp").write_bytes(png_of(1, (400, 400))[:-400])
    return {
        "zero.png": "empty",
        "text.jpg": "not-an-image",
        "half.png": "truncated",
        "bomb.png": "too-large",
        "nowhere.gif": "unreadable",
        "itself.bmp": "unreadable",
        "to-pipe.jpg": "not-a-file",
        "to-device.jpg": "not-a-file",
        "inside.webp": "truncated",
    }


def test_every_bad_file_has_its_reason_and_shifts_no_row(photos: Path, tmp_path: Path) -> None:
    expected = hostile_folder(photos)
    (photos / "11.jpg").write_bytes(png_of(11))  # of the wrong ending
    (photos / "12").write_bytes(png_of(12))  # of none
    report = extract(photos, "mean", tmp_path / "out", batch_size=4, shard_images=5)
    check_rows(report.store, range(13))
    assert failures_of(report.store) == expected
    assert report.passed_over == 1  # the pipe, which nobody named
    assert not list(verify(tmp_path / "out"))


def test_bad_files_named_directly_have_their_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # names of sockets must be short
    Path("00.png").write_bytes(png_of(0))
    os.mkfifo("pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jpg")
        report = extract(["00.png", "pipe.jpg", "socket.jpg", "/dev/null"], "mean", "out")
    check_rows(report.store, [0])
    assert failures_of(report.store) == {
        "pipe.jpg": "not-a-file",
        "socket.jpg": "not-a-file",
        "null": "not-a-file",
    }
    assert not list(verify(tmp_path / "out"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission_is_unreadable(photos: Path, tmp_path: Path) -> None:
    (photos / "01.bmp").chmod(0)
    report = extract(photos, "mean", tmp_path / "out")
    check_rows(report.store, [0, *range(2, 11)])
    assert failures_of(report.store) == {"01.bmp": "unreadable"}


def test_changes_after_listing_have_their_reason(photos: Path, tmp_path: Path) -> None:
    files = {int(path.stem): path for path in photos.rglob("*.*")}
    images = list_images(photos)
    for number in range(5):
        files[number].unlink()
    files[1].mkdir()
    os.mkfifo(files[2])
    files[3].touch()
    files[4].write_bytes(png_of(10))  # another image, which is there when it is read
    report = extract(images, "mean", tmp_path / "out", batch_size=4)
    reasons = {number: failures_of(report.store)[files[number].name] for number in range(4)}
    assert reasons == {0: "unreadable", 1: "not-a-file", 2: "not-a-file", 3: "empty"}
    rows = {
        int(Path(path).stem): row
        for path, row in zip(report.store.paths, report.store.features[:], strict=True)
    }
    assert sorted(rows) == list(range(4, 11))
    for number, row in rows.items():
        drawn = 10 if number == 4 else number
        np.testing.assert_allclose(row, normalized(color(drawn)), atol=1e-5)
    assert not list(verify(tmp_path / "out"))


def test_vanishing_files_cost_only_their_rows(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted(path for path in photos.rglob("*.*"))
    gone = []

    def vanish(source: bytes, *rest: Any) -> ReadFile:
        index = files.index(Path(os.fsdecode(source)))
        if index % 4 == 1:
            files[index].unlink()
            gone.append(files[index].name)
        return read_file(source, *rest)  # type: ignore[return-value]

    monkeypatch.setattr("extractor.loading.image_decoder.read_file", vanish)
    report = extract(photos, "mean", tmp_path / "out", batch_size=2, workers=2)
    left = [int(path.stem) for path in files if path.name not in gone]
    check_rows(report.store, left)
    assert len(gone) == 3
    assert failures_of(report.store) == dict.fromkeys(gone, "unreadable")
    assert not list(verify(tmp_path / "out"))


class Changing(io.FileIO):
    """A file that another process changes as soon as it is read."""

    change: Callable[[Path], None]

    def __init__(self, path: bytes) -> None:
        super().__init__(path)
        self._path = Path(os.fsdecode(path))
        self._changed = False

    def read(self, size: int | None = -1) -> Any:
        if not self._changed:
            self._changed = True
            type(self).change(self._path)
        return super().read(size)  # type: ignore[arg-type]


@pytest.mark.parametrize("read_whole_bytes", [0, 2**26])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP"])
def test_file_that_shrinks_during_reading_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, read_whole_bytes: int
) -> None:
    (tmp_path / "images").mkdir()
    for number in (1, 2):
        Image.effect_noise((90, 90), 80).save(tmp_path / f"images/{number}.{kind.lower()}")

    def halve(path: Path) -> None:
        if path.stem == "1":
            os.truncate(path, path.stat().st_size // 2)

    monkeypatch.setattr(files_module, "READ_WHOLE_BYTES", read_whole_bytes)
    monkeypatch.setattr(files_module, "open_regular", Changing)
    monkeypatch.setattr(Changing, "change", staticmethod(halve), raising=False)
    report = extract(tmp_path / "images", "mean", tmp_path / "out")
    assert failures_of(report.store).keys() == {f"1.{kind.lower()}"}
    assert set(failures_of(report.store).values()) <= {"truncated", "corrupt"}
    assert report.rows == 1


def test_file_that_grows_during_reading_is_recomputed_by_the_next_run(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def grow(path: Path) -> None:
        if path.stem == "03":
            with path.open("ab") as file:
                file.write(b"more")

    with monkeypatch.context() as patched:
        patched.setattr(files_module, "open_regular", Changing)
        patched.setattr(Changing, "change", staticmethod(grow), raising=False)
        check_rows(extract(photos, "mean", tmp_path / "out").store, range(11))
    report = extract(photos, "mean", tmp_path / "out")
    assert (report.resumed, report.stores[0].changed) == (10, 1)
    check_rows(report.store, range(11))
    assert not list(verify(tmp_path / "out"))


# ---------------------------------------------------------------------------------------------
# Memory


def png_file(width: int, height: int, rows: bytes, color_type: int = 0) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">L", len(body)) + name + body + struct.pack(">L", zlib.crc32(name + body))
        )

    header = struct.pack(">LLBBBBB", width, height, 8, color_type, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(rows, 1))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def ico_file(png: bytes) -> bytes:
    """An icon of 16 x 16 pixels, as it says, that holds another image."""
    entry = struct.pack("<BBBBHHLL", 16, 16, 0, 0, 1, 32, len(png), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + png


PEAK = """
import sys, warnings
from pathlib import Path
from extractor.images.budget import allow_pixels
from extractor.loading.loader import BatchLoader
from extractor.loading.options import LoaderOptions
from extractor.preprocess import Preprocess

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024

warnings.simplefilter("ignore")
workers, max_pixels, *paths = sys.argv[1:]
allow_pixels(int(max_pixels))
one = Preprocess((24, 32), "squash", (24, 32), "bilinear", (0, 0, 0), (1, 1, 1))
small = BatchLoader([[p.encode() for p in paths[:1]]], [one], LoaderOptions(1, 1))
with small as loader:
    next(iter(loader))
before = peak()
options = LoaderOptions(len(paths), int(workers), max_pixels=int(max_pixels))
with BatchLoader([[p.encode() for p in paths]], [one], options) as loader:
    outcomes = [getattr(one, "reason", "row") for one in next(iter(loader)).outcomes]
print(peak() - before, *outcomes)
"""


def peak_of(paths: Sequence[Path], workers: int, max_pixels: int) -> tuple[int, list[str]]:
    """Megabytes that a run over some images needs, and what became of each."""
    ended = run_python("-c", PEAK, str(workers), str(max_pixels), *map(str, paths))
    assert ended.returncode == 0, ended.stderr
    megabytes, *outcomes = ended.stdout.split()
    return int(megabytes), outcomes


linux = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc")


@linux
def test_oversized_image_costs_no_memory(tmp_path: Path) -> None:
    small, bomb, icon = (tmp_path / name for name in ("a.png", "bomb.png", "bomb.ico"))
    small.write_bytes(png_of(1))
    huge = png_file(65_536, 65_536, bytes(10**6))
    bomb.write_bytes(huge)
    icon.write_bytes(ico_file(huge))
    needed, outcomes = peak_of([small, bomb, small, icon], 2, 200_000_000)
    assert outcomes == ["row", "too-large", "row", "too-large"]
    assert needed < 50


@linux
def test_large_images_share_the_memory_budget(tmp_path: Path) -> None:
    small, large = tmp_path / "a.png", tmp_path / "large.png"
    small.write_bytes(png_of(1))
    side = 5000
    large.write_bytes(png_file(side, side, bytes((side + 1) * side)))
    alone, _ = peak_of([small, large], 1, 30_000_000)
    together, outcomes = peak_of([small, *[large] * 6, small], 6, 30_000_000)
    assert outcomes == ["row"] * 8
    assert together < 2 * alone + 50  # not six times


@linux
def test_icons_holding_large_images_share_the_memory_budget(tmp_path: Path) -> None:
    small, large = tmp_path / "a.png", tmp_path / "large.ico"
    small.write_bytes(png_of(1))
    side = 5000
    large.write_bytes(ico_file(png_file(side, side, bytes((3 * side + 1) * side), color_type=2)))
    alone, _ = peak_of([small, large], 1, 30_000_000)
    together, outcomes = peak_of([small, *[large] * 6], 6, 30_000_000)
    assert outcomes == ["row"] * 7
    assert together < 2 * alone + 50
